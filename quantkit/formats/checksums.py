"""Checksums of files that are being read anyway: each piece soon after somebody else has read it."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum, open_regular


class RunningChecksums:
    """CRC-32 of files, from their beginnings on, by a thread of its own; to be left as a context. What was read a
    moment ago lies in the system's memory, so that the disk is asked once for both."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.fds = {file: open_regular(file) for file in files}
        self.asked = dict.fromkeys(files, 0)
        self.found = dict.fromkeys(files, (0, 0))  # CRC-32, of so many bytes
        self.pool = ThreadPoolExecutor(1)  # one: a file's pieces come in order

    def upto(self, file: Path, end: int) -> None:
        """All before `end` may be read now."""
        if end > self.asked[file]:
            self.asked[file] = end
            self.pool.submit(self._read, file, end)

    def finish(self) -> list[int]:
        """Of each whole file; reads what is left of them. QuantkitError if one cannot be read."""
        for file in self.fds:
            self.pool.submit(self._read, file, None).result()
        return [crc for crc, _ in self.found.values()]

    def _read(self, file: Path, end: int | None) -> None:
        crc, at = self.found[file]
        try:
            crc, n = checksum(self.fds[file], at, end, crc)
        except OSError as error:
            raise QuantkitError(f"{file}: reading failed behind byte {at:,} ({error.strerror})") from None
        self.found[file] = crc, at + n

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.pool.shutdown(cancel_futures=True)
        for fd in self.fds.values():
            os.close(fd)
