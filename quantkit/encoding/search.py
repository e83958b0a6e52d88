"""Exhaustive search: the values that a format can store in 8 neighbouring weights, nearest under an 8×8 metric.

Everything here is plain torch. Over a codebook the search is a product, which a back end may replace (`BestEntry`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.codecs.format import GROUP, Format, tables

CPU_CHUNK = 256  # rows of scores at a time: 256 × 2048 floats stay in a core's L2 cache
SPLIT = 64  # entries per partial minimum: amin is vectorised in torch, argmin is not

BestEntry = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""best_entry, or its twin on a GPU."""


@dataclass(frozen=True)
class Choice:
    """Codes of N groups in each of E matrices: entry int32 [E, N, 8/width], sign int32 [E, N], value f32 [E, N, 8]."""

    entry: torch.Tensor
    sign: torch.Tensor
    value: torch.Tensor


def best_entry(
    linear: torch.Tensor, square: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry m with the least linear · grid_m + square · bias_m: its index, int32 [E, N], and grid_m [E, N, k].

    linear [E, N, k], square [E, N] ≥ 0, grid [entries, k], bias [E, entries].
    """
    entries = len(grid)
    a = torch.cat([linear, square[..., None]], -1)
    b = torch.cat([grid.T.expand(len(bias), -1, -1), bias[:, None]], 1)
    out = torch.empty(square.shape, dtype=torch.int32, device=linear.device)
    chunk = CPU_CHUNK if a.device.type == "cpu" else max(1, 2**28 // entries)
    for e in range(len(a)):
        for i in range(0, a.shape[1], chunk):
            scores = (a[e, i : i + chunk] @ b[e]).view(-1, entries // SPLIT, SPLIT)
            part = scores.amin(-1).argmin(-1)
            row = torch.arange(len(part), device=a.device)
            out[e, i : i + chunk] = part * SPLIT + scores[row, part].argmin(-1)
    return out, grid[out]


def quadratic(r: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    """r [E, N, 8], d [E, 8, 8] -> r D rᵀ, [E, N]."""
    return ((r @ d) * r).sum(-1)


def nearest(fmt: Format, x: torch.Tensor, s: torch.Tensor, d: torch.Tensor, best: BestEntry) -> Choice:
    """The v of this format that minimises (s v − x) D (s v − x)ᵀ.

    x float32 [E, N, 8], s float32 [E, N], d float32 [E, 8, 8]. Exact for codebooks that hold their signs; signs beside
    a codebook are chosen under D's diagonal; weights rounded alone follow each other with feedback inside the group.
    """
    if fmt.grid is None:
        return _nearest_levels(fmt, x, s, d)
    if fmt.signs == "grid":
        return _nearest_full(fmt, x, s, d, best)
    return _nearest_signed(fmt, x, s, d, best)


def _nearest_full(fmt: Format, x: torch.Tensor, s: torch.Tensor, d: torch.Tensor, best: BestEntry) -> Choice:
    grid = tables(fmt, x.device).grid
    bias = ((grid @ d) * grid).sum(-1)  # [E, entries]
    index, value = best((x @ d) * (-2 * s)[..., None], s * s, grid, bias)
    return Choice(index[..., None], torch.zeros_like(index), value)


def _nearest_signed(fmt: Format, x: torch.Tensor, s: torch.Tensor, d: torch.Tensor, best: BestEntry) -> Choice:
    grid = tables(fmt, x.device).grid
    weights = d.diagonal(dim1=-2, dim2=-1)  # [E, 8]
    magnitude, negative = x.abs(), x < 0
    if fmt.signs == "even":
        odd = (negative.sum(-1) & 1).bool()
        cheapest = (magnitude * weights[:, None]).argmin(-1, keepdim=True)
        flip = torch.zeros_like(negative).scatter_(-1, cheapest, odd[..., None])
        negative = negative ^ flip
        magnitude = torch.where(flip, -magnitude, magnitude)
    halves = GROUP // fmt.width
    e, n, _ = x.shape
    w = weights.reshape(e, halves, fmt.width)
    bias = torch.einsum("mk,ehk->ehm", grid**2, w).flatten(0, 1)
    linear = (magnitude * weights[:, None] * (-2 * s)[..., None]).view(e, n, halves, fmt.width).transpose(1, 2)
    squared = (s * s)[:, None].expand(e, halves, n)
    index, value = best(linear.flatten(0, 1), squared.flatten(0, 1), grid, bias)
    index = index.view(e, halves, n).transpose(1, 2)
    value = value.view(e, halves, n, fmt.width).transpose(1, 2).reshape(e, n, GROUP)
    bits = 2 ** torch.arange(GROUP, device=x.device, dtype=torch.int32)
    sign = (negative.int() * bits).sum(-1, dtype=torch.int32)
    return Choice(index, sign, torch.where(negative, -value, value))


def unit_upper(d: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8×8 metrics [..., 8, 8] = (I + u) diag(w) (I + u)ᵀ: u strictly upper, w [..., 8]."""
    root = torch.linalg.cholesky_ex(d.flip(-1, -2))[0].flip(-1, -2)
    diag = root.diagonal(dim1=-2, dim2=-1).clamp_min(1e-20)
    return torch.triu(root / diag[..., None, :], 1), diag**2


def _nearest_levels(fmt: Format, x: torch.Tensor, s: torch.Tensor, d: torch.Tensor) -> Choice:
    u, _ = unit_upper(d)
    safe = torch.where(s == 0, torch.ones_like(s), s)
    errors: list[torch.Tensor] = []
    values, indices = [], []
    for j in range(GROUP):
        y = x[..., j]
        for i, error in enumerate(errors):
            y = y + error * u[:, None, i, j]
        value, index = fmt.round_to_levels(y / safe)
        errors.append(x[..., j] - s * value)
        values.append(value)
        indices.append(index)
    entry = torch.stack(indices, -1).int()
    return Choice(entry, torch.zeros_like(entry[..., 0]), torch.stack(values, -1))
