"""Triton: the search of a codebook (`best_entry`, search.py) and the first guesses of its types (`guess`, guess.py).

A kernel takes what belongs together as a named tuple of tensors, and its constants as one of numbers. Constants that
shape a tensor are first given a name: Triton 3.5 takes no other in a list of sizes.
"""

from functools import cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from quantkit.codecs.format import Format, table
from quantkit.encoding.guess import CANDIDATES, CURVE, codebook_level, interpolation

INNER = 16  # the least inner size of a tensor-core product: 8 linear terms, bias and row constant in two halves each
ROWS, ENTRIES, WARPS = 128, 128, 4
GUESS_ROWS = 4


class Scan(NamedTuple):
    """Sizes of a search: weights of an entry, entries, rows and entries of a tile."""

    width: int
    entries: int
    rows: int
    tile: int


@triton.jit
def _best_entry(terms, scores, grid, found, n, how: tl.constexpr):
    """One program: `rows` groups against the whole codebook of matrix e; the index rides in the score's low bits.

    terms: linear, square; scores: factor, table; found: index, value. Scores are positive floats, which order like
    their bits, so one integer minimum finds score and index together: in the loop the bits of the tile's number, which
    is the same for the whole tile, at the end those of the column.
    """
    linear, square = terms
    factor, table = scores
    out, value = found
    width: tl.constexpr = how.width
    entries: tl.constexpr = how.entries
    rows: tl.constexpr = how.rows
    tile: tl.constexpr = how.tile
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
    inside = (row[:, None] < n) & (k < width)
    tl.store(value + at[:, None] * width + k, tl.load(grid + index[:, None] * width + k, mask=k < width), mask=inside)


def best_entry(
    linear: torch.Tensor, square: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As search.best_entry. linear [E, N, k], square [E, N], grid [entries, k], bias [E, entries].

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
    value = torch.empty(e, n, width, device=linear.device)
    programs = (triton.cdiv(n, ROWS), e)
    terms, scores = (linear.contiguous(), square.contiguous()), (size / unit, table)
    how = Scan(width, entries, ROWS, min(ENTRIES, entries))
    _best_entry[programs](terms, scores, grid, (out, value), n, how, num_warps=WARPS)
    return out, value


class Samples(NamedTuple):
    """What the guesses of a type look at: sampled scales; boundaries between levels, and steps from one to the next;
    shifts; the interpolation to candidates for d, and these."""

    points: torch.Tensor
    mids: torch.Tensor
    steps: torch.Tensor
    shifts: torch.Tensor
    matrix: torch.Tensor
    candidates: torch.Tensor


class GuessSizes(NamedTuple):
    """Sizes of a guess. own_shifts: each span of a block takes its better shift (else the block has one). absolute:
    signs stand beside the codebook."""

    tries: int
    points: int
    candidates: int
    steps: int
    shifts: int
    own_shifts: bool
    spans: int
    codes: int
    blocks: int
    absolute: bool
    rows: int


@triton.jit
def _curve(t, unit, shift, weights, samples, how: tl.constexpr):
    """Cost of rounding each span of t [rows, spans, span] at the sampled scales of unit [rows]: [rows, spans, 32]."""
    points, mids, steps = samples.points, samples.mids, samples.steps
    n_points: tl.constexpr = how.points
    n_steps: tl.constexpr = how.steps
    spans: tl.constexpr = how.spans
    rows: tl.constexpr = how.rows
    lane = tl.arange(0, 32)[None, None, :]
    out = tl.zeros([rows, spans, 32], tl.float32)
    for p in tl.static_range(n_points):
        s = unit * tl.load(points + p)
        y = t * (1.0 / s)[:, None, None] - shift
        value = tl.zeros_like(y) + (tl.load(steps) + shift)
        for i in tl.static_range(n_steps):
            value += tl.where(y > tl.load(mids + i), tl.load(steps + i + 1), 0.0)
        error = value * s[:, None, None] - t
        cost = tl.sum(error * error * weights[None, :, :], axis=2)
        out = tl.where(lane == p, cost[:, :, None], out)
    return out


@triton.jit
def _at_scales(curve, matrix, codes: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr):
    """Cost of each block at every code of every candidate d: curve [rows, spans, 32] -> [rows · blocks, codes · 32]."""
    per: tl.constexpr = curve.shape[1] // blocks
    if per > 1:
        curve = tl.sum(tl.reshape(curve, (rows * blocks, per, 32)), axis=1)
    taps = tl.arange(0, 32)[:, None] * (codes * 32) + tl.arange(0, codes * 32)[None, :]
    return tl.dot(tl.reshape(curve, (rows * blocks, 32)), tl.load(matrix + taps), input_precision="tf32x3")


@triton.jit
def _totals(cost, codes: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr):
    """The best code of each block: [rows · blocks, codes · 32] -> [rows · blocks, 32]."""
    return tl.min(tl.reshape(cost, (rows * blocks, codes, 32)), axis=1)


@triton.jit
def _under(cost, best, codes: tl.constexpr, blocks: tl.constexpr, rows: tl.constexpr):
    """The costs under each row's candidate: [rows · blocks, codes · 32] -> [rows, blocks, codes]."""
    lane = tl.arange(0, 32)[None, None, :]
    mine = tl.where(lane == best[:, None, None], tl.reshape(cost, (rows, blocks * codes, 32)), 0.0)
    return tl.reshape(tl.sum(mine, axis=2), (rows, blocks, codes))


@triton.jit
def _guess(x, weights, samples, guessed, n, level, how: tl.constexpr):
    """d and the best pairs of code and shift of every block, for `rows` superblocks of matrix e."""
    shifts, matrix, candidates = samples.shifts, samples.matrix, samples.candidates
    d, pairs = guessed
    tries: tl.constexpr = how.tries
    n_candidates: tl.constexpr = how.candidates
    n_shifts: tl.constexpr = how.shifts
    own_shifts: tl.constexpr = how.own_shifts
    spans: tl.constexpr = how.spans
    codes: tl.constexpr = how.codes
    blocks: tl.constexpr = how.blocks
    absolute: tl.constexpr = how.absolute
    rows: tl.constexpr = how.rows
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < n
    at = e * n + row
    column = tl.arange(0, 256)
    t = tl.load(x + at[:, None] * 256 + column[None, :], mask=mask[:, None], other=0.0)
    w = tl.load(weights + e * 256 + column)
    rms = tl.sqrt(tl.sum(t * t * w[None, :], axis=1) / tl.maximum(tl.sum(w, axis=0), 1e-30))
    base = tl.maximum(rms / level, 1e-20)
    if absolute:
        t = tl.abs(t)
    t = tl.reshape(t, (rows, spans, 256 // spans))
    w = tl.reshape(w, (spans, 256 // spans))
    curve = _curve(t, base, tl.load(shifts), w, samples, how)
    if n_shifts == 2:
        other = _curve(t, base, tl.load(shifts + 1), w, samples, how)
        if own_shifts:
            curve = tl.minimum(curve, other)
        else:
            cost1 = _at_scales(other, matrix, codes, blocks, rows)
    cost0 = _at_scales(curve, matrix, codes, blocks, rows)
    least = _totals(cost0, codes, blocks, rows)
    if n_shifts == 2 and not own_shifts:
        least = tl.minimum(least, _totals(cost1, codes, blocks, rows))
    total = tl.sum(tl.reshape(least, (rows, blocks, 32)), axis=1)
    total = tl.where(tl.arange(0, 32)[None, :] < n_candidates, total, float("inf"))
    best = tl.argmin(total, axis=1)
    step = tl.minimum(base * tl.load(candidates + best), 65504.0).to(tl.float16).to(tl.float32)
    tl.store(d + at, tl.where(rms > 0, step, 0.0), mask=mask)
    under0 = _under(cost0, best, codes, blocks, rows)
    if n_shifts == 2 and not own_shifts:
        under1 = _under(cost1, best, codes, blocks, rows)
    code = tl.arange(0, codes)[None, None, :]
    block = tl.arange(0, blocks)
    for i in tl.static_range(tries):
        found = tl.argmin(under0, axis=2)
        pair = found
        if n_shifts == 2 and not own_shifts:
            found1 = tl.argmin(under1, axis=2)
            second = tl.min(under1, axis=2) < tl.min(under0, axis=2)
            pair = tl.where(second, found1 + 256, found)
            under1 = tl.where(second[:, :, None] & (code == found1[:, :, None]), float("inf"), under1)
            under0 = tl.where((second == 0)[:, :, None] & (code == found[:, :, None]), float("inf"), under0)
        else:
            under0 = tl.where(code == found[:, :, None], float("inf"), under0)
        tl.store(pairs + (at[:, None] * blocks + block[None, :]) * tries + i, pair, mask=mask[:, None])


@cache
def samples_of(fmt: Format, device: torch.device) -> Samples:
    """Constants of the guesses of a type."""
    codes, (levels, shifts, _) = len(fmt.multipliers), fmt.rounding
    taps = np.zeros((32, codes, 32), np.float32)
    taps[: len(CURVE), :, : len(CANDIDATES)] = interpolation(fmt.multipliers).reshape(len(CURVE), codes, -1)
    neighbours = list(pairwise(levels))
    values = (
        2.0**CURVE,
        [(a + b) / 2 for a, b in neighbours],
        [levels[0]] + [b - a for a, b in neighbours],
        shifts,
        taps,
        2.0**CANDIDATES / max(fmt.multipliers),
    )
    return Samples(*(table(v, device) for v in values))


def guess(fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As guess.guess_codebook: x [E, N, 256], weights [E, 256] -> d [E, N], pairs int32 [E, N, blocks, tries].

    A pair is the scale code + 256 · shift.
    """
    (e, n, width), (levels, shifts, span) = x.shape, fmt.rounding
    how = GuessSizes(
        tries=tries,
        points=len(CURVE),
        candidates=len(CANDIDATES),
        steps=len(levels) - 1,
        shifts=len(shifts),
        own_shifts=len(fmt.shifts) < len(shifts),
        spans=width // span,
        codes=len(fmt.multipliers),
        blocks=width // fmt.block,
        absolute=fmt.signs != "grid",
        rows=GUESS_ROWS,
    )
    d = torch.empty(e, n, device=x.device)
    pairs = torch.empty(e, n, how.blocks, tries, dtype=torch.int32, device=x.device)
    level, samples = codebook_level(fmt), samples_of(fmt, x.device)
    programs = (triton.cdiv(n, GUESS_ROWS), e)
    _guess[programs](x.contiguous(), weights.contiguous(), samples, (d, pairs), n, level, how, num_warps=how.codes // 2)
    return d, pairs
