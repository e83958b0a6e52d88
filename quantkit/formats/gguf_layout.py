"""Where every byte of a GGUF model will lie, from the plan alone: the split into files, headers and offsets."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_encode import TensorInfo, check_tensors, encode_header, encode_metadata, encode_tensor
from quantkit.formats.gguf_spec import SPLIT_COUNT, SPLIT_NO, SPLIT_TENSORS, pad, split_path
from quantkit.formats.gguf_values import I32, U16, Value
from quantkit.formats.part_file import FileLayout

MAX_SPLITS = 65_535  # split.count is a u16


def layout(
    path: Path, tensors: Sequence[TensorInfo], metadata: Mapping[str, Value], split_max_bytes: int | None
) -> list[FileLayout]:
    """Files in order; one, named `path`, if everything fits in `split_max_bytes` (None: no limit).

    Files are filled greedily in the order of `tensors`, so none passes the limit unless one tensor alone does. As in
    llama.cpp the metadata go into the first split, the others carry `split.*` only.
    """
    check_tensors(tensors)
    if split_max_bytes is not None and split_max_bytes <= 0:
        raise QuantkitError(f"a split size of {split_max_bytes} bytes is not positive")
    encoded = encode_metadata(metadata)
    whole = _file(path, tensors, encoded)
    if split_max_bytes is None or whole.size <= split_max_bytes:
        return [whole]
    groups = _groups(tensors, encoded, split_max_bytes)
    if len(groups) == 1:
        return [whole]
    if len(groups) > MAX_SPLITS:
        raise QuantkitError(f"splits of {split_max_bytes} bytes would make {len(groups)} files")
    return [
        _file(
            split_path(path, number, len(groups)),
            group,
            (encoded if number == 0 else []) + _split_keys(number, len(groups), len(tensors)),
        )
        for number, group in enumerate(groups)
    ]


def digest(files: Sequence[FileLayout]) -> str:
    """Hex SHA-256 of all names, sizes and headers: two runs with one digest write to the same places."""
    sha = hashlib.sha256()
    for file in files:
        sha.update(f"{file.path.name}\0{file.size}\0{len(file.header)}\0".encode())
        sha.update(file.header)
    return sha.hexdigest()


def _split_keys(number: int, count: int, n_tensors: int) -> list[bytes]:
    return encode_metadata({SPLIT_NO: U16(number), SPLIT_COUNT: U16(count), SPLIT_TENSORS: I32(n_tensors)})


def _file(path: Path, tensors: Sequence[TensorInfo], metadata: Sequence[bytes]) -> FileLayout:
    offsets, position = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = position
        position += pad(tensor.n_bytes)
    header = encode_header(metadata, [encode_tensor(tensor, offsets[tensor.name]) for tensor in tensors])
    absolute = {name: len(header) + offset for name, offset in offsets.items()}
    return FileLayout(path, header, len(header) + position, absolute)


def _groups(tensors: Sequence[TensorInfo], metadata: Sequence[bytes], limit: int) -> list[list[TensorInfo]]:
    """Tensors per file. Header sizes do not depend on the numbers in it, so they can be summed beforehand."""
    split_keys = 24 + sum(map(len, _split_keys(0, 1, 0)))  # 24: magic, version and counts
    head, data = split_keys + sum(map(len, metadata)), 0
    groups: list[list[TensorInfo]] = [[]]
    for tensor in tensors:
        info, size = len(encode_tensor(tensor, 0)), pad(tensor.n_bytes)
        if groups[-1] and pad(head + info) + data + size > limit:
            groups.append([])
            head, data = split_keys, 0
        groups[-1].append(tensor)
        head, data = head + info, data + size
    return groups
