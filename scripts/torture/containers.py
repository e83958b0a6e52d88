"""The commands where containers, users and terminals take something away: a home, cores, memory, files, streams.

    python scripts/torture/containers.py

Every environment is a real one for the process: another user, limits of the kernel, closed descriptors. Control groups
are not among them, because only a host can set them: tests/test_container.py lays their files out instead. A command
must succeed, or refuse in one line; it fails if it is killed, hangs, or shows a traceback. What `make` writes must be
the same bytes everywhere.
"""

import argparse
import hashlib
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "tiny-r1-1.58bit.gguf"
NOBODY = 65534
COMMANDS: Mapping[str, tuple[str, ...]] = {
    "inspect": ("tiny-r1",),
    "plan": ("tiny-r1", "--recipe", "1.58bit"),
    "make": ("tiny-r1", "--recipe", "1.58bit", "--tokens", "1024", "--eval-tokens", "1024", "--output", "{out}"),
    "run": ("{calm}/" + NAME, "-p", "It was a dark", "-n", "4", "--temperature", "0"),
    "certify": ("{calm}/" + NAME, "--no-oracle", "--no-values", "--json", "{out}.json"),
    "report": ("{made}",),
}


def limited(kind: int, value: int) -> Callable[[], None]:
    """For a child: setrlimit."""
    return lambda: resource.setrlimit(kind, (value, value))


def one_core() -> None:
    """For a child: the first of the cores that it has."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


@dataclass(frozen=True)
class Environment:
    """variables: set, or left out if None. before: runs in the child. user: another one (needs root). closed: standard
    streams without a descriptor."""

    variables: Mapping[str, str | None] = field(default_factory=dict)
    before: Callable[[], None] | None = None
    user: int | None = None
    closed: tuple[int, ...] = ()


NO_HOME = {"HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "NUMBA_CACHE_DIR": None, "TRITON_CACHE_DIR": None}
ENVIRONMENTS = {
    "calm": Environment(),
    "no home": Environment(NO_HOME),
    "nobody, no home": Environment(NO_HOME, user=NOBODY),
    "a user without a name": Environment(NO_HOME | {"USER": None, "LOGNAME": None}, user=54321),
    "one core": Environment(before=one_core),
    "address space of 8 GB": Environment(before=limited(resource.RLIMIT_AS, 8 * 10**9)),
    "data of 3 GB": Environment(before=limited(resource.RLIMIT_DATA, 3 * 10**9)),
    "64 open files": Environment(before=limited(resource.RLIMIT_NOFILE, 64)),
    "no core dumps, small stack": Environment(before=limited(resource.RLIMIT_STACK, 1 << 20)),
    "latin-1": Environment({"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"}),
    "a locale that is not there": Environment({"LC_ALL": "xx_XX.UTF-8", "TERM": "dumb", "COLUMNS": "1"}),
    "closed stdin": Environment(closed=(0,)),
    "closed stderr": Environment(closed=(2,)),
}


def judge(code: int | None, stderr: str) -> str:
    """ok, refused, or what went wrong. code: None where time ran out."""
    if code is None:
        return "HANGS"
    if "Traceback" in stderr or code < 0:
        return f"FAILED ({code}): {stderr.strip().splitlines()[-1:] or ''}"
    lines = [line for line in stderr.splitlines() if line.startswith("quantkit: ")]
    return "ok" if code == 0 else "refused" if code == 1 and len(lines) == 1 else f"FAILED ({code}): {stderr[-200:]!r}"


def attempt(environment: Environment, command: list[str], seconds: float) -> tuple[int | None, str]:
    """Exit code (None: it took too long) and stderr."""
    variables = {"PYTHONPATH": str(ROOT), **os.environ}
    for key, value in environment.variables.items():
        variables.pop(key, None)
        if value is not None:
            variables[key] = value

    def before() -> None:
        for stream in environment.closed:
            os.close(stream)
        if environment.before:
            environment.before()

    try:
        done = subprocess.run(
            [sys.executable, "-m", "quantkit", *command],
            capture_output=True,
            timeout=seconds,
            env=variables,
            preexec_fn=before,
            user=environment.user,
            cwd="/",
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return done.returncode, done.stderr.decode(errors="replace")


def can_start(environment: Environment) -> bool:
    """Whether Python starts as that user at all."""
    try:
        subprocess.run([sys.executable, "-c", ""], user=environment.user, check=True, cwd="/")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


def main() -> int:
    """Print a line for every environment; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300, help="limit of one command")
    parser.add_argument("--only", default="", help="environments whose name contains this")
    options = parser.parse_args()
    failed, calm = 0, ""
    with tempfile.TemporaryDirectory() as work:
        Path(work).chmod(0o777)
        os.umask(0)
        for i, (name, environment) in enumerate(ENVIRONMENTS.items()):
            if name != "calm" and options.only not in name:
                continue
            if not can_start(environment):
                print(f"{name:<28} not run: this needs root, and a Python that others can read")
                continue
            out, began, found = Path(work) / f"out{i}", time.monotonic(), {}
            for command, arguments in COMMANDS.items():
                calm_folder = Path(work) / "out0"
                places = {"out": out, "calm": calm_folder, "made": out if out.is_dir() else calm_folder}
                given = [argument.format(**places) for argument in arguments]
                code, stderr = attempt(environment, [command, *given], options.seconds)
                found[command] = judge(code, stderr)
            digest = hashlib.sha256((out / NAME).read_bytes()).hexdigest() if (out / NAME).is_file() else "none"
            calm = calm or digest
            bytes_are = "no file" if digest == "none" else "same bytes" if digest == calm else "OTHER BYTES"
            line = ", ".join(f"{command} {verdict}" for command, verdict in found.items() if verdict != "ok")
            print(f"{name:<28} {line or 'all ok'}; {bytes_are}; {time.monotonic() - began:.0f} s", flush=True)
            failed += any(verdict not in ("ok", "refused") for verdict in found.values()) or bytes_are == "OTHER BYTES"
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
