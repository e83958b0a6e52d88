"""Drawing tokens from logits, compiled by numba: rows one after the other without Python's lock, so that many are drawn
by several threads at once. `generate.sample` defines what is drawn, but for last digits of sums: here a row is one
maximum, one exponential of each logit and sums of BLOCK, in float32; sums of those are float64.

top_k and top_p want the n most probable tokens: a histogram of what is probable enough says in which bin the last of
them is, and only that bin is sorted.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from quantkit.container import writable_caches

F, I32, I64, F64, U64 = np.float32, np.int32, np.int64, np.float64, np.uint64
BLOCK = 256
HEADS = F(0.5) ** np.array((1, 2, 3, 4, 6, 8, 10, 12, 15, 18, 24, 126), np.float32)  # of the most probable token: how
# probable those are that are looked at for top_k and top_p
BINS = 4096  # of 2^(1/128) or less each; the last one holds all beyond 2^-32
NOT_FINITE, NONE_LEFT = -1, -2  # in place of a token

LOG2_E = 1.4426950408889634
MAGIC = F(12582912.0)  # 1.5 · 2^23: a float32 plus this has no fraction
LEAST, TINY = F(-126.0), F(2.0**-126)  # the least normal float32
LOWEST, INFINITE, ONE = I32(-(2**31)), I32(0x7F800000), I32(0x3F800000)  # bits

KEPT = writable_caches()
jit = numba.njit(nogil=True, cache=KEPT, error_model="numpy", boundscheck=False)
part = numba.njit(nogil=True, cache=KEPT, error_model="numpy", boundscheck=False, forceinline=True)
fused = numba.njit(
    nogil=True, cache=KEPT, error_model="numpy", boundscheck=False, forceinline=True, fastmath={"contract"}
)
in_any_order = numba.njit(
    nogil=True, cache=KEPT, error_model="numpy", boundscheck=False, forceinline=True, fastmath={"reassoc", "nsz"}
)


def _bits_to_float(_, bits):
    return types.float32(types.int32), lambda c, build, sig, args: build.bitcast(args[0], ir.FloatType())


def _float_to_bits(_, value):
    return types.int32(types.float32), lambda c, build, sig, args: build.bitcast(args[0], ir.IntType(32))


_as_float: Callable[..., Any] = intrinsic(_bits_to_float)
_as_bits: Callable[..., Any] = intrinsic(_float_to_bits)


@part
def _order(bits):
    """Of a float32's bits: numbers that compare as the floats do, and the other way round."""
    return I32(bits ^ I32(I32(bits >> I32(31)) & I32(0x7FFFFFFF)))


@part
def _most(x):
    """The largest of x as `_order`, and whether one is no number."""
    most, odd = LOWEST, I32(0)
    for i in range(len(x)):
        bits = _as_bits(x[i])
        most = max(most, _order(bits))
        odd = max(odd, I32(bits & I32(0x7FFFFFFF)))
    return most, odd > INFINITE


@fused
def _exp2(y):
    """2^y of float32 y <= 0, 0 below 2^-126; relative error 2e-7 (the polynomial is Cephes's exp2f)."""
    whole = F(y + MAGIC)
    f = F(y - F(whole - MAGIC))
    poly = F(F(1.535336188319500e-4) * f + F(1.339887440266574e-3))
    poly = F(poly * f + F(9.618437357674640e-3))
    poly = F(poly * f + F(5.550332471162809e-2))
    poly = F(poly * f + F(2.402264791363012e-1))
    poly = F(poly * f + F(6.931472028550421e-1))
    poly = F(poly * f + F(1.0))
    power = _as_float(I32(I32(_as_bits(whole) << I32(23)) + _as_bits(poly)))
    return power if y >= LEAST else F(0.0)


@fused
def _exps(x, most, scale, p):
    for i in range(len(x)):
        p[i] = _exp2(F(F(x[i] - most) * scale))


@in_any_order
def _sum(p):
    total = F(0.0)
    for i in range(len(p)):
        total += p[i]
    return total


@in_any_order
def _above(p, floor):
    """How many are at least that, and their sum."""
    n, total = I32(0), F(0.0)
    for i in range(len(p)):
        here = p[i] >= floor
        n += I32(here)
        total += p[i] if here else F(0.0)
    return n, total


@part
def _maxima(x, maxima):
    """Of each block, as float; the largest, and whether one is no number."""
    most, odd = LOWEST, False
    for b in range(len(maxima)):
        own, bad = _most(x[b * BLOCK : b * BLOCK + BLOCK])
        maxima[b] = _as_float(_order(own))
        most, odd = max(most, own), odd or bad
    return _as_float(_order(most)), odd


@part
def _first(x, maxima, value):
    """Where `value`, the largest, is first."""
    for b in range(len(maxima)):
        if maxima[b] == value:
            for i in range(b * BLOCK, min(b * BLOCK + BLOCK, len(x))):
                if x[i] == value:
                    return i
    return 0


@part
def _anywhere(p, sums, uniform):
    """Where a number in [0, 1) falls among all p, laid end to end, whose blocks have these sums."""
    total = F64(0.0)
    for b in range(len(sums)):
        total += sums[b]
    at, begin, block, start = uniform * total, F64(0.0), 0, F64(0.0)
    for b in range(len(sums)):
        if sums[b] > 0:
            block, start = b, begin
            begin += sums[b]
            if begin > at:
                break
    chosen = block * BLOCK
    for i in range(block * BLOCK, min(block * BLOCK + BLOCK, len(p))):
        if p[i] > 0:
            chosen = i
            start += F64(p[i])
            if start > at:
                break
    return chosen


@part
def _head(p, maxima, n_least, enough):
    """A bound that at least n_least of p reach, or as many as have `enough` in all."""
    for bound in HEADS:
        n, mass = 0, F64(0.0)
        for b in range(len(maxima)):
            if maxima[b] >= bound:
                own, total = _above(p[b * BLOCK : b * BLOCK + BLOCK], bound)
                n += own
                mass += F64(total)
        if n >= n_least or mass >= enough:
            return bound
    return F(0.0)


@part
def _gathered(p, maxima, bound, ids, values):
    """Those of p that are at least that and not 0, in order: how many."""
    bound, n = max(bound, TINY), U64(0)  # unsigned: numba would look whether it is negative
    for b in range(len(maxima)):
        if maxima[b] >= bound:
            own = p[b * BLOCK : b * BLOCK + BLOCK]
            for i in range(len(own)):
                ids[n], values[n] = b * BLOCK + i, own[i]
                n += U64(1) if own[i] >= bound else U64(0)
    return I64(n)


@part
def _bin(value):
    return min(I64((ONE - _as_bits(value)) >> I32(16)), I64(BINS - 1))


@jit
def _last(values, n, enough, counts, sums):
    """Of the largest n of `values`, or of as few as have `enough` in all: the last one, how many they are, how many of
    them are like the last, and their sum."""
    counts[:], sums[:] = 0, 0
    for value in values:
        b = _bin(value)
        counts[b] += 1
        sums[b] += value
    found, mass, which = 0, F64(0.0), BINS - 1
    for b in range(BINS):
        if found + counts[b] >= n or mass + sums[b] >= enough:
            which = b
            break
        found += counts[b]
        mass += sums[b]
    own = np.empty(counts[which], F)
    at = 0
    for value in values:
        if _bin(value) == which:
            own[at] = value
            at += 1
    own.sort()
    last, ties = F(0.0), 0
    for i in range(len(own) - 1, -1, -1):
        ties = ties + 1 if own[i] == last else 1
        last = own[i]
        found += 1
        mass += F64(last)
        if found >= n or mass >= enough:
            break
    return last, found, ties, mass


@part
def _among(ids, values, at, least, ties):
    """Where a number falls among those greater than `least`, and `ties` that are like it, laid end to end."""
    total, chosen = F64(0.0), I32(-1)
    for i in range(len(values)):
        if values[i] > least or (values[i] == least and ties > 0):
            ties -= values[i] == least
            chosen = ids[i]
            total += F64(values[i])
            if total > at:
                break
    return chosen


@part
def _some(p, maxima, total, how, uniform, more):
    """A token of those that top_k, top_p and min_p leave. p: the most probable one has 1; total: of all."""
    top_k, top_p, min_p = I64(how[1]), how[2], F(how[3])
    ids, values, counts, sums = more
    n: Any = len(p) if top_k <= 0 else min(top_k, len(p))
    bound = min_p
    if n < len(p):  # what is below min_p counts for top_p, and all that top_k leaves
        bound = _head(p, maxima, n, np.inf)
    elif top_p < 1:
        bound = _head(p, maxima, n, top_p * total)
    m = _gathered(p, maxima, bound, ids, values)
    values, least, ties = values[:m], F(0.0), 0
    if n < len(p):
        least, n, ties, total = _last(values, n, np.inf, counts, sums)
    if top_p < 1:
        least, n, ties, total = _last(values, n, top_p * total, counts, sums)
    if min_p > 0 and min_p >= least:
        least, ties, total = min_p, m, F64(0.0)
        for value in values:
            total += F64(value) if value >= min_p else 0.0
    return _among(ids, values, uniform * total, least, ties)


@part
def _one(x, changed, how, uniform, room):
    p, _, maxima, sums, more = room
    most, odd = _maxima(x, maxima)
    if odd or most == np.inf:
        return NOT_FINITE
    if most == -np.inf:
        return NONE_LEFT if changed else NOT_FINITE
    if how[0] == 0:
        return _first(x, maxima, most)
    scale, total = F(LOG2_E / how[0]), F64(0.0)
    for b in range(len(maxima)):
        own = p[b * BLOCK : b * BLOCK + BLOCK]
        _exps(x[b * BLOCK : b * BLOCK + BLOCK], most, scale, own)
        sums[b] = _sum(own)
        total += F64(sums[b])
        maxima[b] = _exp2(F(F(maxima[b] - most) * scale))
    if how[1] <= 0 and how[2] >= 1 and how[3] <= 0:
        return _anywhere(p, sums, uniform)
    return _some(p, maxima, total, how, uniform, more)


@jit
def choose(logits, hows, uniforms, edits, masks, room, out):
    """A token of each row of logits float32 [n, n_vocab], or NOT_FINITE, or NONE_LEFT where edits or masks leave none:
    out int64 [n]. hows: float64 [n, 4], temperature (0: greedy), top_k, top_p, min_p. uniforms: float64 [n], in [0, 1).
    edits: logits that are others, of row i those from starts[i] to starts[i + 1]: (starts int64 [n + 1], ids int64,
    values float32). masks: (of each row its mask or -1, int64 [n]; masks uint8 [m, n_vocab], 0: not this token).
    room: a `Room`'s arrays."""
    starts, ids, values = edits
    which, allowed = masks
    own = room[1]
    for r in range(len(logits)):
        x = logits[r]
        changed = starts[r + 1] > starts[r] or which[r] >= 0
        if changed:
            for i in range(len(own)):
                own[i] = x[i]
            for j in range(starts[r], starts[r + 1]):
                own[ids[j]] = values[j]
            if which[r] >= 0:
                mask = allowed[which[r]]
                for i in range(len(own)):
                    own[i] = own[i] if mask[i] else F(-np.inf)
            x = own
        out[r] = _one(x, changed, hows[r], uniforms[r], room)


@jit
def log_totals(logits, room, out):
    """Natural logarithm of the sum of exponentials of each row of logits float32 [n, n_vocab]: out float64 [n]."""
    p, _, maxima, _, _ = room
    for r in range(len(logits)):
        x, total = logits[r], F64(0.0)
        most, _ = _maxima(x, maxima)
        for b in range(len(maxima)):
            own = p[b * BLOCK : b * BLOCK + BLOCK]
            _exps(x[b * BLOCK : b * BLOCK + BLOCK], most, F(LOG2_E), own)
            total += F64(_sum(own))
        out[r] = F64(most) + np.log(total)


class Room:
    """What a thread works in."""

    def __init__(self, n_vocab: int):
        n, n_blocks = n_vocab, -(-n_vocab // BLOCK)
        some = np.empty(n, np.int32), np.empty(n, F), np.empty(BINS, np.int64), np.empty(BINS, F64)
        self.arrays = np.empty(n, F), np.empty(n, F), np.empty(n_blocks, F), np.empty(n_blocks, F), some
