"""`X.gguf.part`: a file of known size that is filled in any order and gets its final name when it is complete."""

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum
from quantkit.formats.whole_file import make_folders, rename

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class FileLayout:
    """One file to be. path: its final name. header: its first bytes, padded. size: all of its bytes.

    offsets: tensor name -> first byte, from the start of the file.
    """

    path: Path
    header: bytes
    size: int
    offsets: dict[str, int]


class PartFile:
    """One file of a model being written; `pwrite` from any thread."""

    def __init__(self, layout: FileLayout, path: Path, fd: int) -> None:
        self.layout, self.path, self._fd = layout, path, fd

    @classmethod
    def create(cls, layout: FileLayout) -> Self:
        """A new part: zeros, reserved on disk, with its header. QuantkitError if the disk cannot hold it."""
        path = part_path(layout)
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise QuantkitError(f"{path}: cannot write ({error.strerror})") from None
        part = cls(layout, path, fd)
        try:
            _reserve(fd, layout.size)
            part._pwrite(layout.header, 0)
            os.fsync(fd)
        except OSError as error:
            part.close()
            raise _failed(path, layout.size, error) from None
        return part

    @classmethod
    def reopen(cls, layout: FileLayout, complete: bool) -> Self:
        """The part that an interrupted run left; QuantkitError if it is not what that run made.

        complete: every row is written, so the file may have its final name already.
        """
        path = part_path(layout)
        if complete and not path.exists():
            path = layout.path
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise QuantkitError(f"{path}: cannot resume without it ({error.strerror}); restart the run") from None
        part = cls(layout, path, fd)
        if os.fstat(fd).st_size != layout.size or os.pread(fd, len(layout.header), 0) != layout.header:
            part.close()
            raise QuantkitError(f"{path}: not the file that was interrupted; restart the run")
        return part

    def write(self, offset: int, data: np.ndarray) -> None:
        """`data`, contiguous uint8, at `offset` from the start of the file."""
        try:
            self._pwrite(data.data.cast("B"), offset)
        except OSError as error:
            raise _failed(self.path, self.layout.size, error) from None

    def holds(self, offset: int, n_bytes: int, crc: int) -> bool:
        """Whether the bytes there have this CRC-32. QuantkitError if they cannot be read."""
        try:
            return checksum(self._fd, offset, offset + n_bytes) == (crc, n_bytes)
        except OSError as error:
            raise QuantkitError(f"{self.path}: reading failed ({error.strerror})") from None

    def sync(self) -> None:
        """Return when everything written so far is on disk."""
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise _failed(self.path, self.layout.size, error) from None

    def rename(self) -> None:
        """To the final name, durably."""
        try:
            rename(self.path, self.layout.path)
        except OSError as error:
            raise _failed(self.layout.path, self.layout.size, error) from None

    def close(self) -> None:
        """Close the file, under whatever name it has."""
        os.close(self._fd)

    def _pwrite(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + (1 << 30)], offset + done)


def part_path(layout: FileLayout) -> Path:
    """Its name while it is being written."""
    return layout.path.with_name(layout.path.name + ".part")


def make_folder(folder: Path) -> None:
    """The folder and its parents; QuantkitError if they cannot be made."""
    try:
        make_folders(folder)
    except OSError as error:
        raise QuantkitError(f"{folder}: cannot make this folder ({error.strerror})") from None


def check_space(folder: Path, files: Sequence[FileLayout]) -> None:
    """QuantkitError, before anything is written, if the folder's disk has not the bytes of all files free."""
    need = sum(file.size for file in files)
    stats = os.statvfs(folder)
    free = stats.f_bavail * stats.f_frsize
    if need > free:
        raise QuantkitError(f"{folder}: {need:,} bytes are needed, {free:,} are free")


def _reserve(fd: int, size: int) -> None:
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise
        os.ftruncate(fd, size)  # the file system cannot reserve; a full disk then shows in `write`


def _failed(path: Path, size: int, error: OSError) -> QuantkitError:
    if error.errno in NO_SPACE:
        return QuantkitError(f"{path.parent}: no room for {path.name}, {size:,} bytes ({error.strerror})")
    return QuantkitError(f"{path}: writing failed ({error.strerror})")
