"""What the engine must know of a ggml type, and the codes that it hands to the type's packer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import gguf
import numpy as np
import torch

SUPERBLOCK = 256  # weights under one fp16 d (and dmin)
FP16_MAX = 65504.0


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
    """One ggml type: a weight is `s · v + o`, with s = d · multipliers[scale code] constant in a block.

    block: weights under one scale code. multipliers: of d, by scale code.
    grid: float32 [entries, width] codebook of `width` (8 or 4) weights; None for types that round each weight alone.
    levels: sorted values of v for those.
    signs: how a codebook type stores signs: inside the grid, one free bit each, or 7 bits and even parity per 8.
    shifts: o = s · shift, chosen per block. n_mins: o = −dmin · code with this many codes.
    pack: Codes -> uint8 [n, bytes of a superblock], on the same device.
    """

    qtype: str
    block: int
    multipliers: tuple[float, ...]
    pack: Callable[[Codes], torch.Tensor]
    grid: np.ndarray | None = None
    levels: tuple[float, ...] = ()
    signs: Literal["grid", "free", "even"] = "grid"
    shifts: tuple[float, ...] = (0.0,)
    n_mins: int = 0

    @property
    def width(self) -> int:
        return 1 if self.grid is None else self.grid.shape[1]

    @property
    def superblock_bytes(self) -> int:
        return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[self.qtype]][1]


def as_bytes(*parts: torch.Tensor) -> torch.Tensor:
    """float16 [n], bytes, or integers below 256 [n, …] -> their little-endian bytes side by side, uint8 [n, k]."""
    out = []
    for part in parts:
        if part.dtype == torch.float16:
            part = part.contiguous().view(-1, 1).view(torch.uint8)
        elif part.dtype != torch.uint8:
            part = part.to(torch.uint8)
        out.append(part.reshape(len(part), -1))
    return torch.cat(out, 1)


def words(t: torch.Tensor, size: int) -> torch.Tensor:
    """int32 [n, …, k] -> the little-endian bytes of each as a word of 2 or 4: uint8 [n, …, k · size]."""
    return t.to(torch.int16 if size == 2 else torch.int32).contiguous().view(torch.uint8)


def gather_bits(fields: torch.Tensor, shifts: list[int]) -> torch.Tensor:
    """[n, …, k] small integers, or-ed together at these bit positions -> int32 [n, …]."""
    at = torch.tensor(shifts, dtype=torch.int32, device=fields.device)
    return (fields.int() << at).sum(-1, dtype=torch.int32)


def table(values, device: torch.device) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float32), device=device)
