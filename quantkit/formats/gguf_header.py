"""The header of one GGUF file, parsed with a bound on everything: a hostile file costs one error and nothing else."""

import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from quantkit.codecs.foreign import BY_NUMBER
from quantkit.codecs.types import stored
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_spec import ALIGNMENT, pad
from quantkit.formats.mistaken import kind_of
from quantkit.tensors import split_name

MetaScalar = bool | int | float | str
MetaValue = MetaScalar | list[bool] | list[int] | list[float] | list[str]

MAX_TENSORS = 1 << 20
MAX_KEYS = 1 << 16
MAX_ARRAY = 1 << 24  # elements; a vocabulary is 1 << 17
MAX_STRING = 1 << 26  # bytes
MAX_WEIGHTS = 1 << 62
KNOWN = frozenset(map(int, GGMLQuantizationType))

SCALAR_DTYPE = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.BOOL: "<?",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
}


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    shape: slowest dimension first (numpy's order; ggml's `ne` reversed). qtype: ggml's name, `IQ1_S`.
    offset: first byte, from the start of `file`. n_bytes: without padding. stride: bytes from one of its matrices to
    the next, if others lie between them (`models.other_layouts`); None: they follow each other.
    """

    name: str
    shape: tuple[int, ...]
    qtype: str
    offset: int
    n_bytes: int
    file: Path
    stride: int | None = None

    @property
    def role(self) -> str:
        """The name without layer and suffix, `ffn_down_exps`."""
        return split_name(self.name)[0]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of weights."""
        return stored(self.qtype).row_bytes(self.shape[-1])


@dataclass(frozen=True)
class Header:
    """What one file says of itself: metadata in file order, tensors by name, and where their data start."""

    metadata: dict[str, MetaValue]
    tensors: dict[str, GGUFTensor]
    data_start: int


def parse_header(data: mmap.mmap | bytes, file: Path) -> Header:
    """The header at the start of `data`, which is the whole file; QuantkitError naming `file` for anything wrong."""
    cursor = _Cursor(data, file)
    n_tensors, n_keys = _counts(cursor)
    metadata: dict[str, MetaValue] = {}
    for _ in range(n_keys):
        key = cursor.string()
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice")
        metadata[key] = _value(cursor, key)
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 8 <= alignment <= 1 << 20 or alignment & (alignment - 1):
        raise cursor.error(f"general.alignment {alignment!r} is not a sane power of two")
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    data_start = pad(cursor.position, alignment)
    return Header(metadata, _place(cursor, infos, data_start, alignment), data_start)


class _Cursor:
    """A position in the file that refuses to pass its end."""

    def __init__(self, data: mmap.mmap | bytes, file: Path) -> None:
        self.data, self.file, self.position = data, file, 0

    def error(self, problem: str) -> QuantkitError:
        return QuantkitError(f"{self.file}: {problem}")

    def need(self, length: int) -> int:
        """Advance by `length` bytes; the position before."""
        at = self.position
        if length > len(self.data) - at:
            raise self.error(f"truncated: the header goes on after the last byte ({len(self.data)})")
        self.position = at + length
        return at

    def number(self, layout: str) -> int:
        """The next integer, `layout` as struct has it."""
        return struct.unpack_from(layout, self.data, self.need(struct.calcsize(layout)))[0]

    def string(self) -> str:
        length = self.number("<Q")
        if length > MAX_STRING:
            raise self.error(f"a string of {length} bytes is claimed at byte {self.position - 8}")
        at = self.need(length)
        return self.decode(self.data[at : at + length])

    def decode(self, text: bytes) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            raise self.error(f"a string before byte {self.position} is not UTF-8") from None


def _counts(cursor: _Cursor) -> tuple[int, int]:
    if len(cursor.data) < 24 or cursor.data[:4] != b"GGUF":
        kind = None if cursor.data[:4] == b"GGUF" else kind_of(bytes(cursor.data[:64]))
        raise cursor.error(f"is {kind}" if kind else "not a GGUF file (bad magic or too short)")
    cursor.need(4)
    version = cursor.number("<I")
    if version not in (2, 3):
        reason = "big-endian files are not supported" if version & 0xFFFF == 0 else "2 and 3 are supported"
        raise cursor.error(f"GGUF version {version}: {reason}")
    n_tensors, n_keys = cursor.number("<Q"), cursor.number("<Q")
    if n_tensors > MAX_TENSORS or n_keys > MAX_KEYS:
        raise cursor.error(f"claims {n_tensors} tensors and {n_keys} metadata keys")
    return n_tensors, n_keys


def _value_type(cursor: _Cursor, key: str) -> GGUFValueType:
    number = cursor.number("<I")
    try:
        return GGUFValueType(number)
    except ValueError:
        raise cursor.error(f"metadata key {key!r} has unknown type {number}") from None


def _value(cursor: _Cursor, key: str) -> MetaValue:
    kind = _value_type(cursor, key)
    if kind == GGUFValueType.STRING:
        return cursor.string()
    if kind != GGUFValueType.ARRAY:
        return _numbers(cursor, kind, 1)[0]
    kind, count = _value_type(cursor, key), cursor.number("<Q")
    if kind == GGUFValueType.ARRAY:
        raise cursor.error(f"metadata key {key!r} is an array of arrays")
    if count > MAX_ARRAY:
        raise cursor.error(f"metadata key {key!r} claims {count} elements")
    return _strings(cursor, count) if kind == GGUFValueType.STRING else _numbers(cursor, kind, count)


def _numbers(cursor: _Cursor, kind: GGUFValueType, count: int) -> list:
    dtype = np.dtype(SCALAR_DTYPE[kind])
    at = cursor.need(count * dtype.itemsize)
    if kind == GGUFValueType.BOOL:
        dtype = np.dtype("u1")  # any byte but 0 is true; as np.bool it would be undefined
    values = np.frombuffer(cursor.data[at : cursor.position], dtype).tolist()
    return [value != 0 for value in values] if kind == GGUFValueType.BOOL else values


def _strings(cursor: _Cursor, count: int) -> list[str]:
    """As `cursor.string()` count times, unrolled: a vocabulary has 257,000 of them."""
    if count * 8 > len(cursor.data) - cursor.position:
        raise cursor.error(f"truncated: {count} strings are claimed at byte {cursor.position}")
    data, position, end = cursor.data, cursor.position, len(cursor.data)
    length_at: Callable = struct.Struct("<Q").unpack_from
    texts = []
    for _ in range(count):
        start = position + 8
        if start > end:
            cursor.need(end)
        (length,) = length_at(data, position)
        position = start + length
        if length > MAX_STRING or position > end:
            raise cursor.error(f"truncated: a string of {length} bytes is claimed at byte {start - 8}")
        texts.append(data[start:position])
    cursor.position = position
    return [cursor.decode(text) for text in texts]


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], str, int]:
    """Name, shape, type and offset within the data, all checked but the offset."""
    name = cursor.string()
    n_dims = cursor.number("<I")
    if not 1 <= n_dims <= 4:
        raise cursor.error(f"tensor {name!r} has {n_dims} dimensions")
    ne = [cursor.number("<Q") for _ in range(n_dims)]
    number, offset = cursor.number("<I"), cursor.number("<Q")
    if 0 in ne or max(ne) > MAX_WEIGHTS or prod(ne) > MAX_WEIGHTS:
        raise cursor.error(f"tensor {name!r} has impossible dimensions {ne}")
    qtype = BY_NUMBER.get(number) if number not in KNOWN else GGMLQuantizationType(number).name
    if qtype is None:
        raise cursor.error(f"tensor {name!r} has unknown type {number}")
    sizes = stored(qtype)
    if not sizes.fits(ne[0]):
        raise cursor.error(f"tensor {name!r}: rows of {ne[0]} are not whole {qtype} blocks of {sizes.block_size}")
    return name, tuple(reversed(ne)), qtype, offset


def _place(
    cursor: _Cursor, infos: list[tuple[str, tuple[int, ...], str, int]], data_start: int, alignment: int
) -> dict[str, GGUFTensor]:
    """Tensors at their absolute offsets, in header order; all inside the file and apart from each other."""
    tensors: dict[str, GGUFTensor] = {}
    for name, shape, qtype, offset in infos:
        if name in tensors:
            raise cursor.error(f"tensor {name!r} appears twice")
        if offset % alignment:
            raise cursor.error(f"tensor {name!r}: offset {offset} is not a multiple of {alignment}")
        n_bytes = prod(shape[:-1]) * stored(qtype).row_bytes(shape[-1])
        tensors[name] = GGUFTensor(name, shape, qtype, data_start + offset, n_bytes, cursor.file)
    end = data_start
    for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise cursor.error(f"tensor {tensor.name!r} overlaps the tensor before it")
        end = tensor.offset + tensor.n_bytes
        if end > len(cursor.data):
            raise cursor.error(f"truncated: tensor {tensor.name!r} ends at byte {end}, the file at {len(cursor.data)}")
    return tensors
