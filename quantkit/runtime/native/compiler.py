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

SOURCES = Path(__file__).parent
MAIN = "experts.c"
COMPILERS = ("cc", "gcc", "clang")
NATIVE = "-march=native" if platform.machine() == "x86_64" else "-mcpu=native"
# Sums are as written, so that a token has the same bits whatever runs beside it.
FLAGS = ("-std=gnu11", "-O3", NATIVE, "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")
GATHER = "-DGATHER=1"  # codebooks in memory are looked up by the processor's own instruction
REGISTERS = "-DREGISTERS=1024"  # codebooks of up to so many entries are permuted in registers
CPUINFO = Path("/proc/cpuinfo")
NAMING = {
    *("vendor_id", "cpu family", "model", "model name", "flags"),
    *("CPU implementer", "CPU architecture", "CPU variant", "CPU part", "Features"),  # of ARM
}
SLOWED = Path("/sys/devices/system/cpu/vulnerabilities/gather_data_sampling")
YOUNG = {"amx_tile", "avx512_fp16"}  # Intel's processors that have them (Sapphire Rapids and later) were never slowed
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
    """FLAGS, and which lookups are fast: Intel's processors gather well, unless their microcode hides what is gathered
    (a sandbox may not say whether it does); AMD's permute well."""
    processor = _processor()
    if "AuthenticAMD" in processor:
        return (*FLAGS, REGISTERS)
    fast = _text(SLOWED).startswith("Not affected") or not YOUNG.isdisjoint(processor.split())
    return (*FLAGS, GATHER) if fast and "GenuineIntel" in processor else FLAGS


def _processor() -> str:
    """Which processor it is and what it can do, in Linux's words; "" if it says nothing."""
    lines = _text(CPUINFO).partition("\n\n")[0].splitlines()
    return "\n".join(line for line in lines if line.partition(":")[0].strip() in NAMING)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


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
    return [*sources, compiler, version, *flags(), platform.machine(), _processor()]


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
