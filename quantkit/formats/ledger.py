"""Which slices of a part file are safely on disk: an append-only text file beside it, so that a rerun can go on.

Each rank of a run appends to a file of its own (`X.gguf.part.ledger`, `X.gguf.part.ledger.1`, ...); what was done is
what all of them say, however many ranks there are now.
"""

import fcntl
import glob
import json
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_whole

Slice = tuple[str, int, int]
"""Tensor name, first row, row after the last."""

Record = tuple[str, int, int, int]
"""A slice that is on disk, and the CRC-32 of its bytes."""


class Coverage:
    """Rows written so far, per tensor, as disjoint sorted ranges."""

    def __init__(self) -> None:
        self._ranges: dict[str, list[tuple[int, int]]] = {}

    def add(self, name: str, start: int, stop: int) -> None:
        """Note rows start:stop of a tensor as written."""
        ranges = self._ranges.setdefault(name, [])
        touching = [r for r in ranges if r[0] <= stop and r[1] >= start]
        rest = [r for r in ranges if r[0] > stop or r[1] < start]
        merged = (min([start, *(r[0] for r in touching)]), max([stop, *(r[1] for r in touching)]))
        self._ranges[name] = sorted([*rest, merged])

    def covers(self, name: str, start: int, stop: int) -> bool:
        """Whether all rows start:stop were noted."""
        ranges = self._ranges.get(name, [])
        at = bisect_right(ranges, (start, float("inf"))) - 1
        return at >= 0 and ranges[at][0] <= start and ranges[at][1] >= stop


class Ledger:
    """The file. Its first line is the identity of the run, every other line one finished slice.

    Opening locks it: a second process that would write the same model gets a QuantkitError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise QuantkitError(f"{path}: cannot write here ({error.strerror})") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._fd)
            raise QuantkitError(f"{path}: another process is writing this model") from None
        except OSError:
            pass  # a file system without locks: nothing to be had

    def load(self) -> tuple[dict[str, str] | None, list[Record]]:
        """Identity and records; (None, []) if no run got far enough to be resumed.

        A last line without its newline is from a crash in mid-write: it is ignored and cut off.
        """
        with open(self._fd, "rb", closefd=False) as file:
            file.seek(0)
            text = file.read()
        whole = text.rfind(b"\n") + 1
        os.ftruncate(self._fd, whole)
        lines = text[:whole].splitlines()
        if not lines:
            return None, []
        try:
            identity = json.loads(lines[0])
            records = [_record(json.loads(line)) for line in lines[1:]]
            if not isinstance(identity, dict):
                raise ValueError
        except (ValueError, RecursionError):
            raise QuantkitError(f"{self.path}: damaged, so this run cannot be resumed; restart it") from None
        return identity, records

    def clear(self) -> None:
        """Forget everything."""
        os.ftruncate(self._fd, 0)

    def start(self, identity: Mapping[str, str]) -> None:
        """Begin a run in an empty ledger."""
        self._append(json.dumps(dict(identity)) + "\n")

    def add(self, records: Iterable[Record]) -> None:
        """Append records of slices whose data are already synced; they count after this returns.

        QuantkitError if they cannot be appended; the ledger is then as it was before.
        """
        self._append("".join(json.dumps(item) + "\n" for item in records))

    def close(self, discard_empty: bool = False) -> None:
        """Unlock. `discard_empty`: also remove the file if nothing was ever noted in it."""
        if discard_empty and os.fstat(self._fd).st_size == 0:
            self.remove()
        os.close(self._fd)

    def remove(self) -> None:
        """Delete the file; the lock stays until `close`."""
        self.path.unlink(missing_ok=True)

    def _append(self, text: str) -> None:
        data = text.encode()
        end = os.lseek(self._fd, 0, os.SEEK_END)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, end)  # half a line, with others after it, would make the whole ledger unreadable
            raise QuantkitError(f"{self.path}: writing failed ({error.strerror}); run again to resume") from None


def ledger_path(model: Path, rank: int = 0) -> Path:
    """The ledger that this rank of a run that makes `model` writes."""
    return model.with_name(f"{model.name}.part.ledger" + (f".{rank}" if rank else ""))


def ledger_paths(model: Path) -> list[Path]:
    """Ledgers of ranks 1, 2, ... that runs left behind, as many as they were."""
    first = ledger_path(model)
    return sorted(path for path in first.parent.glob(f"{glob.escape(first.name)}.*") if path.suffix[1:].isdecimal())


def on_record(path: Path) -> Iterator[Slice]:
    """The slices of a ledger that another process may be writing, without its lock: as far as it can be read. A line
    that is being written is not there yet."""
    try:
        lines = read_whole(path, "record").split(b"\n")[1:-1]
        for line in lines:
            yield slice_of(_record(json.loads(line)))
    except (QuantkitError, ValueError, RecursionError):
        return


def slice_of(record: Record) -> Slice:
    """Which rows it is about."""
    return record[:3]


def _record(value: object) -> Record:
    if not (isinstance(value, list) and list(map(type, value)) == [str, int, int, int] and 0 <= value[1] <= value[2]):
        raise ValueError
    return value[0], value[1], value[2], value[3]
