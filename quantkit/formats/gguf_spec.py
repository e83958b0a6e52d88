"""What the GGUF format fixes for reader and writer alike: alignment, longest names, names of splits. No decisions."""

import re
from pathlib import Path

ALIGNMENT = 32  # bytes: of tensor data, unless the metadata's `general.alignment` says otherwise
MAX_NAME = 63  # bytes of a tensor's name; ggml's GGML_MAX_NAME is 64 with the final zero
SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
SPLIT_NO, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"


def pad(length: int, alignment: int = ALIGNMENT) -> int:
    """Bytes, rounded up to the alignment of tensor data."""
    return -(-length // alignment) * alignment


def split_path(path: Path, number: int, count: int) -> Path:
    """`X.gguf` as split `number` (from 0) of `count`: `X-00001-of-0000N.gguf`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{number + 1:05d}-of-{count:05d}.gguf")
