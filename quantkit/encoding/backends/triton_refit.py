"""Triton: the sums of the refit, and its systems of equations."""

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import SUPERBLOCK

ROWS = 16
MOST_SCALES = 128  # of a row whose system a program holds in registers


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


@triton.jit
def _solve(a, b, x, k, size: tl.constexpr):
    """Gauss and Jordan's elimination, without pivots, of one system of k equations; a [N, k, k], b and x [N, k]."""
    n = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, size)
    inside = i < k
    both = inside[:, None] & inside[None, :]
    m = tl.load(a + n * k * k + i[:, None] * k + i[None, :], mask=both, other=0.0)
    m = tl.where(inside[:, None] | (i[:, None] != i[None, :]), m, 1.0)
    y = tl.load(b + n * k + i, mask=inside, other=0.0)
    for p in range(k):
        row = tl.sum(tl.where(i[:, None] == p, m, 0.0), axis=0)
        column = tl.sum(tl.where(i[None, :] == p, m, 0.0), axis=1)
        pivot, right = tl.sum(tl.where(i == p, row, 0.0)), tl.sum(tl.where(i == p, y, 0.0))
        by = tl.where(i == p, 0.0, column / pivot)
        m -= by[:, None] * row[None, :]
        y -= by * right
    diagonal = tl.sum(tl.where(i[:, None] == i[None, :], m, 0.0), axis=0)
    tl.store(x + n * k + i, y / diagonal, mask=inside)


def solve(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a [..., K, K] symmetric positive definite, b [..., K] -> x with a x = b; K ≤ MOST_SCALES."""
    k, x = b.shape[-1], torch.empty_like(b)
    size = max(16, triton.next_power_of_2(k))
    _solve[(b.numel() // k,)](a.contiguous(), b.contiguous(), x, k, size, num_warps=1 if size < 64 else 8)
    return x
