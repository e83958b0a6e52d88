"""Codebook types on the CPU: kernels that go row by row, with entries in the lanes of a vector register.

The plain twins are guess.sampled (`sampled`), reference.Backend.superblock (`feedback_grid`) and descend_groups
(`descent_grid`). The search is exhaustive where errors are fed back, and in places a short list where not.
"""

from typing import NamedTuple

import numpy as np

from quantkit.codecs.format import GROUP, SUPERBLOCK
from quantkit.encoding.backends.numba_jit import BIG, F, jit, part

TILE = 64  # codebook entries whose scores are compared at once
EVEN, FREE, GRID = 2, 1, 0
SIGNS = {"grid": GRID, "free": FREE, "even": EVEN}


class Sampling(NamedTuple):
    """Where `sampled` looks: the level at 0 in steps and the point's 2^-p, float32 [S, P]; the highest level in steps;
    weights that share a shift."""

    offset: np.ndarray
    squared: np.ndarray
    top: np.float32
    span: int


class Book(NamedTuple):
    """A codebook type.

    near int16 [3^8, K]: a short list instead of the whole grid (or [0, 0]), the entries closest to each vector of the
    three levels that `middles` [2] separate.
    """

    grid: np.ndarray  # [tiles, width, TILE]
    points: np.ndarray  # [entries, width]: the same
    near: np.ndarray
    middles: np.ndarray
    multipliers: np.ndarray
    shifts: np.ndarray
    signs: int
    block: int


class Local(NamedTuple):
    """The metric of one superblock: its blocks [32, 8, 8], the energy of every entry under them [32, 8/width, tiles,
    TILE], and U [256, 256], or [0, 0] if nothing couples the columns."""

    metric: np.ndarray
    bias: np.ndarray
    u: np.ndarray


class Curvature(NamedTuple):
    """As Local for a descent: blocks and energies, H [256, 256], and the inverses of the blocks [32, 8, 8]."""

    metric: np.ndarray
    bias: np.ndarray
    h: np.ndarray
    inverse: np.ndarray


class Chosen(NamedTuple):
    """Codes and values of one superblock, in a kernel's own types: scale, offset int32 [R, blocks], entry int32 [R,
    256/width], sign int32 [R, 32], value, q float32 [R, 256]."""

    scale: np.ndarray
    offset: np.ndarray
    entry: np.ndarray
    sign: np.ndarray
    value: np.ndarray
    q: np.ndarray


class Work(NamedTuple):
    """Room for one search: a factor for each weight of a group, and the best score of each lane and its tile."""

    linear: np.ndarray
    low: np.ndarray
    at: np.ndarray


class Found(NamedTuple):
    """What one search gives."""

    entry: np.ndarray
    value: np.ndarray


@jit
def sampled(x, weights, unit, sampling, out):
    """Cost of rounding every `span` weights to 0 … top steps at every sampled scale: twin of guess.sampled.

    x [N, 256], weights [256], unit [N] (1 / base step); out [N, 256/span, S, P] in units of the base step, squared.
    """
    offset, squared, top, span = sampling
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
def _scan8(linear, square, grid, bias, low, at):
    """argmin of linear · grid_m + square · bias_m; linear [8], grid [tiles, 8, TILE], bias [tiles, TILE].

    low, at float32 [TILE]: the best score and tile of each lane; LLVM keeps such minima in vectors, but not an argmin.
    Written out for 8 and (_scan4) for 4: a loop over the weights of an entry gives the same bytes, 2 % slower.
    """
    a, b, c, d = linear[0], linear[1], linear[2], linear[3]
    e, f, g, h = linear[4], linear[5], linear[6], linear[7]
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
def _scan4(linear, first, square, grid, bias, low, at):
    """As _scan8 for entries of 4, of linear [first …]."""
    a, b, c, d = linear[first], linear[first + 1], linear[first + 2], linear[first + 3]
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
def _scan_near(x, s, metric, book, weight):
    """argmin of the diagonal cost over the short list of a book."""
    near, points, middles = book.near, book.points, book.middles
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
def _nearest(x, s, metric, bias, book, work, found):
    """search.nearest for one group x [8]: fills found, entry [8/width] and value [8], and returns the sign bits."""
    grid, (linear, low, at), (entry, value) = book.grid, work, found
    sign, width = 0, grid.shape[1]
    if book.signs == GRID:
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
        if book.signs == EVEN and odd:
            sign ^= 1 << cheapest
            low[cheapest], linear[cheapest] = -low[cheapest], -linear[cheapest]
    if len(book.near):
        entry[0] = _scan_near(x if book.signs == GRID else low, s, metric, book, linear)
    elif width == GROUP:
        entry[0] = _scan8(linear, s * s, grid, bias[0], low, at)
    else:
        entry[0] = _scan4(linear, 0, s * s, grid, bias[0], low, at)
        entry[1] = _scan4(linear, 4, s * s, grid, bias[1], low, at)
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
def feedback_grid(target, w, d, codes, book, local, out):
    """Encode one superblock of every row of a codebook type.

    target, w [R, 256] (target is spent), d [R], codes int [R, blocks, K, 2]: pairs of scale and shift to try.
    """
    metric, bias, u = local
    scale, offset, entry, sign, value, q = out
    multipliers, shifts, block = book.multipliers, book.shifts, book.block
    width, coupled = book.grid.shape[1], len(u) > 0
    per = GROUP // width
    x, residual = np.empty(GROUP, F), np.empty(GROUP, F)
    error, chosen = np.empty(block, F), np.empty(block, F)
    work = Work(np.empty(GROUP, F), np.empty(TILE, F), np.zeros(TILE, F))
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
                    found = Found(entries[g * per : (g + 1) * per], v)
                    signbits[g] = _nearest(x, s, m, bias[at // GROUP], book, work, found)
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
def descent_grid(gradient, d, book, local, out):
    """Revise one superblock of every row, a group of 8 after the other, all else fixed; only true decreases.

    gradient [R, 256] of half the cost (spent); the codes in `out` are revised in place.
    """
    metric, bias, h, inverse = local
    scale, offset, entry, sign, value, q = out
    multipliers, shifts, block = book.multipliers, book.shifts, book.block
    width = book.grid.shape[1]
    per = GROUP // width
    x, before, after = np.empty(GROUP, F), np.empty(GROUP, F), np.empty(GROUP, F)
    work = Work(np.empty(GROUP, F), np.empty(TILE, F), np.zeros(TILE, F))
    v, entries = np.empty(GROUP, F), np.empty(per, np.int32)
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
            signbits = _nearest(x, s, m, bias[g], book, work, Found(entries, v))
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
