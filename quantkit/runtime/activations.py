"""What decoding hands to kernels, and whether there are any."""

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import torch

FEW = 1  # rows that are multiplied as integers; more of them by tensor cores


class Halves(NamedTuple):
    """Rows [n, n_in] as float16 of at most 1, and float32 [n] that they are to be multiplied by."""

    x: torch.Tensor
    scales: torch.Tensor


class Activations(NamedTuple):
    """Rows to be multiplied by matrices: x float32 [n, n_in], and for Triton's kernels the same as integers of 16 bits.

    words: int32 [n, 4, n_in / 8], of 8 neighbouring columns the upper bytes (signed) in two words, then the lower ones.
    scales: float32 [n, n_in / 32], what the integers of 32 columns count. halves: the same for more rows than a few.
    None where they are not wanted.
    """

    x: torch.Tensor
    words: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    halves: Halves | None = None


class Where(NamedTuple):
    """One new token of each of n sequences. cells, slots of the cache and positions: int64 [n]. turned: cos and sin of
    each rotated pair at every position, float32 [positions, qk_rope]."""

    cells: torch.Tensor
    slots: torch.Tensor
    positions: torch.Tensor
    turned: torch.Tensor


@cache
def use_kernels(kind: str) -> bool:
    """Triton's kernels on a GPU."""
    return kind == "cuda" and find_spec("triton") is not None
