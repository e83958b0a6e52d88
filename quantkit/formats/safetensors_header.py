"""The safetensors header: 8 bytes of little-endian length, then JSON; parsed by us so that every lie has a name."""

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.mistaken import kind_of
from quantkit.formats.tensor_entry import ITEM_SIZE, TensorEntry

MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own bound
MAX_DIMENSIONS = 8
MAX_DIMENSION = 1 << 48  # above any real tensor; keeps products of hostile shapes small


def header_length(prefix: bytes, file_size: int, file: str) -> int:
    """Length of the JSON from a shard's first bytes, 8 or more; QuantkitError if the shard cannot hold it."""
    if len(prefix) < 8:
        raise QuantkitError(f"{file}: truncated: {file_size} bytes are too few for a safetensors file")
    begins_right = prefix[4:8] == b"\0\0\0\0" and prefix[8:9] in (b"{", b"")  # a length may look like any magic
    if not begins_right and (kind := kind_of(prefix)):
        raise QuantkitError(f"{file}: is {kind}")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise QuantkitError(f"{file}: not a safetensors file (header of {length} bytes claimed)")
    if 8 + length > file_size:
        raise QuantkitError(f"{file}: truncated: the header needs {8 + length} bytes, the file has {file_size}")
    return length


def parse_header(header: bytes, file_size: int, file: str, where: str) -> dict[str, TensorEntry]:
    """Tensors of one shard by name.

    header: the JSON bytes alone. file_size: size of the whole shard in bytes. file: its name for the entries;
    where: its name for messages.
    Raises QuantkitError unless every entry is well formed and the data cover the rest of the file without gap or
    overlap: a shard that stops early names the first tensor it cuts.
    """
    data_start = 8 + len(header)
    entries = {
        name: _entry(name, value, data_start, file, where)
        for name, value in load_object(header, f"{where}: header").items()
        if name != "__metadata__"
    }
    _check_layout(entries, data_start, file_size, where)
    return entries


def encode_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], about: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """First bytes of a file of these tensors (name -> dtype, shape), whose data lie in this order, and where those of
    each begin in the file. about: metadata."""
    table: dict[str, object] = {"__metadata__": dict(about)} if about else {}
    starts, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        starts[name], end = end, end + ITEM_SIZE[dtype] * prod(shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [starts[name], end]}
    body = json.dumps(table).encode()
    body += b" " * (-len(body) % 8)
    head = len(body).to_bytes(8, "little") + body
    return head, {name: len(head) + start for name, start in starts.items()}


def check_shard_name(name: object, where: str) -> str:
    """`name` if it is a plain file name: an index must not reach outside its own folder."""
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00-\x1f]{1,255}", name) or name in (".", ".."):
        raise QuantkitError(f"{where}: shard name {name!r} is not a plain file name")
    return name


def load_json(text: bytes | str, where: str) -> object:
    """Strict JSON: duplicate keys, too deep nesting or bad UTF-8 are QuantkitErrors naming `where`."""

    def no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    raise QuantkitError(f"{where}: {key!r} appears twice")
                seen.add(key)
        return result

    try:
        return json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        if kind := kind_of(text if isinstance(text, bytes) else text[:64].encode(errors="replace")):
            raise QuantkitError(f"{where}: is {kind}") from None
        raise QuantkitError(f"{where}: not valid JSON ({error})") from None


def load_object(text: bytes | str, where: str) -> dict[str, Any]:
    """`load_json` of what must be an object."""
    value = load_json(text, where)
    if not isinstance(value, dict):
        raise QuantkitError(f"{where}: not a JSON object")
    return value


def _is_size(value: object, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= limit


def _entry(name: str, value: object, data_start: int, file: str, where: str) -> TensorEntry:
    where = f"{where}: tensor {name!r}"
    if not isinstance(value, dict):
        raise QuantkitError(f"{where}: header entry is not an object")
    dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise QuantkitError(f"{where}: unknown dtype {dtype!r}")
    shape = check_shape(shape, where)
    if not (isinstance(offsets, list) and len(offsets) == 2 and all(_is_size(o, 1 << 62) for o in offsets)):
        raise QuantkitError(f"{where}: bad data_offsets {offsets!r}")
    begin, end = offsets
    need = prod(shape) * ITEM_SIZE[dtype]
    if end - begin != need:
        raise QuantkitError(f"{where}: {dtype} {list(shape)} needs {need} bytes, data_offsets give {end - begin}")
    return TensorEntry(dtype, shape, file, data_start + begin, data_start + end)


def check_shape(shape: object, where: str) -> tuple[int, ...]:
    """`shape` as a tuple if it is a short list of sane sizes, else QuantkitError."""
    if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(_is_size(d, MAX_DIMENSION) for d in shape):
        raise QuantkitError(f"{where}: bad shape {shape!r}")
    return tuple(shape)


def _check_layout(entries: Mapping[str, TensorEntry], data_start: int, file_size: int, file: str) -> None:
    """Data must cover the file without gap or overlap."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a gap before it"
            raise QuantkitError(f"{file}: tensor {name!r} {kind} (offset {entry.begin}, expected {position})")
        if entry.end > file_size:
            raise QuantkitError(f"{file}: truncated: tensor {name!r} ends at byte {entry.end}, the file at {file_size}")
        position = entry.end
    if position != file_size:
        raise QuantkitError(f"{file}: {file_size - position} bytes after the last tensor")
