"""Triton: encode a whole block of a codebook type in one launch, for every hypothesis, with feedback in registers.

The plain twins are reference.Backend.encode_span (`_feedback`) and descend_groups (`_descent`); the search is
triton_search._best_entry's. Up to four groups of 8 are written out one after the other, because Triton keeps no lists
of registers.
"""

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import GROUP, SUPERBLOCK, Format, tables
from quantkit.encoding.hessian import Factor
from quantkit.encoding.state import State

ROWS, LEAST_ROWS, WARPS = 64, 16, 4
SCORES = 8192  # of a program, in registers
PROGRAMS = 132  # at once: with fewer, a GPU would idle
SIGNS = {"grid": 0, "free": 1, "even": 2}


class How(NamedTuple):
    """Constants of a type. tries: pairs of codes in each block. groups: of 8 in a block. signs: see SIGNS. halves:
    entries of a group."""

    tries: int
    groups: int
    signs: int
    halves: int
    entries: int
    rows: int
    tile: int


class Out(NamedTuple):
    """Where a kernel writes the codes and values of a state, and `d`, which it reads; change [E, R, 256]: of q, by a
    descent."""

    q: torch.Tensor
    value: torch.Tensor
    entry: torch.Tensor
    sign: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor
    d: torch.Tensor
    change: torch.Tensor


class Scores(NamedTuple):
    """What a superblock's searches need: the codebook [halves, entries, 8], the metric [E, 32, 8, 8], for a descent its
    inverse; `score_tables` of them."""

    grid: torch.Tensor
    metric: torch.Tensor
    inverse: torch.Tensor
    table: torch.Tensor
    factor: torch.Tensor


class Place(NamedTuple):
    """Columns and rows of a matrix; where the block stands in its superblock and in the matrix."""

    n: int
    r: int
    lo: int
    start: int


@triton.jit
def _times(x, m, stride):
    """x [rows, 8] times the 8×8 matrix at m."""
    i = tl.arange(0, 8)
    return tl.sum(x[:, :, None] * tl.load(m + i[:, None] * stride + i[None, :])[None, :, :], axis=1)


@triton.jit
def _search(g: tl.constexpr, x, s, scores, how: tl.constexpr):
    """Nearest entry to x [rows, 8] at scale s [rows], in group g of those at `scores`: (entry, entry of the second
    half, sign bits), value, cost."""
    signs: tl.constexpr = how.signs
    halves: tl.constexpr = how.halves
    entries: tl.constexpr = how.entries
    rows: tl.constexpr = how.rows
    tile: tl.constexpr = how.tile
    metric, grid = scores.metric + g * 64, scores.grid
    table, factor = scores.table + g * halves * 16 * entries, scores.factor + g * halves
    k = tl.arange(0, 8)
    negative = x < 0
    if signs == 0:
        linear = _times(x, metric, 8) * (-2.0 * s)[:, None]
    else:
        weights = tl.load(metric + k * 9)
        size = tl.abs(x)
        if signs == 2:
            odd = (tl.sum(negative.to(tl.int32), axis=1) & 1) == 1
            flip = (k[None, :] == tl.argmin(size * weights[None, :], axis=1)[:, None]) & odd[:, None]
            negative = negative ^ flip
            size = tl.where(flip, -size, size)
        linear = size * weights[None, :] * (-2.0 * s)[:, None]
    square = tl.where(s > 0, s * s, 1.0)
    column = tl.arange(0, tile)
    inner = tl.arange(0, 16)
    value = tl.zeros([rows, 8], tl.float32)
    first = tl.zeros([rows], tl.int32)
    second = tl.zeros([rows], tl.int32)
    for half in tl.static_range(halves):
        scaled = linear * (tl.load(factor + half) / square)[:, None]
        scaled = tl.minimum(tl.maximum(scaled, -240.0), 240.0)
        constant = tl.sum(tl.abs(scaled), axis=1) + 1e-3  # makes every score positive
        high = constant.to(tl.float16).to(tl.float32)
        rest = tl.where(k[None, :] < 2, 1.0, tl.where(k[None, :] == 2, high[:, None], 0.0))
        rest = tl.where(k[None, :] == 3, (constant - high)[:, None], rest)
        a = tl.reshape(tl.permute(tl.join(scaled, rest), (0, 2, 1)), (rows, 16)).to(tl.float16)
        best = tl.full([rows, tile], 0x7FFFFFFF, tl.int32)
        for m in range(0, entries, tile):
            b = tl.load(table + half * 16 * entries + inner[:, None] * entries + (m + column)[None, :])
            bits = tl.dot(a, b).to(tl.int32, bitcast=True)
            best = tl.minimum(best, (bits & (tile - entries - 1)) | m)
        index = tl.min((best & (-tile)) | column[None, :], axis=1) & (entries - 1)
        value += tl.load(grid + (half * entries + index)[:, None] * 8 + k[None, :])
        if half == 0:
            first = index
        else:
            second = index
    bits = tl.zeros([rows], tl.int32)
    if signs > 0:
        value = tl.where(negative, -value, value)
        bits = tl.sum(negative.to(tl.int32) << k[None, :], axis=1)
    r = x - s[:, None] * value
    return (first, second, bits), value, tl.sum(_times(r, metric, 8) * r, axis=1)


@triton.jit
def _group(g: tl.constexpr, x, w, scale, scores, how: tl.constexpr):
    """Encode group g of the block towards x under scale, s and o; returns codes, cost and the error w − q."""
    s, o = scale
    codes, value, cost = _search(g, x - o[:, None], s, scores, how)
    return codes, cost, w - s[:, None] * value - o[:, None]


@triton.jit
def _put(g: tl.constexpr, codes, scale, here, out, grid, how: tl.constexpr):
    """Store the codes and the weights of group g; here: rows, which of them, place."""
    a, b, bits = codes
    s, o = scale
    at, mask, place = here
    n = place.n
    entries: tl.constexpr = how.entries
    halves: tl.constexpr = how.halves
    k = tl.arange(0, 8)
    column = place.start + g * 8
    v = tl.load(grid + a[:, None] * 8 + k[None, :])
    if halves == 2:
        v += tl.load(grid + (entries + b)[:, None] * 8 + k[None, :])
        tl.store(out.entry + at * (n // 4) + column // 4 + 1, b, mask=mask)
    if how.signs > 0:
        v = tl.where((bits[:, None] >> k[None, :]) & 1 == 1, -v, v)
        tl.store(out.sign + at * (n // 8) + column // 8, bits, mask=mask)
    tl.store(out.entry + at * (n // 8 * halves) + column // 8 * halves, a, mask=mask)
    where = at[:, None] * n + column + k[None, :]
    tl.store(out.value + where, v, mask=mask[:, None])
    tl.store(out.q + where, s[:, None] * v + o[:, None], mask=mask[:, None])


@triton.jit
def _of(e, scores, lo, how: tl.constexpr):
    """The scores of matrix e from the group at column `lo` on."""
    group = e * 32 + lo // 8
    halves: tl.constexpr = how.halves
    size: tl.constexpr = how.halves * 16 * how.entries
    metric, inverse = scores.metric + (e * (32 * 64) + lo * 8), scores.inverse + (e * (32 * 64) + lo * 8)
    return Scores(scores.grid, metric, inverse, scores.table + group * size, scores.factor + group * halves)


@triton.jit
def _pick(better, new, old):
    """The codes of a group, new ones where they are better."""
    a, b, bits = new
    a_, b_, bits_ = old
    return tl.where(better, a, a_), tl.where(better, b, b_), tl.where(better, bits, bits_)


@triton.jit
def _feedback(columns, out, guesses, steps, scores, place, how: tl.constexpr):
    """One block for `rows` rows of matrix e. columns: target [E, R, 256], w, u; guesses: int32 [E, R, blocks, tries];
    steps: multipliers, shifts."""
    target, w, u = columns
    multipliers, shifts = steps
    n, r, lo, start = place
    tries: tl.constexpr = how.tries
    groups: tl.constexpr = how.groups
    rows: tl.constexpr = how.rows
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    here = (at, mask, place)
    k = tl.arange(0, 8)
    scores = _of(e, scores, lo, how)
    u += e * n * n + start * n + start
    t = target + at[:, None] * 256 + lo + k[None, :]
    v = w + at[:, None] * n + start + k[None, :]
    step = tl.load(out.d + at * (n // 256) + start // 256, mask=mask, other=0.0)
    guesses += (at * (32 // groups) + lo // (groups * 8)) * tries
    guessed = tl.load(guesses, mask=mask, other=0)
    least = tl.full([rows], float("inf"), tl.float32)
    best_code, best_shift = guessed, guessed * 0
    zero = guessed * 0
    best0, best1, best2, best3 = (zero, zero, zero), (zero, zero, zero), (zero, zero, zero), (zero, zero, zero)
    for h in range(tries):
        pair = tl.load(guesses + h, mask=mask, other=0)
        code, shift = pair & 255, pair >> 8
        s = step * tl.load(multipliers + code)
        scale = (s, s * tl.load(shifts + shift))
        x = tl.load(t, mask=mask[:, None], other=0.0)
        w0 = tl.load(v, mask=mask[:, None], other=0.0)
        codes0, cost, e0 = _group(0, x, w0, scale, scores, how)
        if groups > 1:
            x = tl.load(t + 8, mask=mask[:, None], other=0.0) + _times(e0, u + 8, n)
            w1 = tl.load(v + 8, mask=mask[:, None], other=0.0)
            codes1, more, e1 = _group(1, x, w1, scale, scores, how)
            cost += more
        if groups > 2:
            x = tl.load(t + 16, mask=mask[:, None], other=0.0) + _times(e0, u + 16, n) + _times(e1, u + 8 * n + 16, n)
            w2 = tl.load(v + 16, mask=mask[:, None], other=0.0)
            codes2, more, e2 = _group(2, x, w2, scale, scores, how)
            cost += more
            x = tl.load(t + 24, mask=mask[:, None], other=0.0) + _times(e0, u + 24, n) + _times(e1, u + 8 * n + 24, n)
            x += _times(e2, u + 16 * n + 24, n)
            w3 = tl.load(v + 24, mask=mask[:, None], other=0.0)
            codes3, more, _ = _group(3, x, w3, scale, scores, how)
            cost += more
        better = cost < least
        least = tl.where(better, cost, least)
        best_code = tl.where(better, code, best_code)
        best_shift = tl.where(better, shift, best_shift)
        best0 = _pick(better, codes0, best0)
        if groups > 1:
            best1 = _pick(better, codes1, best1)
        if groups > 2:
            best2 = _pick(better, codes2, best2)
            best3 = _pick(better, codes3, best3)
    index = start // (groups * 8)
    tl.store(out.scale + at * (n // (groups * 8)) + index, best_code, mask=mask)
    tl.store(out.offset + at * (n // (groups * 8)) + index, best_shift, mask=mask)
    s = step * tl.load(multipliers + best_code)
    scale = (s, s * tl.load(shifts + best_shift))
    _put(0, best0, scale, here, out, scores.grid, how)
    if groups > 1:
        _put(1, best1, scale, here, out, scores.grid, how)
    if groups > 2:
        _put(2, best2, scale, here, out, scores.grid, how)
        _put(3, best3, scale, here, out, scores.grid, how)


@triton.jit
def _descend(g: tl.constexpr, slope, scale, here, out, scores, how: tl.constexpr):
    """Revise group g for its current gradient; stores what decreased and returns the change of q."""
    s, o = scale
    at, mask, place = here
    k = tl.arange(0, 8)
    metric = scores.metric + g * 64
    where = at[:, None] * place.n + place.start + g * 8 + k[None, :]
    old = tl.load(out.q + where, mask=mask[:, None], other=0.0)
    aim = old - _times(slope, scores.inverse + g * 64, 8)
    codes, v, cost = _search(g, aim - o[:, None], s, scores, how)
    r = old - aim
    better = (cost < tl.sum(_times(r, metric, 8) * r, axis=1) * (1 - 1e-6)) & mask
    _put(g, codes, scale, (at, better, place), out, scores.grid, how)
    moved = tl.where(better[:, None], s[:, None] * v + o[:, None] - old, 0.0)
    tl.store(out.change + at[:, None] * 256 + place.lo + g * 8 + k[None, :], moved, mask=mask[:, None])
    return moved


@triton.jit
def _scale(d, steps, scale, offset, mask):
    """s and o of the codes at scale and offset."""
    multipliers, shifts = steps
    s = d * tl.load(multipliers + tl.load(scale, mask=mask, other=0))
    return s, s * tl.load(shifts + tl.load(offset, mask=mask, other=0))


@triton.jit
def _descent(gradient, hessian, out, steps, scores, place, how: tl.constexpr):
    """Coordinate descent over four groups of 8 columns at `start`, under the scales that they have."""
    n, r, lo, start = place
    groups: tl.constexpr = how.groups
    rows: tl.constexpr = how.rows
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    here = (at, mask, place)
    k = tl.arange(0, 8)
    scores = _of(e, scores, lo, how)
    h = hessian + (e * n * n + start * n + start)
    t = gradient + at[:, None] * 256 + lo + k[None, :]
    step = tl.load(out.d + at * (n // 256) + start // 256, mask=mask, other=0.0)
    index = at * (n // (groups * 8)) + start // (groups * 8)
    scale = _scale(step, steps, out.scale + index, out.offset + index, mask)
    x = tl.load(t, mask=mask[:, None], other=0.0)
    m0 = _descend(0, x, scale, here, out, scores, how)
    x = tl.load(t + 8, mask=mask[:, None], other=0.0) + _times(m0, h + 8, n)
    m1 = _descend(1, x, scale, here, out, scores, how)
    if groups == 2:
        scale = _scale(step, steps, out.scale + index + 1, out.offset + index + 1, mask)
    x = tl.load(t + 16, mask=mask[:, None], other=0.0) + _times(m0, h + 16, n) + _times(m1, h + 8 * n + 16, n)
    m2 = _descend(2, x, scale, here, out, scores, how)
    x = tl.load(t + 24, mask=mask[:, None], other=0.0) + _times(m0, h + 24, n) + _times(m1, h + 8 * n + 24, n)
    x += _times(m2, h + 16 * n + 24, n)
    _descend(3, x, scale, here, out, scores, how)


@cache
def padded_grid(fmt: Format, device: torch.device) -> torch.Tensor:
    """The codebook as [8 / width, entries, 8], each half in its own columns."""
    grid, halves = tables(fmt, device).grid, GROUP // fmt.width
    out = torch.zeros(halves, len(grid), GROUP, device=device)
    for half in range(halves):
        out[half, :, half * fmt.width : (half + 1) * fmt.width] = grid
    return out


def score_tables(fmt: Format, metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-hand sides of the search for every group of a superblock: float16 [E, 32 · halves, 16, entries], and the
    factor that brings a row's linear terms to their scale [E, 32 · halves]. metric [E, 32, 8, 8]."""
    grid, (e, groups) = padded_grid(fmt, metric.device), metric.shape[:2]
    (halves, entries, _), size = grid.shape, grid.abs().max()
    if fmt.signs == "grid":
        bias = ((grid @ metric.view(-1, GROUP, GROUP)) * grid).sum(-1)  # [E · 32, entries]
    else:
        bias = torch.einsum("egk,hmk->eghm", metric.diagonal(dim1=-2, dim2=-1), grid**2).reshape(-1, entries)
    unit = bias.amax(-1).clamp_min(1e-30)
    table = torch.zeros(e, groups, halves, 16, entries, dtype=torch.float16, device=metric.device)
    table[..., :GROUP, :] = (grid / size).mT
    flat = table.view(-1, 16, entries)
    flat[:, 8] = scaled = bias / unit[:, None]
    flat[:, 9] = scaled - flat[:, 8]
    flat[:, 10:12] = 1
    return table, size / unit


def scores_of(fmt: Format, metric: torch.Tensor, inverse: torch.Tensor) -> Scores:
    """metric, inverse [E, 32, 8, 8] of one superblock."""
    return Scores(padded_grid(fmt, metric.device), metric, inverse, *score_tables(fmt, metric))


@cache
def _how(fmt: Format, tries: int, rows: int) -> How:
    entries = len(tables(fmt, torch.device("cpu")).grid)
    groups, halves = fmt.block // GROUP, GROUP // fmt.width
    return How(tries, groups, SIGNS[fmt.signs], halves, entries, rows, min(SCORES // rows, entries))


def _rows(e: int, r: int) -> int:
    """Rows of a program, where there are r in each of e matrices: few go to as many programs as they can."""
    rows = ROWS
    while rows > LEAST_ROWS and e * triton.cdiv(r, rows // 2) <= PROGRAMS:
        rows //= 2
    return rows


def _out(state: State, change: torch.Tensor) -> Out:
    return Out(state.q, state.value, state.entry, state.sign, state.scale, state.offset, state.d, change)


def feedback_block(
    state: State,
    w: torch.Tensor,
    target: torch.Tensor,
    factor: Factor,
    scores: Scores,
    codes: torch.Tensor,
    start: int,
) -> None:
    """Encode the block of every row at column `start` into the state.

    codes: int32 [E, R, blocks, K] what to try, scale + 256 · shift.
    """
    e, r, n = w.shape
    t, place = tables(state.fmt, w.device), Place(n, r, start % SUPERBLOCK, start)
    how, out = _how(state.fmt, codes.shape[-1], _rows(e, r)), _out(state, state.q)  # nothing goes to `change`
    _feedback[(triton.cdiv(r, how.rows), e)](
        (target, w, factor.u), out, codes, (t.multipliers, t.shifts), scores, place, how, num_warps=WARPS
    )


def descent_block(
    state: State, gradient: torch.Tensor, change: torch.Tensor, h: torch.Tensor, scores: Scores, start: int
) -> None:
    """Revise 32 columns of every row at `start`; the change of q goes to change [E, R, 256]."""
    e, r, n = state.q.shape
    t, place = tables(state.fmt, h.device), Place(n, r, start % SUPERBLOCK, start)
    how, out = _how(state.fmt, 0, _rows(e, r)), _out(state, change)
    _descent[(triton.cdiv(r, how.rows), e)](
        gradient, h, out, (t.multipliers, t.shifts), scores, place, how, num_warps=WARPS
    )
