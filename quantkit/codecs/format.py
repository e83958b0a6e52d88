"""What the encoder must know of a ggml type, and the codes that it hands to the type's packer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

SUPERBLOCK = 256  # weights under one fp16 d (and dmin)
GROUP = 8  # columns that are chosen together: the width of ggml's codebook entries
FP16_MAX = 65504.0


def to_fp16(x: torch.Tensor) -> torch.Tensor:
    """float32 rounded to what float16 holds, kept finite."""
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()


def scaled(d: np.ndarray, by: np.ndarray) -> np.ndarray:
    """Packed float16 scales times float32 factors, likewise."""
    return np.clip(d.astype(np.float32) * by, -FP16_MAX, FP16_MAX).astype("<f2")


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


class Rounding(NamedTuple):
    """How a codebook type is rounded weight by weight, to guess its scales.

    levels: of |v|, or of v where signs are in the grid; evenly spaced (25 stands at 25.5, 62 at 60). shifts: to try.
    span: weights that share a shift, or are summed together.
    """

    levels: tuple[float, ...]
    shifts: tuple[float, ...]
    span: int


NO_ROUNDING = Rounding((), (), 0)


@dataclass(frozen=True, eq=False)  # one object a type: hashed by identity, so that caches can be keyed by it
class Format:
    """How our encoder sees a type: a weight is `s · v + o`, with s = d · multipliers[scale code] constant in a block.

    block: weights under one scale code. multipliers: of d, by scale code.
    codebook: makes `grid`, float32 [entries, width] of `width` (8 or 4) weights; None for types that round each weight
    alone. levels: sorted values of v for those.
    signs: how a codebook type stores signs: inside the grid, one free bit each, or 7 bits and even parity per 8.
    shifts: o = s · shift, chosen per block. n_mins: o = −dmin · code with this many codes.
    pack: Codes -> uint8 [n, bytes of a superblock], on the same device.
    rounding: of codebook types. needs_hessian: without one, ggml's own encoder does better.
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
    rounding: Rounding = NO_ROUNDING
    needs_hessian: bool = False

    @cached_property
    def grid(self) -> np.ndarray | None:
        """The codebook, made on first use: float32 [entries, width]; None for types without one."""
        return None if self.codebook is None else self.codebook()

    @property
    def width(self) -> int:
        """Weights that share an entry: 8 or 4, or 1 without a codebook."""
        return 1 if self.grid is None else self.grid.shape[1]

    @cached_property
    def half_steps(self) -> np.ndarray | None:
        """For unevenly spaced integer levels: the level nearest to low + i / 2 … low + (i + 1) / 2, float32; else
        None."""
        if all(b - a == 1 for a, b in pairwise(self.levels)):
            return None
        levels = np.array(self.levels, np.float32)
        middle = np.arange(levels[0], levels[-1] + 0.5, 0.5) + 0.25  # boundaries are multiples of 1/2
        return levels[np.abs(middle[:, None] - levels).argmin(1)]

    def round_to_levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The nearest level (a tie: the even one, or the lower of uneven levels) and its index, for any shape."""
        if self.half_steps is not None:
            levels = tables(self, x.device).levels
            index = torch.bucketize(x.contiguous(), (levels[1:] + levels[:-1]) / 2)
            return levels[index], index
        value = x.round().clamp(self.levels[0], self.levels[-1])
        return value, (value - self.levels[0]).long()


@dataclass(frozen=True)
class Tables:
    """A format's constants as tensors on one device; grid [entries, width] or levels are empty where it has none."""

    grid: torch.Tensor
    levels: torch.Tensor
    multipliers: torch.Tensor
    shifts: torch.Tensor


@cache
def tables(fmt: Format, device: torch.device) -> Tables:
    """The constants of a type, float32."""
    grid = np.empty((0, 1)) if fmt.grid is None else fmt.grid
    return Tables(*(table(values, device) for values in (grid, fmt.levels, fmt.multipliers, fmt.shifts)))
