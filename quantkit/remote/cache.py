"""A bounded folder of checksummed byte ranges, filed under the ETag of the file they are from.

    ranges/<etag>/<begin>-<end>-<crc32>

A range carries its final name only when it is whole, and is checked against its CRC when it is first used by a process:
neither a killed run nor a bad disk leaves anything that is believed. The folder never holds more than `limit` bytes,
ranges that are being written included: room is reserved before a download begins.

Beside them a `Store` of small files, listings and shard headers, within the same bound. What one endpoint says is never
served as another's, since anyone can run a server that claims the commit and the ETags of a real repository: each has a
folder of its own (`home_of`), and nothing of ours goes into huggingface_hub's cache, which knows no endpoints.
"""

import errno
import fcntl
import hashlib
import os
import re
import shutil
import stat
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

import numpy as np
from huggingface_hub import constants

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum
from quantkit.formats.whole_file import write_whole
from quantkit.progress import say
from quantkit.remote.pieces import Range
from quantkit.sizes import both_units

NAME = re.compile(r"(\d+)-(\d+)-([0-9a-f]{8})")
READ = 1 << 24
HUB = "https://huggingface.co"
UNUSED_SHARE = 8  # what no model of this run needs may take this part of the limit
ABANDONED = 3600.0  # seconds after which an unfinished file is of a killed run
MANAGED = ("headers/*", "small/*", "models/*/*/listing.json")


class RangeCache:
    """Ranges on disk, at most `limit` bytes of them; `used` bytes are there or reserved.

    Not thread-safe by itself: its owner holds one lock around everything but `write`.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit, self.used = folder, limit, 0
        self._held: dict[Range, Path] = {}
        self._trusted: set[Range] = set()
        self._lock_fd: int | None = None

    @property
    def is_open(self) -> bool:
        """Whether the folder is this process's."""
        return self._lock_fd is not None

    def open(self, overhead: int = 0) -> Self:
        """Take the folder for this process and see what an earlier one left. QuantkitError if another one has it.

        overhead: bytes that the owner keeps elsewhere and that count too.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock_fd = _lock(self.folder / "lock")
        except BlockingIOError:
            raise QuantkitError(
                f"{self.folder}: another quantkit is using this cache; wait for it, or give this run its own HF_HOME"
            ) from None
        except OSError as error:
            raise failed(self.folder, error) from None
        self.used += overhead
        found: list[tuple[float, Range, Path]] = []
        for path in self.folder.glob("*/*"):
            match = NAME.fullmatch(path.name)
            if match and path.stat().st_size == int(match[2]) - int(match[1]):
                found.append((path.stat().st_mtime, Range(path.parent.name, int(match[1]), int(match[2])), path))
            else:
                path.unlink()  # a part of a killed run, or not ours
        for _, key, path in sorted(found, key=lambda item: (item[0], item[1])):  # the oldest first
            self._held[key] = path
            self.used += key.length
        return self

    def close(self) -> None:
        """Leave the folder to other processes. What is whole stays there; a cache is not opened twice."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def ranges(self) -> list[Range]:
        """What is there, oldest first."""
        return list(self._held)

    def has(self, key: Range) -> bool:
        """Whether the range is there, whole."""
        return key in self._held

    def reserve(self, length: int) -> bool:
        """Count `length` bytes as used if they fit."""
        if self.used + length > self.limit:
            return False
        self.used += length
        return True

    def give_back(self, length: int) -> None:
        """Undo `reserve`: nothing came of it."""
        self.used -= length

    def forget(self, key: Range) -> None:
        """Delete a range. Who is reading it keeps its open file."""
        path = self._held.pop(key)
        self._trusted.discard(key)
        path.unlink(missing_ok=True)
        self.used -= key.length

    def write(self, key: Range, fetch: Callable[[Callable[[bytes], None]], None]) -> Path:
        """Let `fetch` pour a reserved range into the folder; returns its file, for `publish`."""
        folder = self.folder / key.etag
        part = folder / f"{key.begin}-{key.end}.part"
        crc = 0
        try:
            folder.mkdir(exist_ok=True)
            with open(part, "wb") as file:

                def pour(piece: bytes) -> None:
                    nonlocal crc
                    crc = zlib.crc32(piece, crc)
                    file.write(piece)

                fetch(pour)
            path = folder / f"{key.begin}-{key.end}-{crc:08x}"
            os.replace(part, path)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise failed(self.folder, error) from None
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        return path

    def publish(self, key: Range, path: Path) -> None:
        """From now on `has` the range that `write` left in `path`."""
        self._held[key] = path
        self._trusted.add(key)

    def open_range(self, key: Range) -> tuple[int, str | None]:
        """A descriptor of its file, which the caller closes, and the CRC to check it against if nobody has yet."""
        path = self._held[key]
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return fd, None if key in self._trusted else path.name.rsplit("-", 1)[1]

    def trust(self, key: Range) -> None:
        """Note that the range was found to be sound."""
        self._trusted.add(key)


def _lock(path: Path) -> int:
    """The descriptor that holds the lock until it is closed; BlockingIOError if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    except OSError:  # a file system without locks
        say(f"{path.parent}: no locks on this file system: no second quantkit may use this cache meanwhile")
    return fd


def is_sound(fd: int, key: Range, crc: str) -> bool:
    """Whether the file has the bytes it had when it was written."""
    found, length = checksum(fd)
    return length == key.length and f"{found:08x}" == crc


def copy_range(fd: int, offset: int, out: np.ndarray) -> None:
    """Fill uint8 [n] from the file."""
    view, done = out.data, 0
    while done < len(view):
        count = os.preadv(fd, [view[done : done + READ]], offset + done)
        if count == 0:
            raise QuantkitError("a cached range is shorter than it was; run again")
        done += count


def keep(path: Path, data: bytes) -> None:
    """A small file, whole or not at all; any process may write it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, data)
    except OSError as error:
        raise failed(path.parent, error) from None


def failed(folder: Path, error: OSError) -> QuantkitError:
    """What a person can do about a folder that cannot be used."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        return QuantkitError(
            f"{folder}: the disk is full ({both_units(free)} free); make room, lower "
            "$QUANTKIT_CACHE_SIZE, or set HF_HOME to another disk"
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return QuantkitError(f"{folder}: not writable ({error.strerror}); set HF_HOME to a folder that is")
    return QuantkitError(f"{folder}: {error.strerror or error}")


def home_of(endpoint: str) -> Path:
    """The folder of everything that came from an endpoint."""
    home, endpoint = Path(constants.HF_HOME) / "quantkit", endpoint.rstrip("/")
    if endpoint == HUB:
        return home
    host = re.sub(r"[^A-Za-z0-9.-]", "_", urlsplit(endpoint).netloc)[:80]
    return home / "endpoints" / f"{host}-{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}"


def matches(data: bytes, etag: str) -> bool:
    """Whether an ETag names these bytes: git's blob id or a sha256, as the Hub has them. Others cannot be checked."""
    if len(etag) == 64:
        return hashlib.sha256(data).hexdigest() == etag
    if len(etag) == 40:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest() == etag
    return True


class Store:
    """Files by name below `folder`, at most `limit` bytes of them; may be used from many threads.

    What this run has put or found stays; of the rest the least recently used go first.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._mine: dict[Path, int] = {}
        self._lock = threading.Lock()

    @property
    def used(self) -> int:
        """Bytes on disk, those that other runs left included."""
        with self._lock:
            return sum(size for _, _, size in self._others()) + sum(self._mine.values())

    def find(self, name: str, is_right: Callable[[bytes], bool]) -> bytes | None:
        """A file's bytes if it is there and right; one that is wrong is removed."""
        path = self.folder / name
        try:
            data = path.read_bytes()
            if not is_right(data):
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
            self._claim(path, len(data))
            return data
        except FileNotFoundError:
            return None
        except OSError as error:
            raise failed(path.parent, error) from None

    def put(self, name: str, data: bytes) -> Path:
        """A file, whole or not at all; QuantkitError if this run's files do not fit the limit."""
        path = self.folder / name
        self._claim(path, len(data))
        keep(path, data)
        return path

    def _claim(self, path: Path, size: int) -> None:
        """Count a file as this run's and drop what is left of others beyond their share."""
        with self._lock:
            self._mine[path] = size
            mine = sum(self._mine.values())
            if mine > self.limit:
                del self._mine[path]
                raise QuantkitError(
                    f"{self.folder}: small files and headers of this model need more than the cache may hold "
                    f"({both_units(self.limit)}); raise $QUANTKIT_CACHE_SIZE"
                )
            others = self._others()
            rest, most = sum(size for _, _, size in others), min(self.limit // UNUSED_SHARE, self.limit - mine)
            for _, other, length in others:
                if rest <= most:
                    return
                other.unlink(missing_ok=True)
                rest -= length

    def _others(self) -> list[tuple[float, Path, int]]:
        """When used, path and bytes of what is not of this run, the oldest first."""
        found = []
        for path in (path for pattern in MANAGED for path in self.folder.glob(pattern)):
            try:
                state = path.lstat()
            except FileNotFoundError:  # another process drops files too
                continue
            being_written = path.suffix == ".tmp" and time.time() - state.st_mtime < ABANDONED
            if path not in self._mine and stat.S_ISREG(state.st_mode) and not being_written:
                found.append((state.st_mtime, path, state.st_size))
        return sorted(found)
