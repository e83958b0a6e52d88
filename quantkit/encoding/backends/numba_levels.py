"""Types that round each weight alone on the CPU: kernels that go column by column, with LANES rows side by side.

The plain twins are guess.fit_mins and fit_signed, reference.Backend.superblock (`feedback_levels`) and descend_groups
(`descent_levels`).
"""

from typing import NamedTuple

import numpy as np

from quantkit.codecs.format import GROUP, SUPERBLOCK
from quantkit.encoding.backends.numba_jit import BIG, F, jit, part

LANES = 32


class Levels(NamedTuple):
    """A type that rounds each weight alone: its lowest and highest level, Format.half_steps, the stretches that a fit
    tries, and its constants."""

    low: np.float32
    high: np.float32
    halves: np.ndarray | None
    stretches: np.ndarray
    multipliers: np.ndarray
    n_mins: int
    block: int


class Local(NamedTuple):
    """The metric of one superblock: its diagonal [256], its factors (search.unit_upper) [32, 8, 8] and [256], and U
    [256, 256], or [0, 0] if nothing couples the columns."""

    weights: np.ndarray
    upper: np.ndarray
    diagonal: np.ndarray
    u: np.ndarray


class Curvature(NamedTuple):
    """For a descent: H [256, 256], the inverses of its blocks of 8 [32, 8, 8], and the blocks' factors."""

    h: np.ndarray
    inverse: np.ndarray
    upper: np.ndarray
    diagonal: np.ndarray


class Chosen(NamedTuple):
    """Codes and values of one superblock: scale, offset int32 [R, blocks], value, q float32 [R, 256]."""

    scale: np.ndarray
    offset: np.ndarray
    value: np.ndarray
    q: np.ndarray


@part
def _nearest_level(y, low, high, halves):
    """Rounded and clamped; halves: None for levels 1 apart, else the level for each half step above the lowest one.

    Numba compiles each kernel once for None and once for a table: a branch here would keep loops out of vectors.
    """
    if halves is None:
        return F(np.int32(min(max(y, low), high) - low + F(0.5))) + low
    return halves[np.int32((min(max(y, low), high) - low) * F(2))]


@part
def _fit_mins(x, w, stretches, top):
    """guess.fit_mins of one block: (s, m)."""
    low, high, sw, sx, sxx = F(0), F(0), F(0), F(0), F(0)
    for i in range(len(x)):
        low, high = min(low, x[i]), max(high, x[i])
        sw += w[i]
        sx += w[i] * x[i]
        sxx += w[i] * x[i] * x[i]
    best, best_s, best_m = BIG, (high - low) / top, -low
    for stretch in stretches:
        s, m = (high - low) / top * stretch, -low * stretch
        for _ in range(2):
            inverse = F(1) / s if s > 0 else F(1)
            sq, sqq, sxq = F(0), F(0), F(0)
            for i in range(len(x)):
                value = F(np.int32(min(max((x[i] + m) * inverse, F(0)), top) + F(0.5)))
                wq = w[i] * value
                sq += wq
                sqq += wq * value
                sxq += wq * x[i]
            det = sw * sqq - sq * sq
            if det > F(1e-12) * sw * sqq:
                s = (sw * sxq - sq * sx) / max(det, F(1e-30))
            m = (sq * s - sx) / sw
            if m < 0:  # then the best without a min
                s, m = sxq / max(sqq, F(1e-30)), F(0)
            s = max(s, F(0))
            cost = s * (s * sqq - F(2) * (m * sq + sxq)) + m * (m * sw + F(2) * sx) + sxx
            if cost < best:
                best, best_s, best_m = cost, s, m
    return best_s, best_m


@part
def _fit_signed(x, w, stretches, low, high, halves):
    """guess.fit_signed of one block."""
    peak = x[0]
    for i in range(len(x)):
        if abs(x[i]) > abs(peak):
            peak = x[i]
    best_s, best_gain = F(0), F(0)
    for stretch in stretches:
        s = peak * stretch
        inverse = F(1) / s if s != 0 else F(1)
        xq, qq = F(0), F(0)
        for i in range(len(x)):
            value = _nearest_level(x[i] * inverse, low, high, halves)
            xq += w[i] * value * x[i]
            qq += w[i] * value * value
        gain = xq * xq / max(qq, F(1e-30))
        if gain > best_gain:
            best_gain, best_s = gain, xq / max(qq, F(1e-30))
    return best_s


@jit
def fit_mins(x, w, kind, s, m):
    """x [N, blocks, block], w [blocks, block] -> s, m [N, blocks]."""
    stretches, top = kind.stretches, kind.high
    for n in range(x.shape[0]):
        for b in range(x.shape[1]):
            s[n, b], m[n, b] = _fit_mins(x[n, b], w[b], stretches, top)


@jit
def fit_signed(x, w, kind, s):
    """x [N, blocks, block], w [blocks, block] -> s [N, blocks]."""
    stretches, low, high, halves = kind.stretches, kind.low, kind.high, kind.halves
    for n in range(x.shape[0]):
        for b in range(x.shape[1]):
            s[n, b] = _fit_signed(x[n, b], w[b], stretches, low, high, halves)


@part
def _code(value, step, low, high):
    """Rounded value / step, clamped, as an integer."""
    y = value / step if step != 0 else value
    return np.int32(min(max(y, F(low)), F(high)) - F(low) + F(0.5)) + low


@part
def _add8(out, rows, at, f):
    """out [LANES] += Σ_k rows[at + k] · f[k], k < 8: one load and store of `out` for eight products."""
    f0, f1, f2, f3, f4, f5, f6, f7 = f[0], f[1], f[2], f[3], f[4], f[5], f[6], f[7]
    for lane in range(LANES):
        left = rows[at, lane] * f0 + rows[at + 1, lane] * f1 + rows[at + 2, lane] * f2 + rows[at + 3, lane] * f3
        right = rows[at + 4, lane] * f4 + rows[at + 5, lane] * f5 + rows[at + 6, lane] * f6 + rows[at + 7, lane] * f7
        out[lane] += left + right


@jit
def feedback_levels(target, w, steps, reach, kind, local, out):
    """Encode one superblock of every row of a type that rounds each weight alone.

    target, w [R, 256], steps: d and dmin [R]; R is a multiple of LANES. reach: neighbours of the scale and of the min
    to try. The scale and offset in `out` come with the first guess, which each later block renews for its target if the
    columns are coupled; they, value and q are filled.
    """
    (d, dmin), (near, near_min) = steps, reach
    low, high, halves, stretches, multipliers, n_mins, block = kind
    weights, upper, diagonal, u = local
    scale, offset, value, q = out
    coupled, top = len(u) > 0, len(multipliers) - 1
    first = np.int32(multipliers[0])
    x, old = np.empty((SUPERBLOCK, LANES), F), np.empty((SUPERBLOCK, LANES), F)
    v, chosen = np.empty((block, LANES), F), np.empty((block, LANES), F)
    inner, error = np.empty((block, LANES), F), np.empty((block, LANES), F)
    y, fed, cost, least = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    s, o, inverse, better = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    best_s, best_o = np.empty(LANES, F), np.empty(LANES, F)
    center, middle = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    code, low_code = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    one = np.empty(block, F)
    for r in range(0, target.shape[0], LANES):
        for lane in range(LANES):
            for c in range(SUPERBLOCK):
                x[c, lane] = target[r + lane, c]
                old[c, lane] = w[r + lane, c]
        for b in range(SUPERBLOCK // block):
            lo, hi = b * block, (b + 1) * block
            for lane in range(LANES):
                n = r + lane
                if coupled and b:
                    for i in range(block):
                        one[i] = x[lo + i, lane]
                    if n_mins:
                        fit, low_fit = _fit_mins(one, weights[lo:hi], stretches, high)
                        offset[n, b] = _code(low_fit, dmin[n], 0, n_mins - 1)
                    else:
                        fit = _fit_signed(one, weights[lo:hi], stretches, low, high, halves)
                    scale[n, b] = _code(fit, d[n], first, first + top) - first
                center[lane], middle[lane] = scale[n, b], offset[n, b]
            for h in range(-near, near + 1):
                for k in range(-near_min, near_min + 1):
                    for lane in range(LANES):
                        code[lane] = min(max(center[lane] + h, 0), top)
                        low_code[lane] = min(max(middle[lane] + k, 0), max(n_mins - 1, 0))
                        s[lane] = d[r + lane] * multipliers[code[lane]]
                        o[lane] = -dmin[r + lane] * F(low_code[lane])
                        inverse[lane] = F(1) / s[lane] if s[lane] != 0 else F(1)
                        cost[lane] = F(0)
                    for j in range(block):
                        at, g = lo + j, j // GROUP * GROUP
                        for lane in range(LANES):
                            y[lane] = x[at, lane] - o[lane]
                        if coupled:
                            for i in range(0, g, GROUP):
                                _add8(y, error, i, u[lo + i : lo + i + GROUP, at])
                        for lane in range(LANES):
                            fed[lane] = y[lane]
                        for i in range(g, j):
                            factor = upper[at // GROUP, i - g, j - g]
                            for lane in range(LANES):
                                y[lane] += inner[i, lane] * factor
                        weight = diagonal[at]
                        for lane in range(LANES):
                            rounded = _nearest_level(y[lane] * inverse[lane], low, high, halves)
                            v[j, lane] = rounded
                            decoded = s[lane] * rounded
                            inner[j, lane] = fed[lane] - decoded
                            error[j, lane] = old[at, lane] - decoded - o[lane]
                            cost[lane] += weight * (y[lane] - decoded) * (y[lane] - decoded)
                    start = h == -near and k == -near_min
                    for lane in range(LANES):
                        wins = start or cost[lane] < least[lane]
                        better[lane] = F(1) if wins else F(0)
                        least[lane] = cost[lane] if wins else least[lane]
                        best_s[lane] = s[lane] if wins else best_s[lane]
                        best_o[lane] = o[lane] if wins else best_o[lane]
                        scale[r + lane, b] = code[lane] if wins else scale[r + lane, b]
                        offset[r + lane, b] = low_code[lane] if wins else offset[r + lane, b]
                    for j in range(block):
                        for lane in range(LANES):
                            chosen[j, lane] = v[j, lane] if better[lane] > 0 else chosen[j, lane]
            for j in range(block):
                for lane in range(LANES):
                    error[j, lane] = old[lo + j, lane] - (best_s[lane] * chosen[j, lane] + best_o[lane])
            for lane in range(LANES):
                for j in range(block):
                    value[r + lane, lo + j] = chosen[j, lane]
                    q[r + lane, lo + j] = best_s[lane] * chosen[j, lane] + best_o[lane]
            if coupled:
                for c in range(hi, SUPERBLOCK):
                    for i in range(0, block, GROUP):
                        _add8(x[c], error, i, u[lo + i : lo + i + GROUP, c])


@jit
def descent_levels(gradient, steps, kind, local, out):
    """As numba_codebooks.descent_grid, for types that round each weight alone: R a multiple of LANES."""
    d, dmin = steps
    low, high, halves, multipliers, block = kind.low, kind.high, kind.halves, kind.multipliers, kind.block
    h, inverse, upper, diagonal = local
    scale, offset, value, q = out
    slope, now = np.empty((SUPERBLOCK, LANES), F), np.empty((SUPERBLOCK, LANES), F)
    kept = np.empty((SUPERBLOCK, LANES), F)
    v, inner = np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F)
    before, fed = np.empty((GROUP, LANES), F), np.empty((GROUP, LANES), F)
    y, z = np.empty(LANES, F), np.empty(LANES, F)
    cost, bound = np.empty(LANES, F), np.empty(LANES, F)
    s, o, reciprocal, better = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    for r in range(0, gradient.shape[0], LANES):
        for lane in range(LANES):
            for c in range(SUPERBLOCK):
                slope[c, lane], now[c, lane], kept[c, lane] = gradient[r + lane, c], q[r + lane, c], value[r + lane, c]
        for g in range(SUPERBLOCK // GROUP):
            at = g * GROUP
            for lane in range(LANES):
                s[lane] = d[r + lane] * multipliers[scale[r + lane, at // block]]
                o[lane] = -dmin[r + lane] * F(offset[r + lane, at // block])
                reciprocal[lane] = F(1) / s[lane] if s[lane] != 0 else F(1)
                cost[lane], bound[lane] = F(0), F(0)
            for j in range(GROUP):
                for lane in range(LANES):
                    before[j, lane] = F(0)
                for i in range(GROUP):
                    factor = inverse[g, i, j]
                    for lane in range(LANES):
                        before[j, lane] += slope[at + i, lane] * factor
            for j in range(GROUP):
                for lane in range(LANES):
                    fed[j, lane] = now[at + j, lane] - before[j, lane] - o[lane]
                    y[lane], z[lane] = fed[j, lane], before[j, lane]
                for i in range(j):
                    factor = upper[g, i, j]
                    for lane in range(LANES):
                        y[lane] += inner[i, lane] * factor
                        z[lane] += before[i, lane] * factor
                weight = diagonal[at + j]
                for lane in range(LANES):
                    rounded = _nearest_level(y[lane] * reciprocal[lane], low, high, halves)
                    v[j, lane] = rounded
                    decoded = s[lane] * rounded
                    inner[j, lane] = fed[j, lane] - decoded
                    cost[lane] += weight * (y[lane] - decoded) * (y[lane] - decoded)
                    bound[lane] += weight * z[lane] * z[lane]
            for lane in range(LANES):
                better[lane] = F(1) if cost[lane] < bound[lane] * F(1 - 1e-6) else F(0)
            for j in range(GROUP):
                for lane in range(LANES):
                    new = s[lane] * v[j, lane] + o[lane] if better[lane] > 0 else now[at + j, lane]
                    inner[j, lane] = new - now[at + j, lane]
                    now[at + j, lane] = new
                    kept[at + j, lane] = v[j, lane] if better[lane] > 0 else kept[at + j, lane]
            for c in range(at + GROUP, SUPERBLOCK):
                _add8(slope[c], inner, 0, h[at : at + GROUP, c])
        for lane in range(LANES):
            for c in range(SUPERBLOCK):
                value[r + lane, c], q[r + lane, c] = kept[c, lane], now[c, lane]
