"""One ggml type and everything that is known of it: every kind's file (iq1, iq2, …) fills in a `Codec` for each of its
types, and the registry finds it by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

if TYPE_CHECKING:
    from quantkit.codecs.format import Format

Parts = dict[str, torch.Tensor]
"""The fields of n blocks by name, [n, k]: float16 as float32, unsigned numbers as int64, signed bytes as int8."""


class Groups(NamedTuple):
    """Decoded blocks as groups of 8 neighbouring weights, `scale · v + offset`.

    v: int8 or int64 [n, groups, 8]. scale: float32 [n, groups]. offset: the same, or 0.
    """

    v: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor | float = 0.0

    def values(self) -> torch.Tensor:
        """The weights, float32 [n, groups, 8]."""
        offset = self.offset[..., None] if isinstance(self.offset, torch.Tensor) else self.offset
        return self.v * self.scale[..., None] + offset


@dataclass(frozen=True)
class Codec:
    """One ggml type, found by `registry.codec(name)`.

    block: the C struct of a block (ggml-common.h), packed and little-endian.
    unpack: the fields of n blocks -> their weights, in torch; None for types that are no blocks. Its compiled twins are
    found by `registry.numba_twin` and `registry.triton_twin`.
    codebook: whose entries the blocks hold, a name of `codebooks.on_device`.
    format: for our own encoder; such a type has 256 weights under d (and dmin). None: only ggml encodes it.
    compiled: outputs for which the numba twin is faster than ggml.
    rescale: multiplies the scales of structured blocks [n] in place by factors [n]; None: they are the fields d and
    dmin.
    """

    name: str
    block: np.dtype
    unpack: Callable[[Parts], Groups] | None = None
    codebook: str | None = None
    format: "Format | None" = None
    compiled: tuple[torch.dtype, ...] = ()
    rescale: Callable[[np.ndarray, np.ndarray], None] | None = None

    def parts(self, blocks: torch.Tensor) -> Parts:
        """uint8 [n, bytes of a block] -> the fields of the struct."""
        parts = {}
        for name in self.block.names or ():
            dtype, at = self.block[name], self.block.fields[name][1]
            parts[name] = _part(blocks[:, at : at + dtype.itemsize], dtype.base)
        return parts

    def dequantize(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [..., row_bytes] -> float32 [..., n_in], on any device."""
        if self.unpack is None:
            raise ValueError(f"{self.name} has no blocks to take apart")
        groups = self.unpack(self.parts(data.reshape(-1, self.block.itemsize)))
        return groups.values().view(*data.shape[:-1], -1)


def _part(b: torch.Tensor, dtype: np.dtype) -> torch.Tensor:
    """The bytes [n, …] of one field as its numbers; words are put together, since blocks are only 2-byte aligned."""
    if dtype == np.float16:
        return b.contiguous().view(torch.float16).float()
    if dtype == np.int8:
        return b.contiguous().view(torch.int8)
    if dtype.itemsize == 1:
        return b.long()
    parts = b.reshape(len(b), -1, dtype.itemsize).long()
    return (parts << torch.arange(0, 8 * dtype.itemsize, 8, device=b.device)).sum(-1)
