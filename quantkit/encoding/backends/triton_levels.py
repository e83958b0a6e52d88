"""Triton: Q2_K … Q6_K and IQ4_XS with feedback, a block of every row in one launch.

The plain twins are guess.fit_mins and fit_signed (`_fits`), reference.Backend.superblock (`_feedback`, which also
renews the scale codes as guess.refresh does) and descend_groups (`_descent`). A weight is rounded after the errors of
those before it are known, so a thread takes a row and goes through its columns one by one; the superblock in hand is
kept as [E, 256, R], where neighbouring threads read neighbouring addresses. What all rows share (metric, U, H) is read
as scalars from small tensors that stay in cache. A group's columns are tuples of registers; the loops around it run on
the device: unrolled, they would take minutes to compile.
"""

# mypy: disable-error-code="assignment"
# (Triton's tuples grow in loops.)

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.codecs.format import SUPERBLOCK, Format, table
from quantkit.encoding.guess import min_stretches, signed_stretches
from quantkit.encoding.state import near_mins

WARPS = 2
ROWS = 32 * WARPS  # a row per thread
SPAN = 32  # columns that one launch of the descent revises
LAUNCH = {"num_warps": WARPS, "num_stages": 1}
HALF: tl.constexpr = tl.constexpr(12582912.0)  # 1.5 · 2²³: added and taken away, it rounds |y| < 2²² half to even
TINY: tl.constexpr = tl.constexpr(1e-30)  # what a scale must exceed for its inverse to be of use


class How(NamedTuple):
    """Constants of a type. low, high: levels. uneven: they are not 1 apart. tries: stretches of a fit. first, top: the
    lowest multiplier, the highest scale code. near, near_min: neighbours of the scale code and of the min to try."""

    block: int
    low: float
    high: float
    uneven: bool
    tries: int
    n_mins: int
    first: float
    top: int
    near: int
    near_min: int
    rows: int


class Fitting(NamedTuple):
    """What a fit takes: multiples of the peak (or of the range) to try; Format.half_steps of uneven levels."""

    stretches: torch.Tensor
    halves: torch.Tensor


class Columns(NamedTuple):
    """A superblock of every row, float32 [E, 256, R]: targets and weights; what was chosen, and its error w − q."""

    target: torch.Tensor
    w: torch.Tensor
    value: torch.Tensor
    error: torch.Tensor


class Steps(NamedTuple):
    """Codes int32 [E, blocks, R], to be chosen, and what they multiply: d, dmin [E, R]."""

    scale: torch.Tensor
    offset: torch.Tensor
    d: torch.Tensor
    dmin: torch.Tensor


class Metric(NamedTuple):
    """weights [E, 256]: the metric's diagonal; upper [E, 32, 8, 8], diagonal [E, 32, 8]: its factors; u [E, blocks,
    block, block]: U within each block."""

    weights: torch.Tensor
    upper: torch.Tensor
    diagonal: torch.Tensor
    u: torch.Tensor


class Descent(NamedTuple):
    """gradient of half the cost and value [E, 256, R]; change of q [E, 32, R]; s [E, blocks, R]."""

    gradient: torch.Tensor
    value: torch.Tensor
    change: torch.Tensor
    s: torch.Tensor


class Curvature(NamedTuple):
    """inverse, upper [E, 32, 8, 8], diagonal [E, 32, 8]: H's blocks, inverted and factored; h [E, 8, 32, 32]: larger
    blocks of H."""

    inverse: torch.Tensor
    upper: torch.Tensor
    diagonal: torch.Tensor
    h: torch.Tensor


@triton.jit
def _round(y, halves, how: tl.constexpr):
    """Format.round_to_levels; halves: Format.half_steps of uneven levels."""
    y = tl.minimum(tl.maximum(y, how.low), how.high)
    if how.uneven:
        y = tl.load(halves + ((y - how.low) * 2).to(tl.int32))
    else:
        y = (y + HALF) - HALF
    return y


@triton.jit
def _code(value, step, low: tl.constexpr, high: tl.constexpr):
    """guess._codes, less `low`."""
    y = tl.minimum(tl.maximum(value / tl.where(step == 0, 1.0, step), low), high)
    return ((y + HALF) - HALF - low).to(tl.int32)


@triton.jit
def _fit_signed(x, stride, mask, weights, fitting, how: tl.constexpr):
    """guess.fit_signed of one block: columns [rows] at x, `stride` apart, weights [block] -> s [rows]."""
    stretches, halves = fitting
    tries: tl.constexpr = how.tries
    block: tl.constexpr = how.block
    rows: tl.constexpr = how.rows
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
                v = _round(t * inverse, halves, how)
                wv = v * tl.load(weights + k + j)
                xq += wv * t
                qq += wv * v
        s = xq / tl.maximum(qq, TINY)
        better = xq * s > best
        best, best_s = tl.where(better, xq * s, best), tl.where(better, s, best_s)
    return best_s


@triton.jit
def _fit_mins(x, stride, mask, weights, stretches, how: tl.constexpr):
    """guess.fit_mins of one block: (s, m). Two rounds for each of the stretches."""
    tries: tl.constexpr = how.tries
    block: tl.constexpr = how.block
    rows: tl.constexpr = how.rows
    top: tl.constexpr = how.high
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
def _fits(target, weights, fitting, fits, r, how: tl.constexpr):
    """Scale and min (the two `fits` [E, blocks, R]) of one block of `rows` rows of matrix e; target [E, 256, R],
    weights [E, 256]."""
    s, m = fits
    block: tl.constexpr = how.block
    rows: tl.constexpr = how.rows
    e, b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    mask = row < r
    x = target + (e * 256 + b * block) * r + row
    weights += e * 256 + b * block
    at = (e * (256 // block) + b) * r + row
    if how.n_mins > 0:
        fit, low_fit = _fit_mins(x, r, mask, weights, fitting.stretches, how)
        tl.store(m + at, low_fit, mask=mask)
    else:
        fit = _fit_signed(x, r, mask, weights, fitting, how)
    tl.store(s + at, fit, mask=mask)


@triton.jit
def _eight(x, stride, mask):
    """The tuple of eight columns [rows] at x, `stride` apart."""
    out = ()
    for j in tl.static_range(8):
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
def _feedback(columns, steps, metric, fitting, r, b, how: tl.constexpr):
    """Block b of a superblock for `rows` rows of matrix e: scale codes around those that fit its target, every one
    tried with feedback between the block's columns, and once more the cheapest, whose value and error stay."""
    target, w, value, error = columns
    weights, upper, diagonal, u = metric
    halves = fitting.halves
    near: tl.constexpr = how.near
    near_min: tl.constexpr = how.near_min
    block: tl.constexpr = how.block
    n_mins: tl.constexpr = how.n_mins
    first: tl.constexpr = how.first
    top: tl.constexpr = how.top
    rows: tl.constexpr = how.rows
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
    step = tl.load(steps.d + e * r + row, mask=mask, other=0.0)
    low_step = tl.load(steps.dmin + e * r + row, mask=mask, other=0.0)
    if n_mins > 0:
        fit, low_fit = _fit_mins(target, r, mask, weights, fitting.stretches, how)
        middle = _code(low_fit, low_step, 0.0, n_mins - 1.0)
    else:
        fit = _fit_signed(target, r, mask, weights, fitting, how)
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
                v = _round(y * inverse, halves, how)
                q = s * v
                cost += tl.load(diagonal + g + j) * (y - q) * (y - q)
                inner = inner + (fed - q,)
                tl.store(error + (g + j) * r, old[j] - q - o, mask=mask)
                tl.store(value + (g + j) * r, v, mask=mask & last)
        better = cost < least
        least = tl.where(better, cost, least)
        best_code, best_low = tl.where(better, code, best_code), tl.where(better, low_code, best_low)
    index = (e * (256 // block) + b) * r + row
    tl.store(steps.scale + index, best_code, mask=mask)
    tl.store(steps.offset + index, best_low, mask=mask)


@triton.jit(do_not_specialize=["part"])
def _descent(descent, curvature, halves, r, part, how: tl.constexpr):
    """Revise 32 columns (number `part` of a superblock), a group of 8 after the other: value where the cost falls, and
    the change of q."""
    gradient, value, change, s = descent
    inverse, upper, diagonal, h = curvature
    block: tl.constexpr = how.block
    rows: tl.constexpr = how.rows
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
            v = _round(y * reciprocal, halves, how)
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
def fitting_of(fmt: Format, device: torch.device) -> Fitting:
    """Constants of the fits of a type."""
    stretches = min_stretches(fmt) if fmt.n_mins else signed_stretches(fmt)
    return Fitting(table(stretches, device), table([0] if fmt.half_steps is None else fmt.half_steps, device))


@cache
def _how(fmt: Format, near: int, rows: int) -> How:
    low, high, tries = fmt.levels[0], fmt.levels[-1], len(min_stretches(fmt) if fmt.n_mins else signed_stretches(fmt))
    kind = fmt.block, low, high, fmt.half_steps is not None, tries, fmt.n_mins
    return How(*kind, fmt.multipliers[0], len(fmt.multipliers) - 1, near, near_mins(fmt, near), rows)


def fit(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale and min (0 without mins) of each block: x [E, 256, N], weights [E, 256] -> [E, N, blocks]."""
    e, _, n = x.shape
    s, m = torch.zeros(2, e, SUPERBLOCK // fmt.block, n, device=x.device)
    programs = triton.cdiv(n, ROWS), e, SUPERBLOCK // fmt.block
    _fits[programs](x, weights, fitting_of(fmt, x.device), (s, m), n, _how(fmt, 0, ROWS), **LAUNCH)
    return s.mT, m.mT


def feedback_block(fmt: Format, b: int, near: int, columns: Columns, steps: Steps, metric: Metric) -> None:
    """Encode block b of a superblock: fills its part of value, error and the codes."""
    e, _, r = columns.target.shape
    fitting = fitting_of(fmt, columns.target.device)
    _feedback[(triton.cdiv(r, ROWS), e)](columns, steps, metric, fitting, r, b, _how(fmt, near, ROWS), **LAUNCH)


def descent_part(fmt: Format, part: int, descent: Descent, curvature: Curvature) -> None:
    """Revise value in columns 32 · part …, and say how q changes."""
    e, _, r = descent.gradient.shape
    halves = fitting_of(fmt, descent.gradient.device).halves
    _descent[(triton.cdiv(r, ROWS), e)](descent, curvature, halves, r, part, _how(fmt, 0, ROWS), **LAUNCH)
