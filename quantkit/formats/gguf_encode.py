"""Metadata and tensor table -> the header bytes of a GGUF file. gguf-py writes these only into a final file."""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

from gguf.constants import GGUF_MAGIC, GGUF_VERSION, GGMLQuantizationType, GGUFValueType

from quantkit.codecs.types import stored
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_spec import MAX_NAME, pad
from quantkit.formats.gguf_values import I32List, Scalar, Typed, Value


class TensorInfo(Protocol):
    """What the header says of a tensor, known before there are data: a plan's tensors have it."""

    @property
    def name(self) -> str:
        """Its GGUF name."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first."""
        ...

    @property
    def qtype(self) -> str:
        """ggml's name of the type."""
        ...

    @property
    def n_bytes(self) -> int:
        """Of all rows."""
        ...

    @property
    def row_bytes(self) -> int:
        """Of one row."""
        ...


@dataclass(frozen=True)
class PlainTensor:
    """A TensorInfo of its own, for files that no plan describes: an imatrix, a sidecar."""

    name: str
    shape: tuple[int, ...]
    qtype: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of weights."""
        return stored(self.qtype).row_bytes(self.shape[-1])

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * prod(self.shape[:-1])


LAYOUT = {
    GGUFValueType.UINT16: "<H",
    GGUFValueType.UINT32: "<I",
    GGUFValueType.INT32: "<i",
    GGUFValueType.FLOAT32: "<f",
    GGUFValueType.BOOL: "<?",
}


def encode_metadata(metadata: Mapping[str, Value]) -> list[bytes]:
    """One bytes per key, in order. QuantkitError naming the key for a value that GGUF or its readers cannot take."""
    return [_string(key) + _value(key, value) for key, value in metadata.items()]


def encode_tensor(tensor: TensorInfo, offset: int) -> bytes:
    """The tensor-table entry; `offset` from the start of the data."""
    ne = tuple(reversed(tensor.shape))
    return (
        _string(tensor.name)
        + struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
        + struct.pack("<IQ", GGMLQuantizationType[tensor.qtype], offset)
    )


def encode_header(metadata: Sequence[bytes], tensors: Sequence[bytes]) -> bytes:
    """The header of one file, padded to where its data start."""
    counts = struct.pack("<IIQQ", GGUF_MAGIC, GGUF_VERSION, len(tensors), len(metadata))
    header = counts + b"".join(metadata) + b"".join(tensors)
    return header + bytes(pad(len(header)) - len(header))


def check_tensors(tensors: Sequence[TensorInfo]) -> None:
    """QuantkitError for a table that no reader would take: bad or double names, shapes or sizes that do not fit."""
    seen: set[str] = set()
    for tensor in tensors:
        if not 0 < len(tensor.name.encode()) <= MAX_NAME or tensor.name in seen:
            raise QuantkitError(f"tensor name {tensor.name!r} is empty, longer than {MAX_NAME} bytes or used twice")
        seen.add(tensor.name)
        if (
            not 1 <= len(tensor.shape) <= 4
            or min(tensor.shape) < 1
            or tensor.qtype not in GGMLQuantizationType.__members__
        ):
            raise QuantkitError(f"tensor {tensor.name!r}: bad shape {tensor.shape} or type {tensor.qtype!r}")
        qtype, n_in = stored(tensor.qtype), tensor.shape[-1]
        if not qtype.fits(n_in):
            raise QuantkitError(f"tensor {tensor.name!r}: rows of {n_in} are not whole {qtype.name} blocks")
        row, sizes = qtype.row_bytes(n_in), (tensor.row_bytes, tensor.n_bytes)
        if sizes != (row, row * prod(tensor.shape[:-1])):
            raise QuantkitError(
                f"tensor {tensor.name!r}: {sizes} bytes per row and in all do not fit {tensor.qtype} {tensor.shape}"
            )


def _string(text: str) -> bytes:
    encoded = text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(key: str, value: Value) -> bytes:
    if isinstance(value, I32List):
        return _array(key, value.values)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return _array(key, value)
    kind = value.kind if isinstance(value, Typed) else _kind(key, value)
    return struct.pack("<I", kind) + _packed(key, kind, value.value if isinstance(value, Typed) else value)


def _array(key: str, values: Sequence[Scalar]) -> bytes:
    if not values:
        raise QuantkitError(f"metadata {key!r} is an empty array, on which KTransformers fails: leave the key out")
    kind = _kind(key, values[0])
    if kind == GGUFValueType.UINT32:
        kind = GGUFValueType.INT32
    if {type(value) for value in values} != {type(values[0])}:
        raise QuantkitError(f"metadata {key!r} is an array of several types")
    head = struct.pack("<IIQ", GGUFValueType.ARRAY, kind, len(values))
    return head + b"".join(_packed(key, kind, value) for value in values)


def _kind(key: str, value: object) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, str):
        return GGUFValueType.STRING
    if isinstance(value, int):
        return GGUFValueType.UINT32 if value >= 0 else GGUFValueType.INT32
    if isinstance(value, float):
        return GGUFValueType.FLOAT32
    raise QuantkitError(f"metadata {key!r}: {type(value).__name__} is not a GGUF type")


def _packed(key: str, kind: GGUFValueType, value: Scalar) -> bytes:
    if isinstance(value, str):
        return _string(value)
    try:
        return struct.pack(LAYOUT[kind], value)
    except (struct.error, OverflowError):
        raise QuantkitError(f"metadata {key!r}: {value!r} does not fit {kind.name}") from None
