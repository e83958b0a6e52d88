"""Where one stored tensor of a checkpoint lies: what a shard's header says of it."""

from collections.abc import Mapping
from dataclasses import dataclass

ITEM_SIZE: Mapping[str, int] = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
}
"""safetensors dtype name -> bytes per element."""


@dataclass(frozen=True)
class TensorEntry:
    """One stored tensor.

    dtype: safetensors name, `F8_E4M3`; `INT4` for words of codes (see int4).
    shape: slowest dimension first, as torch has it; `()` is a scalar.
    file: shard name inside the checkpoint folder, None in a description without weights.
    begin, end: byte range in that file (from its start, not from the end of the header).
    """

    dtype: str
    shape: tuple[int, ...]
    file: str | None
    begin: int
    end: int

    @property
    def n_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return self.end - self.begin

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (one step of the first dimension)."""
        return self.n_bytes // (self.shape[0] or 1) if self.shape else self.n_bytes
