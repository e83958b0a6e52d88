"""What is known of a ggml type: a `Codec`, which every kind's file (iq1, iq2, …) fills in, and within it the `Format`
that the encoder chooses codes by."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

import numpy as np
import torch

SUPERBLOCK = 256  # weights under one fp16 d (and dmin)
FP16_MAX = 65504.0


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to what float16 holds, kept finite."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def table(values: object, device: torch.device) -> torch.Tensor:
    """Numbers as a float32 tensor on the device."""
    return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)


@dataclass(frozen=True)
class Codes:
    """Everything that is stored of n superblocks, on the device that chose it; all int32 but d and dmin.

    d, dmin: float16 [n]. scale: [n, 256/block] scale codes. offset: [n, 256/block] shift index or min code. entry: [n,
    256/width] codebook entry, or level index of each weight. sign: [n, 32] one bit per weight of each 8, set where
    negative.
    """

    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    entry: torch.Tensor
    sign: torch.Tensor


@dataclass(frozen=True)
class Format:
    """How our encoder sees a type: a weight is `s · v + o`, with s = d · multipliers[scale code] constant in a block.

    block: weights under one scale code. multipliers: of d, by scale code.
    codebook: makes `grid`, float32 [entries, width] of `width` (8 or 4) weights; None for types that round each weight
    alone. levels: sorted values of v for those.
    signs: how a codebook type stores signs: inside the grid, one free bit each, or 7 bits and even parity per 8.
    shifts: o = s · shift, chosen per block. n_mins: o = −dmin · code with this many codes.
    pack: Codes -> uint8 [n, bytes of a superblock], on the same device.
    """

    qtype: str
    block: int
    multipliers: tuple[float, ...]
    pack: Callable[[Codes], torch.Tensor]
    codebook: Callable[[], np.ndarray] | None = None
    levels: tuple[float, ...] = ()
    signs: Literal["grid", "free", "even"] = "grid"
    shifts: tuple[float, ...] = (0.0,)
    n_mins: int = 0

    @cached_property
    def grid(self) -> np.ndarray | None:
        """The codebook, made on first use: float32 [entries, width]; None for types without one."""
        return None if self.codebook is None else self.codebook()

    @property
    def width(self) -> int:
        """Weights that one entry stands for."""
        return 1 if self.grid is None else self.grid.shape[1]


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
    format: for our own encoder; such a type has SUPERBLOCK weights under d (and dmin). None: only ggml encodes it.
    compiled: outputs for which the numba twin is faster than ggml.
    scale: multiplies the scales of structured blocks in place by factors [n], where they are not the fields d and dmin.
    """

    name: str
    block: np.dtype
    unpack: Callable[[Parts], Groups] | None = None
    codebook: str | None = None
    format: Format | None = None
    compiled: tuple[torch.dtype, ...] = ()
    scale: Callable[[np.ndarray, np.ndarray], None] | None = None

    def parts(self, blocks: torch.Tensor) -> Parts:
        """uint8 [n, bytes of a block] -> the fields of the struct."""
        fields = self.block.fields or {}
        return {name: _part(blocks[:, at : at + dtype.itemsize], dtype.base) for name, (dtype, at, *_) in fields.items()}

    def dequantize(self, data: torch.Tensor) -> torch.Tensor:
        """uint8 [..., row_bytes] -> float32 [..., n_in], on any device."""
        if self.unpack is None:
            raise ValueError(f"{self.name} has no blocks to take apart")
        groups = self.unpack(self.parts(data.reshape(-1, self.block.itemsize)))
        return groups.values().view(*data.shape[:-1], -1)

    def rescale(self, data: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """data uint8 [..., row_bytes] with all scales of each superblock times factor float32 [..., n_in / 256].

        Scales are rounded to float16 and kept in its range. Returns new bytes; everything else stays as it is.
        """
        if self.format is None:
            raise ValueError(f"{self.name} has no superblocks")
        blocks = data.reshape(-1, self.block.itemsize).copy().view(self.block)[:, 0]
        by = factor.reshape(-1)
        if len(by) != len(blocks):
            raise ValueError(f"{len(by)} factors for {len(blocks)} superblocks of {SUPERBLOCK} weights")
        (self.scale or _scale_d)(blocks, by)
        return blocks.view(np.uint8).reshape(data.shape)


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


def times(d: np.ndarray, by: np.ndarray) -> np.ndarray:
    """float16 scales times float32 factors, in float16's range."""
    return np.clip(d.astype(np.float32) * by, -FP16_MAX, FP16_MAX).astype("<f2")


def _scale_d(blocks: np.ndarray, by: np.ndarray) -> None:
    for name in {"d", "dmin"}.intersection(blocks.dtype.names or ()):
        blocks[name] = times(blocks[name], by)
