"""Compiled twins for the CPU, by numba (LLVM in a wheel: no compiler is needed on the machine); cached on disk.

The plain twins are `engine.encode_span` with what surrounds it in a superblock (`feedback_*`), `engine.descent_pass`
with spans of 8 (`descent_*`), `scales._sampled`, `scales.fit_mins` and `scales.fit_signed`, `refit.normal_equations`.
The search is exhaustive where errors are fed back (cpu.py: in places a short list where not).
Codebook types go row by row, with entries in the lanes of a vector register; types that
round each weight alone go column by column, with LANES rows side by side.
"""

import numba
import numpy as np

from quantkit.codecs.format import SUPERBLOCK
from quantkit.encoding.hessian import GROUP

LANES = 32
TILE = 64  # codebook entries whose scores are compared at once
F = np.float32
BIG = F(3e38)  # infinities are outside fastmath's promises
EVEN, FREE, GRID = 2, 1, 0
SIGNS = {"grid": GRID, "free": FREE, "even": EVEN}

HOW = {"fastmath": True, "nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
jit = numba.njit(**HOW)
# What kernels call is inlined: of several copies the loader takes the one that this process compiled or read first, and
# under fastmath they differ in the last bit: a first run would give other bytes than those after it.
part = numba.njit(**HOW, forceinline=True)


# -- first guesses ----------------------------------------------------------------------------------------------------


@jit
def sampled(x, weights, unit, offset, squared, top, span, out):
    """Cost of rounding every `span` weights to 0 … top steps at every sampled scale.

    x [N, 256], weights [256], unit [N] (1 / base step), offset [S, P] and squared [S, P]: level at 0 in steps and the
    point's 2^-p; out [N, 256/span, S, P] in units of the base step, squared.
    """
    shifts, points = offset.shape
    for n in range(x.shape[0]):
        for b in range(x.shape[1] // span):
            row, w, u = x[n, b * span : (b + 1) * span], weights[b * span : (b + 1) * span], unit[n]
            for k in range(shifts):
                for p in range(points):
                    scale, zero, total = u * squared[k, p], offset[k, p], F(0)
                    for i in range(span):
                        y = row[i] * scale - zero
                        error = F(np.int32(min(max(y, F(0)), top) + F(0.5))) - y
                        total += w[i] * error * error
                    out[n, b, k, p] = total


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
    """scales.fit_mins of one block: (s, m)."""
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
    """scales.fit_signed of one block."""
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
def fit_mins(x, w, stretches, top, s, m):
    """x [N, blocks, block], w [blocks, block] -> s, m [N, blocks]."""
    for n in range(x.shape[0]):
        for b in range(x.shape[1]):
            s[n, b], m[n, b] = _fit_mins(x[n, b], w[b], stretches, top)


@jit
def fit_signed(x, w, stretches, low, high, halves, s):
    """x [N, blocks, block], w [blocks, block] -> s [N, blocks]."""
    for n in range(x.shape[0]):
        for b in range(x.shape[1]):
            s[n, b] = _fit_signed(x[n, b], w[b], stretches, low, high, halves)


# -- codebooks --------------------------------------------------------------------------------------------------------


@part
def _scan8(a, b, c, d, e, f, g, h, square, grid, bias, low, at):
    """argmin of a grid_m0 + … + h grid_m7 + square · bias_m; grid [tiles, 8, TILE], bias [tiles, TILE].

    low, at float32 [TILE]: the best score and tile of each lane; LLVM keeps such minima in vectors, but not an argmin.
    """
    for k in range(TILE):
        low[k] = BIG
    for t in range(grid.shape[0]):
        entries, energy, tile = grid[t], bias[t], F(t)
        for k in range(TILE):
            left = a * entries[0, k] + b * entries[1, k] + c * entries[2, k] + d * entries[3, k]
            right = e * entries[4, k] + f * entries[5, k] + g * entries[6, k] + h * entries[7, k]
            score = left + (right + square * energy[k])
            better = score < low[k]
            at[k] = tile if better else at[k]
            low[k] = score if better else low[k]
    return _least_lane(low, at)


@part
def _scan4(a, b, c, d, square, grid, bias, low, at):
    """As _scan8 for entries of 4."""
    for k in range(TILE):
        low[k] = BIG
    for t in range(grid.shape[0]):
        entries, energy, tile = grid[t], bias[t], F(t)
        for k in range(TILE):
            left, right = a * entries[0, k] + b * entries[1, k], c * entries[2, k] + d * entries[3, k]
            score = left + (right + square * energy[k])
            better = score < low[k]
            at[k] = tile if better else at[k]
            low[k] = score if better else low[k]
    return _least_lane(low, at)


@part
def _least_lane(low, at):
    best = 0
    for k in range(1, TILE):
        if low[k] < low[best]:
            best = k
    return np.int32(at[best]) * TILE + best


@part
def _scan_near(x, s, metric, near, points, middles, weight):
    """argmin of the diagonal cost over a short list.

    near int16 [3^8, K]: the entries closest to each vector of the three levels that `middles` [2] separate; points
    [entries, 8]: the codebook.
    """
    code, lower, upper = 0, middles[0] * s, middles[1] * s
    for j in range(GROUP):
        code = 3 * code + (1 if x[j] > lower else 0) + (1 if x[j] > upper else 0)
        weight[j] = metric[j, j]
    best, entry = BIG, 0
    for k in range(near.shape[1]):
        m, cost = near[code, k], F(0)
        for j in range(GROUP):
            e = s * points[m, j] - x[j]
            cost += weight[j] * e * e
        if cost < best:
            best, entry = cost, m
    return entry


@part
def _nearest(x, s, metric, grid, bias, near, points, middles, signs, linear, low, at, entry, value):
    """search.nearest for one group x [8]: fills entry [8/width] and value [8], returns the sign bits."""
    sign, width = 0, grid.shape[1]
    if signs == GRID:
        for j in range(GROUP):
            linear[j] = F(0)
        for i in range(GROUP):
            for j in range(GROUP):
                linear[j] += F(-2) * s * x[i] * metric[i, j]
    else:
        least, cheapest, odd = BIG, 0, 0
        for j in range(GROUP):
            size = abs(x[j])
            if x[j] < 0:
                sign |= 1 << j
                odd ^= 1
            if size * metric[j, j] < least:
                least, cheapest = size * metric[j, j], j
            low[j], linear[j] = size, F(-2) * s * size * metric[j, j]
        if signs == EVEN and odd:
            sign ^= 1 << cheapest
            low[cheapest], linear[cheapest] = -low[cheapest], -linear[cheapest]
    if len(near):
        entry[0] = _scan_near(x if signs == GRID else low, s, metric, near, points, middles, linear)
    elif width == GROUP:
        entry[0] = _scan8(
            linear[0],
            linear[1],
            linear[2],
            linear[3],
            linear[4],
            linear[5],
            linear[6],
            linear[7],
            s * s,
            grid,
            bias[0],
            low,
            at,
        )
    else:
        entry[0] = _scan4(linear[0], linear[1], linear[2], linear[3], s * s, grid, bias[0], low, at)
        entry[1] = _scan4(linear[4], linear[5], linear[6], linear[7], s * s, grid, bias[1], low, at)
    for j in range(GROUP):
        m = entry[j // width]
        v = grid[m // TILE, j % width, m % TILE]
        value[j] = -v if sign >> j & 1 else v
    return sign


@part
def _quadratic(r, metric):
    total = F(0)
    for i in range(GROUP):
        for j in range(GROUP):
            total += r[i] * metric[i, j] * r[j]
    return total


@jit
def feedback_grid(
    target,
    w,
    d,
    codes,
    multipliers,
    shifts,
    metric,
    u,
    grid,
    bias,
    near,
    points,
    middles,
    signs,
    block,
    scale,
    offset,
    entry,
    sign,
    value,
    q,
):
    """Encode one superblock of every row of a codebook type.

    target, w [R, 256] (target is spent), d [R], codes int [R, blocks, K, 2]: pairs of scale and shift to try, metric
    [32, 8, 8], u [256, 256] (or [0, 0]: nothing couples the columns), grid [tiles, width, TILE], bias [32, 8/width,
    tiles, TILE]. near, points, middles: a short list instead of the whole grid, see _scan_near (near [0, 0]: none).
    Fills scale, offset [R, blocks], entry [R, 256/width], sign [R, 32], value, q [R, 256].
    """
    width, coupled = grid.shape[1], len(u) > 0
    per = GROUP // width
    x, residual, linear = np.empty(GROUP, F), np.empty(GROUP, F), np.empty(GROUP, F)
    error, chosen = np.empty(block, F), np.empty(block, F)
    low, tile = np.empty(TILE, F), np.zeros(TILE, F)
    entries, signbits = np.empty(block // width, np.int32), np.empty(block // GROUP, np.int32)
    for r in range(target.shape[0]):
        for b in range(SUPERBLOCK // block):
            lo, least = b * block, BIG
            for h in range(codes.shape[2]):
                s = d[r] * multipliers[codes[r, b, h, 0]]
                o = s * shifts[codes[r, b, h, 1]]
                cost = F(0)
                for g in range(block // GROUP):
                    at = lo + g * GROUP
                    for j in range(GROUP):
                        x[j] = target[r, at + j] - o
                    if coupled:
                        for i in range(g * GROUP):
                            for j in range(GROUP):
                                x[j] += error[i] * u[lo + i, at + j]
                    m, v = metric[at // GROUP], chosen[g * GROUP : (g + 1) * GROUP]
                    signbits[g] = _nearest(
                        x,
                        s,
                        m,
                        grid,
                        bias[at // GROUP],
                        near,
                        points,
                        middles,
                        signs,
                        linear,
                        low,
                        tile,
                        entries[g * per : (g + 1) * per],
                        v,
                    )
                    for j in range(GROUP):
                        residual[j] = x[j] - s * v[j]
                        error[g * GROUP + j] = w[r, at + j] - s * v[j] - o
                    cost += _quadratic(residual, m)
                if cost < least or h == 0:
                    least = cost
                    scale[r, b], offset[r, b] = codes[r, b, h, 0], codes[r, b, h, 1]
                    for i in range(block):
                        value[r, lo + i] = chosen[i]
                        q[r, lo + i] = s * chosen[i] + o
                    for i in range(block // width):
                        entry[r, lo // width + i] = entries[i]
                    for i in range(block // GROUP):
                        sign[r, lo // GROUP + i] = signbits[i]
            if coupled:
                rest = target[r, lo + block :]
                for i in range(block):
                    e, row = w[r, lo + i] - q[r, lo + i], u[lo + i, lo + block :]
                    for c in range(len(rest)):
                        rest[c] += e * row[c]


@jit
def descent_grid(
    gradient,
    d,
    multipliers,
    shifts,
    h,
    metric,
    inverse,
    grid,
    bias,
    near,
    points,
    middles,
    signs,
    block,
    scale,
    offset,
    entry,
    sign,
    value,
    q,
):
    """Revise one superblock of every row, a group of 8 after the other, all else fixed; only true decreases.

    gradient [R, 256] of half the cost (spent), h [256, 256], metric and inverse [32, 8, 8]: h's blocks and their
    inverses; else as feedback_grid. entry, sign, value and q are revised in place.
    """
    width = grid.shape[1]
    per = GROUP // width
    x, before, after = np.empty(GROUP, F), np.empty(GROUP, F), np.empty(GROUP, F)
    low, tile = np.empty(TILE, F), np.zeros(TILE, F)
    linear, v, entries = np.empty(GROUP, F), np.empty(GROUP, F), np.empty(per, np.int32)
    for r in range(gradient.shape[0]):
        for g in range(SUPERBLOCK // GROUP):
            at, m = g * GROUP, metric[g]
            s = d[r] * multipliers[scale[r, at // block]]
            o = s * shifts[offset[r, at // block]]
            for j in range(GROUP):
                before[j] = F(0)
            for i in range(GROUP):
                for j in range(GROUP):
                    before[j] += gradient[r, at + i] * inverse[g, i, j]
            for j in range(GROUP):
                x[j] = q[r, at + j] - before[j] - o
            signbits = _nearest(x, s, m, grid, bias[g], near, points, middles, signs, linear, low, tile, entries, v)
            for j in range(GROUP):
                after[j] = s * v[j] - x[j]
            if not _quadratic(after, m) < _quadratic(before, m) * F(1 - 1e-6):
                continue
            sign[r, g] = signbits
            for i in range(per):
                entry[r, g * per + i] = entries[i]
            rest = gradient[r, at + GROUP :]
            for j in range(GROUP):
                new = s * v[j] + o
                change, row = new - q[r, at + j], h[at + j, at + GROUP :]
                value[r, at + j], q[r, at + j] = v[j], new
                for c in range(len(rest)):
                    rest[c] += change * row[c]


# -- weights rounded alone --------------------------------------------------------------------------------------------


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
def feedback_levels(
    target,
    w,
    d,
    dmin,
    multipliers,
    n_mins,
    levels,
    halves,
    stretches,
    metric,
    upper,
    diagonal,
    u,
    near,
    block,
    scale,
    offset,
    value,
    q,
):
    """Encode one superblock of every row of a type that rounds each weight alone.

    R is a multiple of LANES. levels: the lowest and highest; halves: see _nearest_level; metric [256]: the metric's
    diagonal; upper [32, 8, 8] and diagonal [256]: its factors (search.unit_upper); near: neighbours of the scale and
    (Q2_K) of the min to try. scale, offset [R, blocks] come with the first guess, which each later block renews for its
    target if the columns are coupled. Else as feedback_grid.
    """
    coupled, top = len(u) > 0, len(multipliers) - 1
    low, high, first = levels[0], levels[1], np.int32(multipliers[0])
    x, old = np.empty((SUPERBLOCK, LANES), F), np.empty((SUPERBLOCK, LANES), F)
    v, chosen = np.empty((block, LANES), F), np.empty((block, LANES), F)
    inner, error = np.empty((block, LANES), F), np.empty((block, LANES), F)
    y, fed, cost, least = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    s, o, inverse, better = np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F), np.empty(LANES, F)
    best_s, best_o = np.empty(LANES, F), np.empty(LANES, F)
    center, middle = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    code, low_code = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    one = np.empty(block, F)
    near_min = near if n_mins == 16 else 0
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
                        fit, low_fit = _fit_mins(one, metric[lo:hi], stretches, high)
                        offset[n, b] = _code(low_fit, dmin[n], 0, n_mins - 1)
                    else:
                        fit = _fit_signed(one, metric[lo:hi], stretches, low, high, halves)
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
def descent_levels(
    gradient, d, dmin, multipliers, levels, halves, h, inverse, upper, diagonal, block, scale, offset, value, q
):
    """As descent_grid, for types that round each weight alone: R a multiple of LANES, factors as in feedback_levels."""
    low, high = levels[0], levels[1]
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


# -- scales of a row --------------------------------------------------------------------------------------------------


@jit
def products(image, unit, a, k):
    """The sums in refit.normal_equations: image [R, m], unit [R, kinds, n] -> a[:, k] from superblock k // kinds on."""
    kinds = unit.shape[1]
    first = k // kinds
    for r in range(image.shape[0]):
        for at in range(image.shape[1] // SUPERBLOCK):
            left = image[r, at * SUPERBLOCK : (at + 1) * SUPERBLOCK]
            for i in range(kinds):
                right = unit[r, i, (first + at) * SUPERBLOCK :]
                total = F(0)
                for c in range(SUPERBLOCK):
                    total += left[c] * right[c]
                a[r, k, (first + at) * kinds + i] = total
