"""Triton: the sums of the refit."""

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import SUPERBLOCK

ROWS = 16


@triton.jit(do_not_specialize=["k"])
def _products(image, unit, a, shape, k, kinds: tl.constexpr, rows: tl.constexpr):
    """One superblock of image [E, R, 256 count] against that of unit [E, R, kinds, n] it stands for: row k of A.

    shape: R, n.
    """
    r, n = shape
    e, block, count = tl.program_id(1).to(tl.int64), tl.program_id(2), tl.num_programs(2)
    first, width = k // kinds, n // 256 * kinds
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    column = block * 256 + tl.arange(0, 256)
    x = tl.load(image + at[:, None] * (count * 256) + column[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    for kind in tl.static_range(kinds):
        right = unit + (at[:, None] * kinds + kind) * n + first * 256 + column[None, :]
        y = tl.load(right, mask=mask[:, None], other=0.0).to(tl.float32)
        tl.store(a + (at * width + k) * width + (first + block) * kinds + kind, tl.sum(x * y, axis=1), mask=mask)


def products(image: torch.Tensor, unit: torch.Tensor, a: torch.Tensor, k: int) -> None:
    """Twin of reference.Backend.products."""
    e, r, kinds, n = unit.shape
    _products[(triton.cdiv(r, ROWS), e, image.shape[-1] // SUPERBLOCK)](image, unit, a, (r, n), k, kinds, ROWS)
