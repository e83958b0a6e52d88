"""States that a later run reads: safetensors files that carry the CRC-32 of their bytes, which is checked before they
are used.

The checksum is the first of the metadata, so it lies at the same place of every such file, any tool can open the file,
and both come to be at once. It is of all bytes of the file, with zeros for its own eight digits. Damaged is what has
another one, or none: a page that a crash left empty, a file that was cut short, or one of an older version.

A file is read back once for its checksum when it is written, and once when a process first uses what another one wrote:
at 1 to 3 GB a second (docs/results/robustness.md).
"""

import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError, safe_open

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum, open_regular
from quantkit.formats.safetensors_header import encode_header
from quantkit.formats.whole_file import rename

if TYPE_CHECKING:  # two seconds to load, which `status` does without
    import torch

DTYPES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "int64": "I64", "int32": "I32"}
WRITE_BYTES = 64 << 20
NONE = "0" * 8
MARK = b'{"__metadata__": {"crc32": "'
PLACE = 8 + len(MARK)  # of the digits, behind the length of the header

Shapes = Mapping[str, tuple["torch.dtype", tuple[int, ...]]]
"""Tensors of a file to be: name -> dtype, shape."""

_known: set[tuple[int, int, int, int]] = set()
"""Files that this process wrote or has checked: device, inode, bytes, time. They keep these under other names."""


class Damaged(QuantkitError):
    """A state whose bytes are not those that were written."""


class Writer:
    """A file whose shapes are known before its data, which may come in any order and in pieces: a layer's rows are
    gigabytes in R1."""

    def __init__(self, file: BinaryIO, shapes: Shapes, offsets: Mapping[str, int]) -> None:
        self._file, self._shapes, self._offsets = file, shapes, offsets
        self.written = 0  # bytes

    def write(self, name: str, rows: "torch.Tensor", first: int = 0) -> None:
        """Rows of a tensor from row `first`, in its dtype when they are written, wherever they live."""
        import torch

        dtype, shape = self._shapes[name]
        row = dtype.itemsize * prod(shape[1:])
        self._file.seek(self._offsets[name] + first * row)
        for part in rows.split(max(1, WRITE_BYTES // max(1, row))):
            data = part.to(dtype).cpu().contiguous().view(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))
            self.written += data.nbytes


def write(path: Path, tensors: Mapping[str, "torch.Tensor"], about: Mapping[str, str] | None = None) -> None:
    """A file of these tensors in the place of `path`, by this process alone. about: its metadata. OSError if the disk
    does not take it; what was there before stays."""
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    head, offsets = _head(shapes, about)
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "w+b") as file:
            file.write(head)
            writer = Writer(file, shapes, offsets)
            for name in offsets:
                writer.write(name, tensors[name])
        _seal(part)
        rename(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def writing(path: Path, shapes: Shapes, about: Mapping[str, str] | None = None) -> Iterator[Writer]:
    """A new file of these tensors in the place of `path`, if the `with` block writes all of them; ranks write one file
    together. about: its metadata. QuantkitError if the disk does not take it."""
    head, offsets = _head(shapes, about)
    size = sum(n_bytes(shape) for shape in shapes.values())
    part = path.with_name(f"{path.name}.tmp")
    try:
        if ranks.index() == 0:
            part.write_bytes(head)
        ranks.barrier()
        with open(part, "r+b") as file:
            writer = Writer(file, shapes, offsets)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        if missing := size - sum(ranks.gather(writer.written)):
            raise RuntimeError(f"{path}: {missing} bytes were not written")
        if ranks.index() == 0:
            _seal(part)
            rename(part, path)
        ranks.barrier()
        _known.add(_identity(path.stat()))
        ranks.barrier()  # before rank 0 gives it another name
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write ({error.strerror}); run again to resume") from None
    finally:
        if ranks.index() == 0:
            part.unlink(missing_ok=True)


@contextmanager
def reading(path: Path) -> Iterator[Any]:
    """The file, as `safe_open` has it, after its checksum. Damaged, naming it, if that is wrong or there is none;
    QuantkitError for other trouble with the file or what is looked for in it."""
    check(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise QuantkitError(f"{path}: holds something else ({error})") from None


def about(path: Path) -> dict[str, str]:
    """The metadata of a file, checked as in `reading`."""
    with reading(path) as file:
        return dict(file.metadata())


def head(path: Path) -> dict[str, str]:
    """The metadata of a file that need not be whole; QuantkitError, naming it, if it is none of these files."""
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise QuantkitError(f"{path}: not a file of safetensors ({error})") from None


def check(path: Path) -> None:
    """Damaged, naming the file, unless its bytes are those that were written. Reads it, if this process did not write
    it or check it before."""
    fd = open_regular(path)
    try:
        identity = _identity(os.fstat(fd))
        if identity in _known:
            return
        found, sealed = _checksum(fd)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot read ({error.strerror})") from None
    finally:
        os.close(fd)
    if found is None:
        raise Damaged(f"{path}: damaged, or of another version (it has no checksum)")
    if found != sealed:
        raise Damaged(f"{path}: damaged (its bytes are not those that were written)")
    _known.add(identity)


def whole(path: Path) -> str | None:
    """Why a file is not what was written, in a line; None if it is."""
    try:
        check(path)
    except QuantkitError as error:
        return str(error)
    return None


def n_bytes(shape: "tuple[torch.dtype, tuple[int, ...]]") -> int:
    """Of a tensor's data."""
    return shape[0].itemsize * prod(shape[1])


def _head(shapes: Shapes, about: Mapping[str, str] | None) -> tuple[bytes, dict[str, int]]:
    large_first = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)  # aligned without padding
    table = {name: (DTYPES[str(shapes[name][0]).removeprefix("torch.")], shapes[name][1]) for name in large_first}
    return encode_header(table, {"crc32": NONE, **dict(sorted((about or {}).items()))})


def _seal(path: Path) -> None:
    """Write the checksum of a file, which is all there, into it."""
    with open(path, "r+b") as file:
        found, _ = _checksum(file.fileno())
        os.pwrite(file.fileno(), f"{found:08x}".encode(), PLACE)
        os.fsync(file.fileno())
        _known.add(_identity(os.fstat(file.fileno())))


def _checksum(fd: int) -> tuple[int | None, int]:
    """What the checksum of a file is, None if it has no place for one; and what it says."""
    head = os.pread(fd, PLACE + len(NONE), 0)
    try:
        said = int(head[PLACE:], 16)
    except ValueError:
        return None, 0
    if head[8:PLACE] != MARK:
        return None, 0
    return checksum(fd, len(head), before=zlib.crc32(head[:PLACE] + NONE.encode()))[0], said


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
