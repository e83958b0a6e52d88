"""Writing GGUF: headers and offsets first, then slices in any order, resumable, final names only when complete."""

import threading
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_encode import TensorInfo
from quantkit.formats.gguf_layout import digest, layout
from quantkit.formats.gguf_values import Value
from quantkit.formats.ledger import Coverage, Ledger, Record, Slice, ledger_path, slice_of
from quantkit.formats.part_file import FileLayout, PartFile, make_folder, part_path
from quantkit.formats.resume import all_written, existing_files, forget, fresh_parts, intact, old_parts, resumable
from quantkit.formats.whole_file import sync_folder

SYNC_BYTES = 256 << 20  # a crash loses at most this much work ...
SYNC_SECONDS = 10.0  # ... or this much time


class GGUFWriter:
    """A GGUF model, in one file or several, that is being written.

    Slices go to `NAME.gguf.part`; those that are safely on disk are noted in `NAME.gguf.part.ledger`, so that the same
    call after a crash reads them back and goes on where the first stopped. Leaving the `with` block with every row
    written renames the files; leaving it early keeps them for the next run. `write` and `done` may be called from many
    threads.

    Several ranks open the same model together, and each writes what it likes; `meet` tells each what the others wrote.

    files: the final paths. n_bytes: of all files together. keeps_ledger: whether it stays beside the finished files.
    """

    def __init__(
        self,
        path: Path,
        tensors: Sequence[TensorInfo],
        layouts: Sequence[FileLayout],
        parts: Sequence[PartFile],
        ledger: Ledger,
        finished: Iterable[Slice],
    ) -> None:
        self.keeps_ledger = False
        self.path, self.files = path, [item.path for item in layouts]
        self.n_bytes = sum(item.size for item in layouts)
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self._parts, self._ledger, self._coverage = parts, ledger, Coverage()
        self._file_of = {name: part for part in parts for name in part.layout.offsets}
        self._unsynced: list[Record] = []
        self._untold: list[Slice] = []  # to the other ranks
        self._unsynced_bytes, self._synced_at = 0, time.monotonic()
        self._lock, self._sync_lock = threading.Lock(), threading.Lock()
        for item in finished:
            self._coverage.add(*item)

    @classmethod
    def open(
        cls,
        path: Path | str,
        tensors: Sequence[TensorInfo],
        metadata: Mapping[str, Value],
        *,
        fingerprint: Mapping[str, str],
        split_max_bytes: int | None = None,
        restart: bool = False,
        overwrite: bool = False,
        keep_ledger: bool = False,
    ) -> Self:
        """Begin `path`, or resume it if an interrupted run left its parts and ledger.

        tensors: in file order. fingerprint: named digests of what the bytes depend on (checkpoint, imatrix, plan):
        resuming under another one is a QuantkitError that names the difference, unless `restart` throws the old parts
        away. A finished model of that name is replaced only with `overwrite`, and only once the new one is complete.
        keep_ledger: leave the ledger beside the finished files, for a caller that `forget`s it later.
        QuantkitError too if the folder has no room, or another process writes there.
        """
        path = Path(path)
        if path.suffix != ".gguf":
            raise QuantkitError(f"{path}: the name of a GGUF file must end in .gguf")
        layouts = layout(path, tensors, metadata, split_max_bytes)
        identity = {**fingerprint, "layout": digest(layouts)}
        make_folder(path.parent)
        ranks.same(identity, "job")
        if ranks.index():
            return cls(path, tensors, layouts, *cls._follow(path, layouts, identity))
        ledger = Ledger(ledger_path(path))
        try:
            finished = None if restart else resumable(path, ledger, identity)
            complete = finished is not None and all_written(tensors, map(slice_of, finished))
            # Final names beside a complete ledger are from a run that was cut off while it renamed: its own files.
            if not overwrite and not complete and (existing := existing_files(path)):
                raise QuantkitError(f"{existing[0]} exists already; --overwrite replaces it, or choose another name")
            if finished is None:
                parts = fresh_parts(path, layouts, ledger, identity)
            else:
                parts = old_parts(layouts, complete)
                places = {name: part for part in parts for name in part.layout.offsets}
                finished = intact(path, ledger, finished, {t.name: t for t in tensors}, places)
        except BaseException:
            ledger.close(discard_empty=True)
            raise
        slices = [slice_of(record) for record in finished or []]
        ranks.agree(lambda: (slices, complete))
        writer = cls(path, tensors, layouts, parts, ledger, slices)
        writer.keeps_ledger = keep_ledger
        return writer

    @staticmethod
    def _follow(
        path: Path, layouts: Sequence[FileLayout], identity: Mapping[str, str]
    ) -> tuple[list[PartFile], Ledger, list[Slice]]:
        """Open what rank 0 has begun or found; what is done of it is what rank 0 says."""
        finished, complete = ranks.agree(lambda: None)
        ledger, parts = Ledger(ledger_path(path, ranks.index())), []
        try:
            if not any(part_path(item).exists() or item.path.exists() for item in layouts):
                raise QuantkitError(
                    f"{path.parent}: rank {ranks.index()} does not see the file that rank 0 began "
                    "there; all ranks must work in one shared folder"
                )
            parts = old_parts(layouts, complete)
            if ledger.load()[0] != identity:
                ledger.clear()
                ledger.start(identity)
        except BaseException:
            for part in parts:
                part.close()
            ledger.close(discard_empty=True)
            raise
        return parts, ledger, [(name, start, stop) for name, start, stop in finished]

    def write(self, name: str, row_start: int, data: np.ndarray) -> None:
        """Rows of one tensor, encoded.

        row_start: first row; all but the last dimension count as rows, so expert e of a stack starts at e * n_out.
        data: uint8 [rows, row_bytes] (or [..., row_bytes]).
        """
        tensor = self._tensor(name)
        rows = _rows(tensor, row_start, data)
        part = self._file_of[name]
        part.write(part.layout.offsets[name] + row_start * tensor.row_bytes, rows)
        crc = zlib.crc32(rows.data)
        with self._lock:
            self._coverage.add(name, row_start, row_start + len(rows))
            self._unsynced.append((name, row_start, row_start + len(rows), crc))
            if ranks.count() > 1:
                self._untold.append(slice_of(self._unsynced[-1]))
            self._unsynced_bytes += rows.nbytes
            due = self._unsynced_bytes >= SYNC_BYTES or time.monotonic() - self._synced_at >= SYNC_SECONDS
        if due and self._sync_lock.acquire(blocking=False):  # one thread syncs, the others go on writing
            try:
                self._sync()
            finally:
                self._sync_lock.release()

    def done(self, name: str, row_start: int, row_stop: int) -> bool:
        """Whether these rows were written, in this run or in one that it resumes."""
        self._tensor(name)
        with self._lock:
            return self._coverage.covers(name, row_start, row_stop)

    def pending(self, name: str, slices: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those of the (row_start, row_stop) that still have to be written."""
        return [(start, stop) for start, stop in slices if not self.done(name, start, stop)]

    def sync(self) -> None:
        """Everything written so far is on disk and in the ledger when this returns.

        Threads that call it together share one sync: those that wait find their slices recorded.
        """
        with self._sync_lock:
            self._sync()

    def meet(self) -> None:
        """`sync` of all ranks together: after it, what any of them wrote before is `done` for all."""
        self.sync()
        with self._lock:
            told, self._untold = self._untold, []
        for slices in ranks.gather(told):
            with self._lock:
                for name, start, stop in slices:
                    self._coverage.add(name, start, stop)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._keep()
        finally:
            for part in self._parts:
                part.close()
            self._ledger.close()

    def _finish(self) -> None:
        self.meet()
        if ranks.index() == 0:
            self._publish()
        ranks.barrier()

    def _publish(self) -> None:
        for tensor in self._tensors.values():
            if not self._coverage.covers(tensor.name, 0, prod(tensor.shape[:-1])):
                raise QuantkitError(f"{self.path}: tensor {tensor.name!r} is not all written; run again to resume")
        for part in self._parts:
            part.sync()
        for part in self._parts:
            part.rename()
        for stale in set(existing_files(self.path)) - set(self.files):  # splits of what it replaces
            stale.unlink()
        sync_folder(self.path.parent)
        if not self.keeps_ledger:
            forget(self.path)

    def _keep(self) -> None:
        """Save what can be saved for the next run; the error that ended this one is the one to report."""
        try:
            with self._sync_lock:
                self._sync()
        except (QuantkitError, OSError):
            pass

    def _sync(self) -> None:
        """Data to disk first, then the ledger lines that vouch for them. Called with `_sync_lock` held."""
        with self._lock:
            records, self._unsynced, self._unsynced_bytes = self._unsynced, [], 0
        if not records:
            return
        for part in {id(p): p for p in (self._file_of[name] for name, *_ in records)}.values():
            part.sync()
        self._ledger.add(records)
        self._synced_at = time.monotonic()

    def _tensor(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise QuantkitError(f"{self.path}: no tensor {name!r} is planned") from None


def _rows(tensor: TensorInfo, row_start: int, data: np.ndarray) -> np.ndarray:
    """`data` as contiguous [rows, row_bytes], checked against the plan."""
    n_rows = prod(tensor.shape[:-1])
    if data.dtype != np.uint8 or data.ndim < 1 or data.shape[-1] != tensor.row_bytes:
        raise QuantkitError(
            f"tensor {tensor.name!r}: got {data.dtype} {list(data.shape)}, a row is {tensor.row_bytes} bytes of uint8"
        )
    rows = np.ascontiguousarray(data).reshape(-1, tensor.row_bytes)
    if row_start < 0 or row_start + len(rows) > n_rows:
        raise QuantkitError(
            f"tensor {tensor.name!r}: rows {row_start} to {row_start + len(rows)} of {n_rows} were to be written"
        )
    return rows
