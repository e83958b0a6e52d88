"""Triton: Q2_K … Q6_K and IQ4_XS with feedback, a block of every row in one launch.

The plain twins are `scales.fit_mins` and `fit_signed` (`_fits`), `engine._superblock` (`_feedback`, which also renews
the scale codes as `scales.refresh` does) and `engine.descent_pass` with spans of 8 (`_descent`). A weight is rounded
after the errors of those before it are known, so a thread takes a row and goes through its columns one by one; the
superblock in hand is kept as [E, 256, R], where neighbouring threads read neighbouring addresses. What all rows share
(metric, U, H) is read as scalars from small tensors that stay in cache. A group's columns are tuples of registers; the
loops around it run on the device: unrolled, they would take minutes to compile.
"""

from functools import cache

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import SUPERBLOCK, Format, table
from quantkit.encoding.guess import Guess, block_scale, min_stretches, share, signed_stretches
from quantkit.encoding.hessian import GROUP, Factor, blocks
from quantkit.encoding.search import half_steps, tables, unit_upper

WARPS = 2
ROWS = 32 * WARPS  # a row per thread
SPAN = 32  # columns that one launch of the descent revises
LAUNCH = {"num_warps": WARPS, "num_stages": 1}
HALF: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 · 2²³: added and taken away, it rounds |y| < 2²² half to even
TINY: tl.constexpr = tl.constexpr(1e-30)  # what a scale must exceed for its inverse to be of use


@triton.jit
def _round(y, halves, low: tl.constexpr, high: tl.constexpr, uneven: tl.constexpr):
    """search.round_to_levels; halves: search.half_steps of uneven levels."""
    y = tl.minimum(tl.maximum(y, low), high)
    if uneven:
        y = tl.load(halves + ((y - low) * 2).to(tl.int32))
    else:
        y = (y + HALF) - HALF
    return y


@triton.jit
def _code(value, step, low: tl.constexpr, high: tl.constexpr):
    """scales._codes, less `low`."""
    y = tl.minimum(tl.maximum(value / tl.where(step == 0, 1.0, step), low), high)
    return ((y + HALF) - HALF - low).to(tl.int32)


@triton.jit
def _fit_signed(
    x,
    stride,
    mask,
    weights,
    stretches,
    halves,
    tries: tl.constexpr,
    block: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    uneven: tl.constexpr,
    rows: tl.constexpr,
):
    """scales.fit_signed of one block: columns [rows] at x, `stride` apart, weights [block] -> s [rows]. stretches
    [tries] are multiples of the peak."""
    zero = tl.zeros([rows], tl.float32)
    peak, best, best_s = zero, zero, zero
    for k in range(0, block, 8):
        for j in tl.static_range(8):
            t = tl.load(x + (k + j) * stride, mask=mask, other=0.0)
            peak = tl.where(tl.abs(t) > tl.abs(peak), t, peak)
    for i in range(tries):
        s = peak * tl.load(stretches + i)
        inverse = 1.0 / tl.where(tl.abs(s) > TINY, s, 1.0)
        xq, qq = zero, zero
        for k in range(0, block, 8):
            for j in tl.static_range(8):
                t = tl.load(x + (k + j) * stride, mask=mask, other=0.0)
                v = _round(t * inverse, halves, low, high, uneven)
                wv = v * tl.load(weights + k + j)
                xq += wv * t
                qq += wv * v
        s = xq / tl.maximum(qq, TINY)
        better = xq * s > best
        best, best_s = tl.where(better, xq * s, best), tl.where(better, s, best_s)
    return best_s


@triton.jit
def _fit_mins(
    x, stride, mask, weights, stretches, tries: tl.constexpr, block: tl.constexpr, top: tl.constexpr, rows: tl.constexpr
):
    """scales.fit_mins of one block: (s, m). Two rounds for each of the `tries` stretches."""
    zero = tl.zeros([rows], tl.float32)
    low, high, sx, sxx, sw = zero, zero, zero, zero, zero
    for k in range(0, block, 8):
        for j in tl.static_range(8):
            t = tl.load(x + (k + j) * stride, mask=mask, other=0.0)
            weight = tl.load(weights + k + j)
            low, high = tl.minimum(low, t), tl.maximum(high, t)
            sw += weight
            sx += weight * t
            sxx += weight * t * t
    sw = tl.maximum(sw, TINY)
    step = (high - low) / top
    best, best_s, best_m = zero + float("inf"), step, -low
    s, m = step, -low
    for i in range(2 * tries):
        stretch = tl.load(stretches + i // 2)
        s, m = tl.where(i % 2 == 0, step * stretch, s), tl.where(i % 2 == 0, -low * stretch, m)
        inverse = 1.0 / tl.where(s > TINY, s, 1.0)
        sq, sqq, sxq = zero, zero, zero
        for k in range(0, block, 8):
            for j in tl.static_range(8):
                t = tl.load(x + (k + j) * stride, mask=mask, other=0.0)
                v = (tl.minimum(tl.maximum((t + m) * inverse, 0.0), top) + HALF) - HALF
                wv = v * tl.load(weights + k + j)
                sq += wv
                sqq += wv * v
                sxq += wv * t
        det = sw * sqq - sq * sq
        s = tl.where(det > 1e-12 * sw * sqq, (sw * sxq - sq * sx) / tl.maximum(det, TINY), s)
        m = (sq * s - sx) / sw
        s = tl.maximum(tl.where(m < 0, sxq / tl.maximum(sqq, TINY), s), 0.0)  # m < 0: then the best without a min
        m = tl.maximum(m, 0.0)
        cost = s * (s * sqq - 2 * (m * sq + sxq)) + m * (m * sw + 2 * sx) + sxx
        better = cost < best
        best = tl.where(better, cost, best)
        best_s, best_m = tl.where(better, s, best_s), tl.where(better, m, best_m)
    return best_s, best_m


@triton.jit
def _fits(
    target,
    weights,
    stretches,
    halves,
    s,
    m,
    r,
    tries: tl.constexpr,
    block: tl.constexpr,
    n_mins: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    uneven: tl.constexpr,
    rows: tl.constexpr,
):
    """Scale and min of one block of `rows` rows of matrix e; target [E, 256, R], weights [E, 256]."""
    e, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    x = target + (e * 256 + b * block) * r + row
    weights += e * 256 + b * block
    at = (e * (256 // block) + b) * r + row
    if n_mins > 0:
        fit, low_fit = _fit_mins(x, r, mask, weights, stretches, tries, block, high, rows)
        tl.store(m + at, low_fit, mask=mask)
    else:
        fit = _fit_signed(x, r, mask, weights, stretches, halves, tries, block, low, high, uneven, rows)
    tl.store(s + at, fit, mask=mask)


@triton.jit
def _eight(x, stride, mask):
    """The tuple of eight columns [rows] at x, `stride` apart."""
    out = (tl.load(x, mask=mask, other=0.0),)
    for j in tl.static_range(1, 8):
        out = out + (tl.load(x + j * stride, mask=mask, other=0.0),)
    return out


@triton.jit
def _add(x, rows, m, stride):
    """x + rows · the 8×8 matrix at m; x, rows: tuples of eight columns."""
    out = ()
    for j in tl.static_range(8):
        y = x[j]
        for i in tl.static_range(8):
            y += rows[i] * tl.load(m + i * stride + j)
        out = out + (y,)
    return out


@triton.jit(do_not_specialize=["b"])  # or 0 and 1 would be compiled for themselves
def _feedback(
    target,
    w,
    value,
    error,
    scale,
    offset,
    d,
    dmin,
    stretches,
    halves,
    weights,
    upper,
    diagonal,
    u,
    r,
    b,
    near: tl.constexpr,
    near_min: tl.constexpr,
    tries: tl.constexpr,
    block: tl.constexpr,
    n_mins: tl.constexpr,
    first: tl.constexpr,
    top: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    uneven: tl.constexpr,
    rows: tl.constexpr,
):
    """Block b of a superblock for `rows` rows of matrix e: scale codes around those that fit its target, every one
    tried with feedback between the block's columns, and once more the cheapest, whose value and error stay."""
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = (e * 256 + b * block) * r + row
    target += at
    w += at
    value += at
    error += at
    weights += e * 256 + b * block
    diagonal += e * 256 + b * block
    upper += (e * 256 + b * block) * 8
    u += (e * 256 + b * block) * block
    step = tl.load(d + e * r + row, mask=mask, other=0.0)
    low_step = tl.load(dmin + e * r + row, mask=mask, other=0.0)
    if n_mins > 0:
        fit, low_fit = _fit_mins(target, r, mask, weights, stretches, tries, block, high, rows)
        middle = _code(low_fit, low_step, 0.0, n_mins - 1.0)
    else:
        fit = _fit_signed(target, r, mask, weights, stretches, halves, tries, block, low, high, uneven, rows)
        middle = tl.zeros([rows], tl.int32)
    center = _code(fit, step, first, first + top)
    least = tl.full([rows], float("inf"), tl.float32)
    best_code, best_low = center, middle
    pairs: tl.constexpr = (2 * near + 1) * (2 * near_min + 1)
    for h in range(pairs + 1):
        last = h == pairs
        code = tl.minimum(tl.maximum(center + (h // (2 * near_min + 1) - near), 0), top)
        code = tl.where(last, best_code, code)
        low_code = middle
        if n_mins > 0:
            low_code = tl.minimum(tl.maximum(middle + (h % (2 * near_min + 1) - near_min), 0), n_mins - 1)
            low_code = tl.where(last, best_low, low_code)
        s = step * (code.to(tl.float32) + first)
        o = -low_step * low_code.to(tl.float32)
        inverse = 1.0 / tl.where(s == 0, 1.0, s)
        cost = tl.zeros([rows], tl.float32)
        for g in range(0, block, 8):
            x, old = _eight(target + g * r, r, mask), _eight(w + g * r, r, mask)
            for k in range(0, g, 8):  # written by this very thread
                x = _add(x, _eight(error + k * r, r, mask), u + k * block + g, block)
            inner = ()
            for j in tl.static_range(8):
                y = x[j] - o
                fed = y
                for i in tl.static_range(j):
                    y += inner[i] * tl.load(upper + g * 8 + i * 8 + j)
                v = _round(y * inverse, halves, low, high, uneven)
                q = s * v
                cost += tl.load(diagonal + g + j) * (y - q) * (y - q)
                inner = inner + (fed - q,)
                tl.store(error + (g + j) * r, old[j] - q - o, mask=mask)
                tl.store(value + (g + j) * r, v, mask=mask & last)
        better = cost < least
        least = tl.where(better, cost, least)
        best_code, best_low = tl.where(better, code, best_code), tl.where(better, low_code, best_low)
    index = (e * (256 // block) + b) * r + row
    tl.store(scale + index, best_code, mask=mask)
    tl.store(offset + index, best_low, mask=mask)


@triton.jit(do_not_specialize=["part"])
def _descent(
    gradient,
    value,
    change,
    s,
    halves,
    inverse,
    upper,
    diagonal,
    h,
    r,
    part,
    block: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    uneven: tl.constexpr,
    rows: tl.constexpr,
):
    """Revise 32 columns (number `part` of a superblock), a group of 8 after the other: value where the cost falls, and
    the change of q; gradient of half the cost [E, 256, R]."""
    e = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    at = (e * 256 + part * 32) * r + row
    gradient += at
    value += at
    change += e * 32 * r + row
    diagonal += e * 256 + part * 32
    upper += (e * 256 + part * 32) * 8
    inverse += (e * 256 + part * 32) * 8
    h += (e * 256 + part * 32) * 32
    for g in range(0, 32, 8):
        scale = tl.load(s + (e * (256 // block) + (part * 32 + g) // block) * r + row, mask=mask, other=0.0)
        reciprocal = 1.0 / tl.where(scale == 0, 1.0, scale)
        slope, old = _eight(gradient + g * r, r, mask), _eight(value + g * r, r, mask)
        for k in range(0, g, 8):  # written by this very thread
            slope = _add(slope, _eight(change + k * r, r, mask), h + k * 32 + g, 32)
        cost, bound = tl.zeros([rows], tl.float32), tl.zeros([rows], tl.float32)
        new, inner, before = (), (), ()
        for j in tl.static_range(8):
            back = slope[0] * tl.load(inverse + g * 8 + j)
            for i in tl.static_range(1, 8):
                back += slope[i] * tl.load(inverse + g * 8 + i * 8 + j)
            y, z = scale * old[j] - back, back
            fed = y
            for i in tl.static_range(j):
                factor = tl.load(upper + g * 8 + i * 8 + j)
                y += inner[i] * factor
                z += before[i] * factor
            v = _round(y * reciprocal, halves, low, high, uneven)
            q = scale * v
            weight = tl.load(diagonal + g + j)
            cost += weight * (y - q) * (y - q)
            bound += weight * z * z
            new, inner, before = new + (v,), inner + (fed - q,), before + (back,)
        better = cost < bound * (1 - 1e-6)
        for j in tl.static_range(8):
            tl.store(value + (g + j) * r, new[j], mask=mask & better)
            tl.store(change + (g + j) * r, tl.where(better, scale * (new[j] - old[j]), 0.0), mask=mask)


@cache
def constants(fmt: Format, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """What the kernels take as stretches, as halves, and by name."""
    low, high, halves = fmt.levels[0], fmt.levels[-1], half_steps(fmt)
    stretches = min_stretches(fmt) if fmt.n_mins else signed_stretches(fmt)
    named = {"block": fmt.block, "low": low, "high": high, "uneven": halves is not None, **LAUNCH}
    return table(stretches, device), table([0] if halves is None else halves, device), named


def fit(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and min (0 without mins) of each block: x [E, 256, N], weights [E, 256] -> [E, N, blocks]."""
    e, _, n = x.shape
    stretches, halves, named = constants(fmt, x.device)
    s, m = torch.zeros(2, e, SUPERBLOCK // fmt.block, n, device=x.device)
    _fits[(triton.cdiv(n, ROWS), e, SUPERBLOCK // fmt.block)](
        x, weights, stretches, halves, s, m, n, tries=len(stretches), n_mins=fmt.n_mins, rows=ROWS, **named
    )
    return s.mT, m.mT


def guess(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> Guess:
    """As scales.guess, but of x [E, 256, N]; weights [E, 256]."""
    return share(fmt, *fit(fmt, x, weights), weights.view(len(weights), 1, -1, fmt.block).sum(-1))


def feedback_block(
    fmt: Format, b: int, near: int, target, w, value, error, scale, offset, d, dmin, weights, upper, diagonal, u
) -> None:
    """Encode block b of a superblock: target, w [E, 256, R] -> its part of value and error (w − q), and of the codes
    scale, offset int32 [E, blocks, R].

    d, dmin [E, R]; weights [E, 256]: the metric's diagonal; upper [E, 32, 8, 8], diagonal [E, 32, 8]: its factors; u
    [E, blocks, block, block]: U within each block.
    """
    e, _, r = target.shape
    stretches, halves, named = constants(fmt, target.device)
    _feedback[(triton.cdiv(r, ROWS), e)](
        target,
        w,
        value,
        error,
        scale,
        offset,
        d,
        dmin,
        stretches,
        halves,
        weights,
        upper,
        diagonal,
        u,
        r,
        b,
        near=near,
        near_min=near if fmt.n_mins == 16 else 0,
        tries=len(stretches),
        n_mins=fmt.n_mins,
        first=fmt.multipliers[0],
        top=len(fmt.multipliers) - 1,
        rows=ROWS,
        **named,
    )


def descent_part(fmt: Format, part: int, gradient, value, change, s, inverse, upper, diagonal, h) -> None:
    """Revise value [E, 256, R] in columns 32 · part …, and say how q changes: [E, 32, R].

    gradient [E, 256, R]; s [E, blocks, R]; inverse, upper [E, 32, 8, 8], diagonal [E, 32, 8]: H's blocks, inverted and
    factored; h [E, 8, 32, 32]: larger blocks of H.
    """
    e, _, r = gradient.shape
    _, halves, named = constants(fmt, gradient.device)
    grid = triton.cdiv(r, ROWS), e
    _descent[grid](gradient, value, change, s, halves, inverse, upper, diagonal, h, r, part, rows=ROWS, **named)


def superblock(fmt: Format, state, w: torch.Tensor, target: torch.Tensor, factor: Factor, start: int, effort) -> None:
    """As engine._superblock with beta = 1: encode 256 columns of w [E, R, n] for target [E, R, 256] into the state."""
    part, count = slice(start, start + SUPERBLOCK), SUPERBLOCK // fmt.block
    metric = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
    weights = metric.diagonal(dim1=-2, dim2=-1).reshape(len(w), SUPERBLOCK)
    upper, diagonal = (t.contiguous() for t in unit_upper(metric))
    u = blocks(factor.u[:, part, part], fmt.block)
    target, old = target.mT.contiguous(), w[..., part].mT.contiguous()
    first = guess(fmt, target, weights)
    d, dmin = first.d.contiguous(), first.dmin.contiguous()
    value, error = torch.empty_like(target), torch.empty_like(target)
    scale, offset = torch.empty(2, len(w), count, w.shape[1], dtype=torch.int32, device=w.device)
    for b in range(count):
        feedback_block(
            fmt, b, effort.near, target, old, value, error, scale, offset, d, dmin, weights, upper, diagonal, u
        )
        lo, hi = b * fmt.block, (b + 1) * fmt.block
        if hi < SUPERBLOCK:
            rest = factor.u[:, start + lo : start + hi, start + hi : start + SUPERBLOCK]
            target[:, hi:].baddbmm_(rest.mT, error[:, lo:hi])
    here = slice(start // fmt.block, start // fmt.block + count)
    state.d[..., start // SUPERBLOCK], state.dmin[..., start // SUPERBLOCK] = d, dmin
    state.scale[..., here], state.offset[..., here] = scale.mT, offset.mT
    _keep(fmt, state, start, value)


def _keep(fmt: Format, state, start: int, value: torch.Tensor) -> None:
    """Levels of one superblock [E, 256, R], and what follows from them, into the state."""
    part = slice(start, start + SUPERBLOCK)
    state.value[..., part] = value.mT
    s, o = _scales(fmt, state, start)
    v = state.value[..., part].unflatten(-1, (-1, fmt.block))
    state.q[..., part] = (s[..., None] * v + o[..., None]).flatten(-2)
    if half_steps(fmt) is None:
        state.entry[..., part] = state.value[..., part] - fmt.levels[0]
    else:
        state.entry[..., part] = torch.bucketize(state.value[..., part].contiguous(), tables(fmt, value.device).levels)


def _scales(fmt: Format, state, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """s and o of a superblock's blocks: [E, R, 256 / block]."""
    sb, here = start // SUPERBLOCK, slice(start // fmt.block, (start + SUPERBLOCK) // fmt.block)
    return block_scale(fmt, state.d[..., sb], state.dmin[..., sb], state.scale[..., here], state.offset[..., here])


def descent_pass(fmt: Format, w: torch.Tensor, factor: Factor, state) -> None:
    """As engine.descent_pass with spans of 8."""
    (e, r, n), h = w.shape, factor.h
    metrics, local = blocks(h), blocks(h, SPAN)
    by_group = torch.linalg.inv(metrics), *unit_upper(metrics)
    error = state.q - w
    for start in range(0, n, SUPERBLOCK):
        part, groups = slice(start, start + SUPERBLOCK), slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
        inverse, upper, diagonal = (t[:, groups].contiguous() for t in by_group)
        near = local[:, start // SPAN : (start + SUPERBLOCK) // SPAN].contiguous()
        gradient = h[:, part] @ error.mT  # H is symmetric
        value = state.value[..., part].mT.contiguous()
        s = _scales(fmt, state, start)[0].mT.contiguous()
        change = torch.empty(e, SPAN, r, device=w.device)
        for i in range(SUPERBLOCK // SPAN):
            descent_part(fmt, i, gradient, value, change, s, inverse, upper, diagonal, near)
            lo, hi = start + i * SPAN, start + (i + 1) * SPAN
            gradient[:, hi - start :].baddbmm_(h[:, lo:hi, hi : part.stop].mT, change)
        _keep(fmt, state, start, value)
        torch.sub(state.q[..., part], w[..., part], out=error[..., part])
