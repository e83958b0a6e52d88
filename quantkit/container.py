"""How much of the machine is this process's: what the host has, cut by control groups (v1 and v2), by limits of the
process (`ulimit`), and by the cores that it may run on; and where it may keep what it compiles.

Limits are read from /proc and /sys below a root, so that tests can lay out another machine.
"""

import contextlib
import logging
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

log = logging.getLogger(__name__)

UNLIMITED_V1 = 1 << 62  # cgroup v1 says "no limit" by a number near 2^63


@dataclass(frozen=True)
class Container:
    """Sizes in bytes."""

    root: Path = Path("/")

    def ram(self) -> int:
        """What this process can have in all, if nobody else took any."""
        host = self._meminfo.get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        groups = [limit for limit, _ in self._memory_groups()]
        return min([host, *groups, *(limit for limit, _ in self._process_limits())])

    def free_ram(self) -> int:
        """What it can still take without swapping or being killed."""
        info = self._meminfo
        host = info.get("MemAvailable", info.get("MemFree", 0) + info.get("Cached", 0)) or self.ram()
        left = [limit - used for limit, used in (*self._memory_groups(), *self._process_limits())]
        return max(0, min([host, *left]))

    def cores(self) -> int:
        """Threads that can run at once: hardware threads of the affinity mask (cpusets are in it), and no more than the
        quota of CPU time, rounded up."""
        return self._within_quotas(len(self._affinity()))

    def physical_cores(self) -> int:
        """The same, hyperthreads of one core counted once: they share the units that multiply."""
        return self._within_quotas(len(self.one_of_each_core()))

    def one_of_each_core(self) -> list[int]:
        """Of the hardware threads of the affinity mask the first one of each core."""
        first: dict[str, int] = {}
        for cpu in sorted(self._affinity()):
            siblings = self._text(f"sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").strip()
            first.setdefault(siblings or str(cpu), cpu)
        return list(first.values())

    def _within_quotas(self, n: int) -> int:
        return max(1, min([n, *(math.ceil(quota) for quota in self._cpu_quotas())]))

    def _text(self, path: str | Path) -> str:
        """A file's text below the root, "" if there is none that can be read."""
        try:
            return (self.root / str(path).lstrip("/")).read_text(errors="replace")
        except OSError:
            return ""

    def _number(self, path: Path) -> int | None:
        text = self._text(path).strip()
        return int(text) if text.isdecimal() else None  # not: "max", and -1

    @cached_property
    def _meminfo(self) -> dict[str, int]:
        rows = (line.split() for line in self._text("proc/meminfo").splitlines())
        return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1 and row[1].isdecimal()}

    def _affinity(self) -> set[int]:
        listed = _field(self._text("proc/self/status"), "Cpus_allowed_list")
        spans = [part.split("-") for part in listed.split(",") if part]
        allowed = {cpu for span in spans for cpu in range(int(span[0]), int(span[-1]) + 1)}
        return allowed or os.sched_getaffinity(0)

    def _groups(self, controller: str) -> Iterator[tuple[bool, Path]]:
        """(whether it is of version 2, folder) of every control group that limits this process, its own first.

        A mount shows the hierarchy from some group on, which in a container is often the container's own."""
        own = dict(self._own_groups())
        for line in self._text("proc/self/mountinfo").splitlines():
            before, _, after = line.partition(" - ")
            fields, kind = before.split(), after.split()
            if len(fields) < 5 or len(kind) < 3 or not kind[0].startswith("cgroup"):
                continue
            version_2 = kind[0] == "cgroup2"
            path = own.get("" if version_2 else controller)
            if path is None or not (version_2 or controller in kind[2].split(",")):
                continue
            top, shown = Path(_unescaped(fields[4])), _unescaped(fields[3])
            inside = Path(os.path.relpath(path, shown))
            folder = top if ".." in inside.parts else top / inside
            yield from ((version_2, each) for each in (folder, *folder.parents) if each.is_relative_to(top))

    def _own_groups(self) -> Iterator[tuple[str, str]]:
        """(controller, path of this process's group); the controller of version 2 is ""."""
        for line in self._text("proc/self/cgroup").splitlines():
            number, _, rest = line.partition(":")
            names, _, path = rest.partition(":")
            yield from ((name, path) for name in ([""] if number == "0" else names.split(",")))

    def _memory_groups(self) -> Iterator[tuple[int, int]]:
        """(limit, what is used of it and cannot be reclaimed) of each control group that has one."""
        for version_2, folder in self._groups("memory"):
            names = ("memory.max", "memory.high") if version_2 else ("memory.limit_in_bytes",)
            stat = self._text(folder / "memory.stat")
            found = [self._number(folder / name) for name in names]
            if not version_2:  # its ancestors' limits, which a container may not see
                found.append(_int(_field(stat, "hierarchical_memory_limit")))
            limits = [limit for limit in found if limit is not None and limit < UNLIMITED_V1]
            if limits:
                used = self._number(folder / ("memory.current" if version_2 else "memory.usage_in_bytes")) or 0
                total = "" if version_2 else "total_"
                cached = sum(_int(_field(stat, f"{total}{which}_file")) or 0 for which in ("inactive", "active"))
                yield min(limits), max(0, used - cached)

    def _process_limits(self) -> Iterator[tuple[int, int]]:
        """(limit, what is used of it) of `ulimit -v` and `ulimit -d`."""
        limits, status = self._text("proc/self/limits"), self._text("proc/self/status")
        for name, used in (("Max address space", "VmSize"), ("Max data size", "VmData")):
            limit = _int(_field(limits, name))
            if limit is not None:
                yield limit, (_int(_field(status, used)) or 0) * 1024

    def _cpu_quotas(self) -> Iterator[float]:
        """Cores' worth of time that each control group allows."""
        for version_2, folder in self._groups("cpu"):
            if version_2:
                quota, _, period = self._text(folder / "cpu.max").strip().partition(" ")
            else:
                quota, period = (self._text(folder / f"cpu.cfs_{name}_us").strip() for name in ("quota", "period"))
            if quota.isdecimal() and period.isdecimal() and int(period):
                yield int(quota) / int(period)


def _field(text: str, name: str) -> str:
    """The first word after a line's name, "" if there is no such line."""
    for line in text.splitlines():
        if line.startswith(name) and line[len(name) : len(name) + 1] in (":", " "):
            return next(iter(line[len(name) :].lstrip(":").split()), "")
    return ""


def _int(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _unescaped(path: str) -> str:
    """Spaces in mountinfo are octal."""
    return path.replace("\\040", " ").replace("\\134", "\\")


@cache
def writable_caches() -> bool:
    """Before numba, Triton or matplotlib is loaded: what they compile and keep goes where this process can write, which
    in a container need not be its home. Numba loads what lies there as code, so a folder among other users' is taken
    only if it is this user's alone. False, once said, if there is no such folder."""
    home, usual = Path(os.path.expanduser("~")), _usual_caches()
    given = [Path(folder) for folder in [os.environ.get("NUMBA_CACHE_DIR")] if folder]
    if not any(map(_writable, given)):
        if not (base := cache_folder()):
            log.warning(
                "no folder can be written to keep compiled kernels in, so each run compiles anew; set XDG_CACHE_HOME"
            )
            return False
        if base != usual or given:
            os.environ["NUMBA_CACHE_DIR"] = str(base / "quantkit-numba")
            if numba := sys.modules.get("numba"):
                numba.config.CACHE_DIR = os.environ["NUMBA_CACHE_DIR"]
        if not os.access(home, os.W_OK):
            os.environ.setdefault("TRITON_CACHE_DIR", str(base / "quantkit-triton"))
            os.environ.setdefault("MPLCONFIGDIR", str(base / "quantkit-matplotlib"))
    return True


def cache_folder() -> Path | None:
    """Where files can be kept that a later run may have to make again: the user's folder for that, else one of their
    own among the temporary ones; None if neither can be written."""
    return next((folder for folder in (_usual_caches(), _temporary()) if folder and _writable(folder)), None)


def _usual_caches() -> Path:
    if not os.path.isabs(os.environ.get("XDG_CACHE_HOME", "/")):  # invalid, says its specification; numba obeys it
        del os.environ["XDG_CACHE_HOME"]
    return Path(os.environ.get("XDG_CACHE_HOME", Path(os.path.expanduser("~")) / ".cache"))


def _writable(folder: Path) -> bool:
    """Whether files can be made in a folder, which is made if need be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


def _temporary() -> Path | None:
    """This user's own folder among the temporary ones; None if somebody else has the name, or may write there."""
    try:
        folder = Path(tempfile.gettempdir()) / f"quantkit-{os.geteuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        there = folder.lstat()
    except OSError:
        return None
    own = stat.S_ISDIR(there.st_mode) and there.st_uid == os.geteuid() and not there.st_mode & 0o022
    return folder if own else None
