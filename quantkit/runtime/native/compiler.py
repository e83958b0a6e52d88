"""The C of this package as a library: compiled once with the system's compiler, kept, and found again.

What is kept is named by all that it depends on (sources, compiler, what the processor can do) and lies beside its
checksum; if they do not fit, it is compiled again. Nothing is taken from a folder that others can write to
(`container.cache_folder`).
"""

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

from quantkit import progress
from quantkit.container import cache_folder
from quantkit.ggml.library import processor_flags

SOURCES = Path(__file__).parent
MAIN = "experts.c"
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
# Sums are as written, so that a token has the same bits whatever runs beside it.
FLAGS = ("-std=gnu11", "-O3", NATIVE, "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
GATHER = "-DGATHER=1"  # codebooks in memory are looked up by the processor's own instruction
REGISTERS = "-DREGISTERS=1024"  # codebooks of up to so many entries are permuted in registers
SLOWED = Path("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling")
LIBRARIES = ("-lm", "-lpthread")
SECONDS = 60  # that a compiler may take; it takes one or two


class Unavailable(Exception):
    """Why nothing could be compiled, in words that follow "ggml: "."""


class Compiled(NamedTuple):
    """path: of the library. by: the compiler, as it calls itself."""

    path: Path
    by: str


def compiled() -> Compiled:
    """The library for this machine, compiled if it has not been yet. `Unavailable` without a compiler that can."""
    compiler, version = _compiler()
    name = hashlib.sha256("\0".join(_depends_on(compiler, version)).encode()).hexdigest()[:32]
    base = cache_folder()
    folder = base / "quantkit" / "native" if base else Path(tempfile.mkdtemp(prefix="quantkit-native-"))
    path = folder / f"{name}.so"
    if not _whole(path):
        folder.mkdir(parents=True, exist_ok=True)
        if path.exists():
            progress.say(f"{path} is damaged; it is compiled again")
        _compile(compiler, path)
    return Compiled(path, version)


def flags() -> tuple[str, ...]:
    """FLAGS, and which lookups are fast: Intel's processors gather well, unless their microcode hides what is gathered;
    AMD's permute well."""
    try:
        text, slowed = Path("/proc/cpuinfo").read_text(), SLOWED.read_text()
    except OSError:
        return FLAGS
    if "AuthenticAMD" in text:
        return (*FLAGS, REGISTERS)
    return (*FLAGS, GATHER) if "GenuineIntel" in text and slowed.startswith("Not affected") else FLAGS


def _compiler() -> tuple[str, str]:
    """Path and version of $CC, or of the first one that there is."""
    asked = os.environ.get("CC", "")
    for name in (asked, *COMPILERS):
        if found := name and shutil.which(name):
            done = subprocess.run([found, "--version"], capture_output=True, text=True)
            if done.returncode == 0 and done.stdout:
                return found, done.stdout.splitlines()[0]
    raise Unavailable(f"no C compiler ({', '.join(COMPILERS)}) on PATH")


def _depends_on(compiler: str, version: str) -> list[str]:
    sources = [path.read_text() for path in sorted(SOURCES.iterdir()) if path.suffix in (".c", ".h")]
    return [*sources, compiler, version, *flags(), platform.machine(), *sorted(processor_flags())]


def _whole(path: Path) -> bool:
    """Whether it is there as it was compiled."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == _checksum(path).read_text()
    except (OSError, UnicodeDecodeError):
        return False


def _checksum(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _compile(compiler: str, path: Path) -> None:
    """Under another name first: several processes may do this at once. The library gets its name before its checksum
    does, so a stop between them compiles again."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [compiler, *flags(), "-o", str(made), str(SOURCES / MAIN), *LIBRARIES]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{compiler} did not compile: {error}") from error
        if done.returncode or not made.exists():
            said = next((line for line in done.stderr.splitlines() if "error" in line), f"status {done.returncode}")
            raise Unavailable(f"{compiler} did not compile: {said}")
        checksum = _checksum(made)
        checksum.write_text(hashlib.sha256(made.read_bytes()).hexdigest())
        os.replace(made, path)
        os.replace(checksum, _checksum(path))
