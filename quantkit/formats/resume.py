"""What an interrupted run left behind: whether it can be continued, and with which files."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from math import prod
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_encode import TensorInfo
from quantkit.formats.gguf_spec import SPLIT_NAME
from quantkit.formats.ledger import Coverage, Ledger, Record, Slice, ledger_path, ledger_paths, slice_of
from quantkit.formats.part_file import FileLayout, PartFile, check_space, part_path
from quantkit.formats.whole_file import sync_folder
from quantkit.progress import say

READERS = 4  # threads that read back what was recorded


def resumable(path: Path, ledger: Ledger, identity: Mapping[str, str]) -> list[Record] | None:
    """Records of what the interrupted run finished, None if there was no such run.

    QuantkitError, naming what changed, if that run had another identity.
    """
    found, records = ledger.load()
    if found is None:
        return None
    changed = sorted(key for key in {*found, *identity} if found.get(key) != identity.get(key))
    if changed:
        raise QuantkitError(
            f"{path}: cannot resume, {' and '.join(changed)} changed since that run; restart it, or use another name"
        )
    with other_ledgers(path) as others:
        for other in others:
            found, more = other.load()
            if found == dict(identity):  # else of an older run, whose first ledger is gone
                records += more
    return records


@contextmanager
def other_ledgers(path: Path) -> Iterator[list[Ledger]]:
    """Those of ranks beyond the first, locked. QuantkitError if a process is writing one."""
    ledgers: list[Ledger] = []
    try:
        for other in ledger_paths(path):
            ledgers.append(Ledger(other))
        yield ledgers
    finally:
        for ledger in ledgers:
            ledger.close()


def all_written(tensors: Iterable[TensorInfo], slices: Iterable[Slice]) -> bool:
    """Whether the slices cover every row of every tensor."""
    coverage = Coverage()
    for item in slices:
        coverage.add(*item)
    return all(coverage.covers(tensor.name, 0, prod(tensor.shape[:-1])) for tensor in tensors)


def intact(
    path: Path,
    ledger: Ledger,
    records: Sequence[Record],
    tensors: Mapping[str, TensorInfo],
    parts: Mapping[str, PartFile],
) -> list[Record]:
    """Those records whose bytes are what was written: after a crash of a machine or of its disk they need not be.

    parts: of each tensor. What is not intact is said, and the ledger then holds the rest, as if it had never been
    written. Everything is read once, 3 GB a second and thread where the disk gives them.
    """

    def holds(record: Record) -> bool:
        name, start, stop, crc = record
        if name not in tensors or stop > prod(tensors[name].shape[:-1]):
            return False
        row_bytes, part = tensors[name].row_bytes, parts[name]
        return part.holds(part.layout.offsets[name] + start * row_bytes, (stop - start) * row_bytes, crc)

    records = list({slice_of(record): record for record in records}.values())  # the last to be written holds
    with ThreadPoolExecutor(READERS) as pool:
        good = [record for record, whole in zip(records, pool.map(holds, records), strict=True) if whole]
    if len(good) < len(records):
        say(f"{path}: {len(records) - len(good)} of {len(records)} recorded slices are damaged; they are made again")
        identity, _ = ledger.load()
        with other_ledgers(path) as others:
            ledger.clear()
            ledger.start(identity or {})
            ledger.add(good)
            for other in others:
                other.remove()
    return good


def old_parts(layouts: Sequence[FileLayout], complete: bool) -> list[PartFile]:
    """The interrupted run's files, opened."""
    parts: list[PartFile] = []
    try:
        for item in layouts:
            parts.append(PartFile.reopen(item, complete))
    except BaseException:
        for part in parts:
            part.close()
        raise
    return parts


def fresh_parts(
    path: Path, layouts: Sequence[FileLayout], ledger: Ledger, identity: Mapping[str, str]
) -> list[PartFile]:
    """New files, reserved on disk, after removing what an earlier run of that name left; and the ledger begun.

    If the disk cannot hold them all, none is left.
    """
    with other_ledgers(path) as others:
        ledger.clear()
        _remove_parts(path)
        for other in others:
            other.remove()
    check_space(path.parent, layouts)
    parts: list[PartFile] = []
    try:
        for item in layouts:
            parts.append(PartFile.create(item))
        sync_folder(path.parent)
        ledger.start(identity)
    except BaseException:
        for part in parts:
            part.close()
        for item in layouts:
            part_path(item).unlink(missing_ok=True)
        raise
    return parts


def discard(path: Path) -> None:
    """Remove what an interrupted run of the model `path` left. QuantkitError if another process is writing it."""
    ledger = Ledger(ledger_path(path))
    try:
        with other_ledgers(path) as others:
            _remove_parts(path)
            for each in (ledger, *others):
                each.remove()
    finally:
        ledger.close()


def begun(path: Path) -> Mapping[str, str]:
    """The identity of the run that the model's ledger is of; empty if there is none, or it cannot be read."""
    try:
        with open(ledger_path(path), "rb") as file:
            found = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def forget(path: Path) -> None:
    """The ledgers of a model that is complete, if they were kept."""
    for ledger in (ledger_path(path), *ledger_paths(path)):
        ledger.unlink(missing_ok=True)


def _remove_parts(path: Path) -> None:
    for old in path.parent.glob("*.gguf.part"):
        if _belongs(old.name.removesuffix(".part"), path):
            old.unlink()


def existing_files(path: Path) -> list[Path]:
    """Existing finished files of the model `path`: itself, and its splits however many they are."""
    return sorted(file for file in path.parent.glob("*.gguf") if _belongs(file.name, path))


def _belongs(name: str, path: Path) -> bool:
    split = SPLIT_NAME.fullmatch(name)
    return name == path.name or (split is not None and split["stem"] == path.name.removesuffix(".gguf"))
