"""Triton: encode a whole block of a codebook format in one launch, for every hypothesis, with feedback in registers.

The plain twins are `engine.encode_span` (`_feedback`) and `engine.descent_pass` with spans of 8 (`_descent`); the
search is `kernels._best_entry`'s. Up to four groups of 8 are written out one after the other, because Triton keeps no
lists of registers.
"""

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import SUPERBLOCK, Format
from quantkit.encoding.hessian import GROUP, Factor
from quantkit.encoding.search import tables

ROWS, TILE, WARPS = 64, 128, 4
SIGNS = {"grid": 0, "free": 1, "even": 2}


@triton.jit
def _times(x, m, stride):
    """x [rows, 8] times the 8×8 matrix at m."""
    i = tl.arange(0, 8)
    return tl.sum(x[:, :, None] * tl.load(m + i[:, None] * stride + i[None, :])[None, :, :], axis=1)


@triton.jit
def _search(
    x,
    s,
    metric,
    table,
    factor,
    grid,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Nearest entry to x [rows, 8] at scale s [rows] -> (entry, entry of the second half, sign bits, value, cost)."""
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
    return first, second, bits, value, tl.sum(_times(r, metric, 8) * r, axis=1)


@triton.jit
def _group(
    g: tl.constexpr,
    x,
    w,
    s,
    o,
    metric,
    table,
    factor,
    grid,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Encode group g of the block towards x; returns codes, cost and the error w − q."""
    a, b, bits, value, cost = _search(
        x - o[:, None],
        s,
        metric + g * 64,
        table + g * halves * 16 * entries,
        factor + g * halves,
        grid,
        signs,
        halves,
        entries,
        rows,
        tile,
    )
    return a, b, bits, cost, w - s[:, None] * value - o[:, None]


@triton.jit
def _put(
    g: tl.constexpr,
    at,
    start,
    n,
    s,
    o,
    a,
    b,
    bits,
    mask,
    grid,
    entry,
    sign,
    value,
    q,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
):
    """Store the codes and the weights of group g."""
    k = tl.arange(0, 8)
    column = start + g * 8
    v = tl.load(grid + a[:, None] * 8 + k[None, :])
    if halves == 2:
        v += tl.load(grid + (entries + b)[:, None] * 8 + k[None, :])
        tl.store(entry + at * (n // 4) + column // 4 + 1, b, mask=mask)
    if signs > 0:
        v = tl.where((bits[:, None] >> k[None, :]) & 1 == 1, -v, v)
        tl.store(sign + at * (n // 8) + column // 8, bits, mask=mask)
    tl.store(entry + at * (n // 8 * halves) + column // 8 * halves, a, mask=mask)
    here = at[:, None] * n + column + k[None, :]
    tl.store(value + here, v, mask=mask[:, None])
    tl.store(q + here, s[:, None] * v + o[:, None], mask=mask[:, None])


@triton.jit(do_not_specialize=["superblock"])
def _feedback(
    target,
    w,
    q,
    value,
    entry,
    sign,
    scale,
    offset,
    d,
    guesses,
    multipliers,
    shifts,
    metric,
    table,
    factor,
    grid,
    u,
    n,
    r,
    lo,
    start,
    superblock,
    tries: tl.constexpr,
    blocks: tl.constexpr,
    groups: tl.constexpr,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """One block of `groups` · 8 columns at `start` (at `lo` in its superblock) for `rows` rows of matrix e."""
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    k = tl.arange(0, 8)
    metric += e * (32 * 64) + lo * 8
    table += (e * 32 + lo // 8) * halves * 16 * entries
    factor += (e * 32 + lo // 8) * halves
    u += e * n * n + start * n + start
    t = target + at[:, None] * 256 + lo + k[None, :]
    v = w + at[:, None] * n + start + k[None, :]
    step = tl.load(d + at * (n // 256) + superblock, mask=mask, other=0.0)
    guesses += (at * blocks + lo // (groups * 8)) * tries
    guessed = tl.load(guesses, mask=mask, other=0)
    least = tl.full([rows], float("inf"), tl.float32)
    best_code, best_shift = guessed, guessed * 0
    a0, b0, s0 = guessed * 0, guessed * 0, guessed * 0
    a1, b1, s1, a2, b2, s2, a3, b3, s3 = a0, a0, a0, a0, a0, a0, a0, a0, a0
    for h in range(tries):
        pair = tl.load(guesses + h, mask=mask, other=0)
        code, shift = pair & 255, pair >> 8
        s = step * tl.load(multipliers + code)
        o = s * tl.load(shifts + shift)
        x0 = tl.load(t, mask=mask[:, None], other=0.0)
        w0 = tl.load(v, mask=mask[:, None], other=0.0)
        c0, d0, z0, cost, e0 = _group(0, x0, w0, s, o, metric, table, factor, grid, signs, halves, entries, rows, tile)
        if groups > 1:
            x1 = tl.load(t + 8, mask=mask[:, None], other=0.0) + _times(e0, u + 8, n)
            w1 = tl.load(v + 8, mask=mask[:, None], other=0.0)
            c1, d1, z1, more, e1 = _group(
                1, x1, w1, s, o, metric, table, factor, grid, signs, halves, entries, rows, tile
            )
            cost += more
        if groups > 2:
            x2 = tl.load(t + 16, mask=mask[:, None], other=0.0) + _times(e0, u + 16, n) + _times(e1, u + 8 * n + 16, n)
            w2 = tl.load(v + 16, mask=mask[:, None], other=0.0)
            c2, d2, z2, more, e2 = _group(
                2, x2, w2, s, o, metric, table, factor, grid, signs, halves, entries, rows, tile
            )
            cost += more
            x3 = tl.load(t + 24, mask=mask[:, None], other=0.0) + _times(e0, u + 24, n) + _times(e1, u + 8 * n + 24, n)
            x3 += _times(e2, u + 16 * n + 24, n)
            w3 = tl.load(v + 24, mask=mask[:, None], other=0.0)
            c3, d3, z3, more, _ = _group(
                3, x3, w3, s, o, metric, table, factor, grid, signs, halves, entries, rows, tile
            )
            cost += more
        better = cost < least
        least = tl.where(better, cost, least)
        best_code = tl.where(better, code, best_code)
        best_shift = tl.where(better, shift, best_shift)
        a0, b0, s0 = tl.where(better, c0, a0), tl.where(better, d0, b0), tl.where(better, z0, s0)
        if groups > 1:
            a1, b1, s1 = tl.where(better, c1, a1), tl.where(better, d1, b1), tl.where(better, z1, s1)
        if groups > 2:
            a2, b2, s2 = tl.where(better, c2, a2), tl.where(better, d2, b2), tl.where(better, z2, s2)
            a3, b3, s3 = tl.where(better, c3, a3), tl.where(better, d3, b3), tl.where(better, z3, s3)
    index = start // (groups * 8)
    tl.store(scale + at * (n // (groups * 8)) + index, best_code, mask=mask)
    tl.store(offset + at * (n // (groups * 8)) + index, best_shift, mask=mask)
    s = step * tl.load(multipliers + best_code)
    o = s * tl.load(shifts + best_shift)
    _put(0, at, start, n, s, o, a0, b0, s0, mask, grid, entry, sign, value, q, signs, halves, entries)
    if groups > 1:
        _put(1, at, start, n, s, o, a1, b1, s1, mask, grid, entry, sign, value, q, signs, halves, entries)
    if groups > 2:
        _put(2, at, start, n, s, o, a2, b2, s2, mask, grid, entry, sign, value, q, signs, halves, entries)
        _put(3, at, start, n, s, o, a3, b3, s3, mask, grid, entry, sign, value, q, signs, halves, entries)


@triton.jit
def _descend(
    g: tl.constexpr,
    at,
    start,
    n,
    gradient,
    s,
    o,
    mask,
    metric,
    inverse,
    table,
    factor,
    grid,
    entry,
    sign,
    value,
    q,
    change,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Revise group g for its current gradient; stores what decreased and returns the change of q."""
    k = tl.arange(0, 8)
    here = at[:, None] * n + start + g * 8 + k[None, :]
    old = tl.load(q + here, mask=mask[:, None], other=0.0)
    aim = old - _times(gradient, inverse + g * 64, 8)
    a, b, bits, v, cost = _search(
        aim - o[:, None],
        s,
        metric + g * 64,
        table + g * halves * 16 * entries,
        factor + g * halves,
        grid,
        signs,
        halves,
        entries,
        rows,
        tile,
    )
    r = old - aim
    better = (cost < tl.sum(_times(r, metric + g * 64, 8) * r, axis=1) * (1 - 1e-6)) & mask
    _put(g, at, start, n, s, o, a, b, bits, better, grid, entry, sign, value, q, signs, halves, entries)
    moved = tl.where(better[:, None], s[:, None] * v + o[:, None] - old, 0.0)
    tl.store(change + at[:, None] * 256 + g * 8 + k[None, :], moved, mask=mask[:, None])
    return moved


@triton.jit(do_not_specialize=["superblock"])
def _descent(
    gradient,
    change,
    q,
    value,
    entry,
    sign,
    scale,
    offset,
    d,
    multipliers,
    shifts,
    metric,
    inverse,
    table,
    factor,
    grid,
    hessian,
    n,
    r,
    lo,
    start,
    superblock,
    per_block: tl.constexpr,
    signs: tl.constexpr,
    halves: tl.constexpr,
    entries: tl.constexpr,
    rows: tl.constexpr,
    tile: tl.constexpr,
):
    """Coordinate descent over four groups of 8 columns at `start`, under the scales that they have."""
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    k = tl.arange(0, 8)
    metric += e * (32 * 64) + lo * 8
    inverse += e * (32 * 64) + lo * 8
    table += (e * 32 + lo // 8) * halves * 16 * entries
    factor += (e * 32 + lo // 8) * halves
    hessian += e * n * n + start * n + start
    change += lo
    t = gradient + at[:, None] * 256 + lo + k[None, :]
    step = tl.load(d + at * (n // 256) + superblock, mask=mask, other=0.0)
    index = at * (n // (per_block * 8)) + start // (per_block * 8)
    s = step * tl.load(multipliers + tl.load(scale + index, mask=mask, other=0))
    o = s * tl.load(shifts + tl.load(offset + index, mask=mask, other=0))
    g0 = tl.load(t, mask=mask[:, None], other=0.0)
    m0 = _descend(
        0,
        at,
        start,
        n,
        g0,
        s,
        o,
        mask,
        metric,
        inverse,
        table,
        factor,
        grid,
        entry,
        sign,
        value,
        q,
        change,
        signs,
        halves,
        entries,
        rows,
        tile,
    )
    g1 = tl.load(t + 8, mask=mask[:, None], other=0.0) + _times(m0, hessian + 8, n)
    m1 = _descend(
        1,
        at,
        start,
        n,
        g1,
        s,
        o,
        mask,
        metric,
        inverse,
        table,
        factor,
        grid,
        entry,
        sign,
        value,
        q,
        change,
        signs,
        halves,
        entries,
        rows,
        tile,
    )
    if per_block == 2:
        s = step * tl.load(multipliers + tl.load(scale + index + 1, mask=mask, other=0))
        o = s * tl.load(shifts + tl.load(offset + index + 1, mask=mask, other=0))
    g2 = (
        tl.load(t + 16, mask=mask[:, None], other=0.0)
        + _times(m0, hessian + 16, n)
        + _times(m1, hessian + 8 * n + 16, n)
    )
    m2 = _descend(
        2,
        at,
        start,
        n,
        g2,
        s,
        o,
        mask,
        metric,
        inverse,
        table,
        factor,
        grid,
        entry,
        sign,
        value,
        q,
        change,
        signs,
        halves,
        entries,
        rows,
        tile,
    )
    g3 = (
        tl.load(t + 24, mask=mask[:, None], other=0.0)
        + _times(m0, hessian + 24, n)
        + _times(m1, hessian + 8 * n + 24, n)
    )
    g3 += _times(m2, hessian + 16 * n + 24, n)
    _descend(
        3,
        at,
        start,
        n,
        g3,
        s,
        o,
        mask,
        metric,
        inverse,
        table,
        factor,
        grid,
        entry,
        sign,
        value,
        q,
        change,
        signs,
        halves,
        entries,
        rows,
        tile,
    )


def padded_grid(fmt: Format, device: torch.device) -> torch.Tensor:
    """The codebook as [8 / width, entries, 8], each half in its own columns."""
    grid, halves = tables(fmt, device).grid, GROUP // fmt.width
    out = torch.zeros(halves, len(grid), GROUP, device=device)
    for half in range(halves):
        out[half, :, half * fmt.width : (half + 1) * fmt.width] = grid
    return out


def score_tables(fmt: Format, metric: torch.Tensor, grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Right-hand sides of the search for every group of a superblock: float16 [E, 32 · halves, 16, entries], and the
    factor that brings a row's linear terms to their scale [E, 32 · halves]. metric [E, 32, 8, 8]."""
    e, groups = metric.shape[:2]
    halves, entries, _ = grid.shape
    size = grid.abs().max()
    if fmt.signs == "grid":
        bias = ((grid @ metric.view(-1, GROUP, GROUP)) * grid).sum(-1)  # [E · 32, entries]
    else:
        bias = torch.einsum("egk,hmk->eghm", metric.diagonal(dim1=-2, dim2=-1), grid**2).reshape(-1, entries)
    unit = bias.amax(-1).clamp_min(1e-30)
    table = torch.zeros(e, groups, halves, 16, entries, dtype=torch.float16, device=metric.device)
    table[..., :GROUP, :] = (grid / size).mT
    flat = table.view(-1, 16, entries)
    scaled = bias / unit[:, None]
    flat[:, 8] = scaled
    flat[:, 9] = scaled - flat[:, 8]
    flat[:, 10:12] = 1
    return table, size / unit


def feedback_block(fmt: Format, state, w, target, factor: Factor, metric, prepared, codes, start: int, lo: int) -> None:
    """Encode the block of every row at column `start` into the state.

    prepared: (grid, *score_tables); codes: int32 [E, R, blocks, K] what to try, scale + 256 · shift.
    """
    e, r, n = w.shape
    t, (grid, table, unit) = tables(fmt, w.device), prepared
    _feedback[(triton.cdiv(r, ROWS), e)](
        target,
        w,
        state.q,
        state.value,
        state.entry,
        state.sign,
        state.scale,
        state.offset,
        state.d,
        codes,
        t.multipliers,
        t.shifts,
        metric,
        table,
        unit,
        grid,
        factor.u,
        n,
        r,
        lo,
        start,
        start // SUPERBLOCK,
        codes.shape[-1],
        SUPERBLOCK // fmt.block,
        fmt.block // GROUP,
        SIGNS[fmt.signs],
        GROUP // fmt.width,
        len(t.grid),
        ROWS,
        min(TILE, len(t.grid)),
        num_warps=WARPS,
    )


def descent_block(fmt: Format, state, gradient, change, h, metric, inverse, prepared, start: int, lo: int) -> None:
    """Revise 32 columns of every row, `lo` in their superblock; the change of q goes to change [E, R, 256]."""
    e, r, n = state.q.shape
    t, (grid, table, unit) = tables(fmt, h.device), prepared
    _descent[(triton.cdiv(r, ROWS), e)](
        gradient,
        change,
        state.q,
        state.value,
        state.entry,
        state.sign,
        state.scale,
        state.offset,
        state.d,
        t.multipliers,
        t.shifts,
        metric,
        inverse,
        table,
        unit,
        grid,
        h,
        n,
        r,
        lo,
        start,
        start // SUPERBLOCK,
        fmt.block // GROUP,
        SIGNS[fmt.signs],
        GROUP // fmt.width,
        len(t.grid),
        ROWS,
        min(TILE, len(t.grid)),
        num_warps=WARPS,
    )


@triton.jit(do_not_specialize=["first", "count", "k", "width"])
def _products(image, unit, a, r, n, first, count, k, width, kinds: tl.constexpr, rows: tl.constexpr):
    """One superblock of image [E, R, 256 count] against that of unit [E, R, kinds, n] it stands for: row k of A."""
    e, block = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = e * r + row
    column = block * 256 + tl.arange(0, 256)
    x = tl.load(image + at[:, None] * (count * 256) + column[None, :], mask=mask[:, None], other=0.0).to(tl.float32)
    for kind in tl.static_range(kinds):
        right = unit + (at[:, None] * kinds + kind) * n + first * 256 + column[None, :]
        y = tl.load(right, mask=mask[:, None], other=0.0).to(tl.float32)
        tl.store(a + (at * width + k) * width + (first + block) * kinds + kind, tl.sum(x * y, axis=1), mask=mask)


def products(image, unit, a, k: int) -> None:
    """Twin of the sums in refit.normal_equations: fills a[..., k, :] [E, R, K, K] from superblock k // kinds on."""
    e, r, kinds, n = unit.shape
    count = image.shape[-1] // SUPERBLOCK
    _products[(triton.cdiv(r, 16), e, count)](image, unit, a, r, n, k // kinds, count, k, a.shape[-1], kinds, 16)
