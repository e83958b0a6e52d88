"""Native code of others runs in a process of its own: a crash is then an answer, and its threads end with it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import quantkit


class OracleError(RuntimeError):
    """An oracle could not answer; the message says why: a line, then what it printed."""

    def reason(self) -> str:
        """The line that says it best: llama.cpp logs hundreds."""
        lines = str(self).splitlines()
        said = [line for line in lines if "error" in line.lower() or "GGML_ASSERT" in line]
        first = lines[0].rstrip(":")
        return f"{first}: {said[0].strip()}" if said and said[0] != lines[0] else first


class NotRun(OracleError):
    """The file was not judged, and is not to blame: too little memory or time, or a program that is too old for what it
    is asked. The message is one line."""


class IllegalInstruction(NotRun):
    """This CPU lacks an instruction that the oracle was compiled with."""


UNAVAILABLE = os.EX_UNAVAILABLE  # exit code of a child that found, before it opened a file, that it cannot answer
MOST_LINE = 300  # characters of another program's line
# What llama.cpp, ggml, C++, Python, numpy and torch say.
NO_MEMORY = re.compile(
    r"([Ff]ailed|[Uu]nable) to allocate (?!.*pinned)|insufficient memory|std::bad_alloc|\bMemoryError\b|"
    r"OutOfMemoryError|CUDA out of memory|[Cc]an(no|')t allocate memory"
)
UNKNOWN = re.compile(
    r"(unknown|invalid) argument: -|error while handling argument|unexpected keyword argument|"
    r"^(ImportError|ModuleNotFoundError)\b|error while loading shared libraries|undefined symbol"
)
OF_THE_FILE = re.compile(r"- kv +\d+:|print_info:")  # lines of llama.cpp that repeat what anyone may have written
KILLED = {-signal.SIGKILL, 128 + signal.SIGKILL}  # the latter by a shell that started it
ILLEGAL = {-signal.SIGILL, 128 + signal.SIGILL}


def run_module(module: str, request: str, name: str, timeout: float, settings: Mapping[str, str] | None = None) -> None:
    """`python -m module request`, which leaves its answer where the request says. OracleError if it does not end well,
    NotRun if that is not the file's doing.

    name: of the oracle, for messages. timeout: in seconds. settings: added to the environment.
    """
    # What PYTHONPATH names comes first there as it did here, also where quantkit lies beside an installed program.
    places = [*filter(None, [os.environ.get("PYTHONPATH")]), str(Path(quantkit.__file__).parents[1])]
    settings = {"PYTHONPATH": os.pathsep.join(places)} | dict(settings or {})
    run_program([sys.executable, "-m", module, request], name, timeout, settings)


def run_program(
    words: Sequence[str], name: str, timeout: float, settings: Mapping[str, str], folder: Path | None = None
) -> str:
    """A program and its arguments -> what it wrote. OracleError if it does not end well, as `run_module`.

    folder: where it runs, for some programs leave logs there.
    """
    try:
        child = subprocess.run(
            words,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env=os.environ | dict(settings),
            cwd=folder,
        )
    except subprocess.TimeoutExpired:
        raise NotRun(f"{name} did not answer in {timeout:,.0f} s: too slow here, or hung") from None
    except OSError as error:  # of another architecture, without its interpreter
        raise NotRun(f"{name} cannot be executed: {error.strerror}") from None
    if child.returncode in ILLEGAL:
        raise IllegalInstruction(f"this CPU does not run {name}")
    if why := _not_run(child.returncode, child.stderr):
        raise NotRun(f"{name} {why}")
    if child.returncode:
        how = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise OracleError(f"{name} ended with {how}:\n{child.stderr[-3000:]}")
    return child.stdout + child.stderr


def _not_run(code: int, said: str) -> str | None:
    """Why an end says nothing of the file; None if it does, or is a good one. said: its stderr."""
    if code in KILLED:
        return "was killed (signal 9), which Linux does when memory runs out"
    lines = [line.strip() for line in said.splitlines()] if code else []
    if code == UNAVAILABLE:
        return f"cannot answer: {lines[-1] if lines else f'exit code {code}'}"
    lines = [line for line in lines if not OF_THE_FILE.search(line)]
    for pattern, why in ((NO_MEMORY, "ran out of memory"), (UNKNOWN, "is too old, too new or not whole")):
        if line := next((line for line in lines if pattern.search(line)), None):
            return f"{why}: {line[:MOST_LINE]}"
    return None
