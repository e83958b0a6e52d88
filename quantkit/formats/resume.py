"""What an interrupted run left behind: whether it can be continued, and with which files."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_encode import TensorInfo
from quantkit.formats.gguf_spec import SPLIT_NAME
from quantkit.formats.ledger import Coverage, Ledger, Slice, ledger_path, ledger_paths
from quantkit.formats.part_file import FileLayout, PartFile, check_space, part_path, sync_folder


def resumable(path: Path, ledger: Ledger, identity: Mapping[str, str]) -> list[Slice] | None:
    """Slices that the interrupted run finished, None if there was no such run.

    QuantkitError, naming what changed, if that run had another identity.
    """
    found, slices = ledger.load()
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
                slices += more
    return slices


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
