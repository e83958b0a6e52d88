"""Where bytes come from: shards by position, in a folder here or a Hub in `quantkit.remote`; small files whole."""

import errno
import os
import stat
import threading
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from quantkit.errors import QuantkitError

MAX_READ = 1 << 30  # Linux reads at most 2 GiB - 4 KiB in one call

Kind = Literal["config", "index", "tokenizer", "plan", "recipe", "record", "text"]
MOST: Mapping[Kind, int] = {
    "config": 4 << 20,
    "index": 256 << 20,  # R1's has 9 MB
    "tokenizer": 256 << 20,  # R1's has 8 MB
    "plan": 256 << 20,
    "recipe": 1 << 20,
    "record": 256 << 20,  # JSON that commands leave: scores, provenance, certificates
    "text": 1 << 30,
}
"""Bytes that a file of each kind may have: a hundred times what such files have, and nothing that fills a memory."""
READ = 1 << 24


class ByteSource(Protocol):
    """Named files of a checkpoint, read by position; every method may be called from any thread."""

    def names(self) -> list[str]:
        """File names, sorted."""
        ...

    def size(self, file: str) -> int:
        """Bytes of a file; QuantkitError if there is no such file."""
        ...

    def read(self, file: str, offset: int, length: int, what: str) -> np.ndarray:
        """uint8 [length]; QuantkitError naming `file` and `what` if not all of it can be had."""
        ...

    def schedule(self, kept: "Extents", layers: Sequence["Extents"]) -> None:
        """What will be read: `kept` at any time, `layers` one after the other, perhaps several times over."""
        ...

    def close(self) -> None:
        """Give back descriptors and connections; a later read opens them again."""
        ...


Extents = Sequence[tuple[str, int, int]]
"""(file, begin, end) of tensors, in the order in which they are wanted."""


class FolderSource:
    """Files of one local folder.

    Reads with `preadv` into a fresh buffer. Not mmap: mapped pages count in the resident set of the process, and peak
    memory is to be one expert, whatever the page cache holds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def names(self) -> list[str]:
        """All names in the folder, sorted; QuantkitError if it cannot be listed."""
        try:
            return sorted(entry.name for entry in os.scandir(self.folder))
        except OSError as error:
            raise QuantkitError(f"{self.folder}: cannot list this folder ({error.strerror})") from None

    def size(self, file: str) -> int:
        """Bytes of a file; QuantkitError if there is no such file."""
        return os.fstat(self._fd(file)).st_size

    def read(self, file: str, offset: int, length: int, what: str) -> np.ndarray:
        """uint8 [length]; QuantkitError naming `file` and `what` if the file ends before, or cannot be read."""
        buffer = np.empty(length, np.uint8)
        view, fd = buffer.data, self._fd(file)
        done = 0
        while done < length:
            try:
                count = os.preadv(fd, [view[done : done + MAX_READ]], offset + done)
            except OSError as error:
                raise QuantkitError(
                    f"{self.folder / file}: reading {what} failed at byte {offset + done} ({error.strerror})"
                ) from None
            if count == 0:
                raise QuantkitError(f"{self.folder / file}: truncated: {what} ends {length - done} bytes too early")
            done += count
        return buffer

    def schedule(self, kept: Extents, layers: Sequence[Extents]) -> None:
        """Nothing to do: the page cache reads ahead."""

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            for fd in self._fds.values():
                os.close(fd)
            self._fds.clear()

    def _fd(self, file: str) -> int:
        with self._lock:
            if file not in self._fds:
                self._fds[file] = open_regular(self.folder / file)
            return self._fds[file]


def open_regular(path: Path) -> int:
    """Read-only descriptor of a regular file; QuantkitError for anything else (opening a FIFO would hang)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise QuantkitError(f"{path}: no such file") from None
        raise QuantkitError(f"{path}: cannot open ({error.strerror})") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise QuantkitError(f"{path}: not a regular file")
    return fd


def checksum(fd: int, start: int = 0, stop: int | None = None, before: int = 0) -> tuple[int, int]:
    """CRC-32 of a file's bytes from `start` to `stop` (None: its end), and how many there were. before: the CRC-32 of
    bytes that it goes on from. May raise OSError."""
    found, at = before, start
    while data := os.pread(fd, READ if stop is None else min(READ, stop - at), at):
        found, at = zlib.crc32(data, found), at + len(data)
    return found, at - start


def read_whole(path: Path, kind: Kind) -> bytes:
    """All bytes of a file that a person or a model folder names. QuantkitError, naming `path`, if it is missing, no
    regular file (a FIFO would hang, a device never end), larger than its kind ever is, or cannot be read."""
    most, parts, size = MOST[kind], [], 0
    fd = open_regular(path)
    try:
        while size <= most and (part := os.read(fd, READ)):
            parts.append(part)
            size += len(part)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot read ({error.strerror})") from None
    finally:
        os.close(fd)
    if size > most:
        raise QuantkitError(f"{path}: larger than {most:,} bytes; not a {kind} file")
    return b"".join(parts)


def read_text(path: Path, kind: Kind) -> str:
    """As `read_whole`, of UTF-8; QuantkitError for anything else."""
    try:
        return read_whole(path, kind).decode()
    except UnicodeDecodeError as error:
        raise QuantkitError(f"{path}: not UTF-8 text (byte {error.start})") from None


def read_text_file(path: Path, kind: Kind = "config") -> bytes:
    """A small file of a model folder, as `read_whole`."""
    if not os.path.lexists(path):
        models = sorted(one for one in path.parent.glob("*.gguf") if not one.name.startswith("imatrix"))
        hint = f"for the model in {models[0]} give that file" if models else f"is {path.parent} a model folder?"
        raise QuantkitError(f"{path}: no such file ({hint})")
    return read_whole(path, kind)
