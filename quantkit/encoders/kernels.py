"""Triton kernels for CUDA. Each has a plain torch twin: `best_entry` in search.py, `curves` in scales.py."""

from itertools import pairwise

import torch
import triton
import triton.language as tl

INNER = 16  # the least inner size of a tensor-core product: 8 linear terms, bias and row constant in two halves each
ROWS, ENTRIES, WARPS = 128, 128, 4


@triton.jit
def _best_entry(linear, square, factor, table, out, n, width: tl.constexpr, entries: tl.constexpr, rows: tl.constexpr,
                tile: tl.constexpr):  # fmt: skip
    """One program: `rows` groups against the whole codebook of matrix e; the index rides in the score's low bits.

    Scores are positive floats, which order like their bits, so one integer minimum finds score and index together: in
    the loop the bits of the tile's number, which is the same for the whole tile, at the end those of the column.
    """
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    k = tl.arange(0, 16)[None, :]
    at = e * n + row
    scale = tl.load(square + at, mask=row < n, other=1.0)
    ratio = tl.load(factor + e) / tl.where(scale > 0, scale, 1.0)
    x = tl.load(linear + at[:, None] * width + k, mask=(row[:, None] < n) & (k < width), other=0.0) * ratio[:, None]
    x = tl.minimum(tl.maximum(x, -240.0), 240.0)
    constant = tl.sum(tl.abs(x), axis=1) + 1e-3
    high = constant.to(tl.float16).to(tl.float32)
    x = tl.where((k == 8) | (k == 9), 1.0, x)
    x = tl.where(k == 10, high[:, None], tl.where(k == 11, (constant - high)[:, None], x)).to(tl.float16)
    column = tl.arange(0, tile)
    best = tl.full([rows, tile], 0x7FFFFFFF, tl.int32)
    for m in range(0, entries, tile):
        y = tl.load(table + e * 16 * entries + tl.arange(0, 16)[:, None] * entries + (m + column)[None, :])
        bits = tl.dot(x, y).to(tl.int32, bitcast=True)
        best = tl.minimum(best, (bits & (tile - entries - 1)) | m)  # a multiple of `tile`, uniform over the tile
    index = tl.min((best & (-tile)) | column[None, :], axis=1) & (entries - 1)
    tl.store(out + at, index, mask=row < n)


def best_entry(linear: torch.Tensor, square: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As search.best_entry. linear [E, N, k], square [E, N], grid [entries, k], bias [E, entries] -> int64 [E, N].

    Both sides are brought into fp16's range (dividing a row by its positive scale², and by the codebook's size, moves
    no minimum); the row constant Σ|linear| makes every score positive. Differs from the reference only between entries
    whose scores agree to about 2⁻¹⁰ of the row's energy.
    """
    e, n, width = linear.shape
    entries = len(grid)
    unit, size = bias.amax(-1).clamp_min(1e-30), grid.abs().max()
    table = torch.zeros(e, INNER, entries, dtype=torch.float16, device=linear.device)
    table[:, :width] = (grid / size).T
    scaled = bias / unit[:, None]
    table[:, 8] = scaled
    table[:, 9] = scaled - table[:, 8]
    table[:, 10:12] = 1
    out = torch.empty(e, n, dtype=torch.int32, device=linear.device)
    programs = (triton.cdiv(n, ROWS), e)
    _best_entry[programs](
        linear.contiguous(), square.contiguous(), size / unit, table, out, n, width, entries, ROWS,
        min(ENTRIES, entries), num_warps=WARPS,
    )  # fmt: skip
    return out.long()


@triton.jit
def _curves(x, weights, base, points, mids, steps, shifts, out, n, spans, span: tl.constexpr, n_points: tl.constexpr,
            n_steps: tl.constexpr, n_shifts: tl.constexpr, absolute: tl.constexpr, rows: tl.constexpr):  # fmt: skip
    """Cost of rounding `span` weights of each row at every sampled scale, for every shift."""
    e, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    column = b * span + tl.arange(0, span)
    at = e * n + row
    t = tl.load(x + at[:, None] * (spans * span) + column[None, :], mask=row[:, None] < n, other=0.0)
    if absolute:
        t = tl.abs(t)
    w = tl.load(weights + e * (spans * span) + column)
    unit = tl.load(base + at, mask=row < n, other=1.0)
    for p in tl.static_range(n_points):
        s = unit * tl.load(points + p)
        inverse = (1.0 / s)[:, None]
        for k in tl.static_range(n_shifts):
            shift = tl.load(shifts + k)
            y = t * inverse - shift
            value = tl.zeros_like(y) + (tl.load(steps) + shift)
            for i in tl.static_range(n_steps):
                value += tl.where(y > tl.load(mids + i), tl.load(steps + i + 1), 0.0)
            error = value * s[:, None] - t
            cost = tl.sum(error * error * w[None, :], axis=1)
            tl.store(out + ((at * spans + b) * n_shifts + k) * n_points + p, cost, mask=row < n)


def curves(x, weights, base, points, levels, shifts, span: int, absolute: bool) -> torch.Tensor:
    """As scales._sampled: x [E, N, 256] -> [E, N, 256/span, shifts, points]."""
    e, n, width = x.shape
    spans = width // span
    out = torch.empty(e, n, spans, len(shifts), len(points), device=x.device)

    def constants(values) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float32, device=x.device)

    pairs = list(pairwise(levels))
    mids, steps = [(a + b) / 2 for a, b in pairs], [levels[0]] + [b - a for a, b in pairs]
    _curves[(triton.cdiv(n, 64), e, spans)](
        x.contiguous(), weights.contiguous(), base.contiguous(), constants([2.0**p for p in points]), constants(mids),
        constants(steps), constants(shifts), out, n, spans, span, len(points), len(mids), len(shifts), absolute, 64,
    )  # fmt: skip
    return out
