"""Decoders of ggml blocks for the CPU, compiled by numba (LLVM in a wheel: no compiler is needed on the machine) and
cached on disk.

Each kernel takes blocks uint8 [n, bytes], one flat output of float32 or of bfloat16 bits (uint16), the other being
None, the values of all float16 numbers (float32 [65536], by their bits), tables of its own, and WIDTH. bfloat16 is
rounded to nearest, ties away from zero. Codebook entries are read as bfloat16, which holds them exactly.

Parameters are many and flat: a tuple of the two outputs, cut outside the loop, costs up to a quarter of the speed.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from quantkit.codecs.codebooks import ggml_grid
from quantkit.container import writable_caches

SUPERBLOCK = 256
WIDTH = 32  # weights of the inner loops; an argument, since LLVM would unroll a constant loop before making it vectors
F, U8, U16, U32, U64, I32 = np.float32, np.uint8, np.uint16, np.uint32, np.uint64, np.int32

KEPT = writable_caches()
jit = numba.njit(nogil=True, cache=KEPT, error_model="numpy", boundscheck=False)
part = numba.njit(nogil=True, cache=KEPT, error_model="numpy", boundscheck=False, forceinline=True)


def _bits_to_float(_, bits):
    return types.float32(types.uint32), lambda c, build, sig, args: build.bitcast(args[0], ir.FloatType())


def _float_to_bits(_, value):
    return types.uint32(types.float32), lambda c, build, sig, args: build.bitcast(args[0], ir.IntType(32))


_as_float: Callable[..., Any] = intrinsic(_bits_to_float)
_as_bits: Callable[..., Any] = intrinsic(_float_to_bits)


@part
def _cut(out, at, width):
    """Views, since numba checks whether an index that is a sum is negative, which no vector loop survives. (Of `if` and
    `else`, numba leaves out the one that is not of the argument's type; without `else` it could not.)"""
    if out is None:
        return None
    else:
        return out[at : at + width]


@part
def _put(value, single, half, i):
    if single is not None:
        single[i] = value
    if half is not None:
        half[i] = U16(U32(_as_bits(value) + U32(0x8000)) >> U32(16))


@part
def _word(block, at):
    return U32(block[at]) | U32(U32(block[at + 1]) << U32(8))


@part
def _steps(block, halves, out):
    """The eight six-bit scales and minima of a Q4_K or Q5_K block, times its two numbers: out [8, 2]."""
    d, low = halves[_word(block, 0)], halves[_word(block, 2)]
    for j in range(8):
        if j < 4:
            s, m = block[4 + j] & U8(63), block[8 + j] & U8(63)
        else:
            s = (block[8 + j] & U8(15)) | ((block[j] >> U8(6)) << U8(4))
            m = (block[8 + j] >> U8(4)) | ((block[4 + j] >> U8(6)) << U8(4))
        out[j, 0], out[j, 1] = d * F(I32(s)), low * F(I32(m))


@part
def _four_bits(q, shift, step, single, half, at, width):
    d, m, single, half = step[0], step[1], _cut(single, at, width), _cut(half, at, width)
    for i in range(width):
        _put(d * F(I32((q[i] >> shift) & U8(15))) - m, single, half, i)


@jit
def _q4_k(blocks, single, half, halves, tables, width):
    steps = np.empty((8, 2), F)
    for n in range(len(blocks)):
        block = blocks[n]
        _steps(block, halves, steps)
        for j in range(4):
            q, at = block[16 + 32 * j : 48 + 32 * j], SUPERBLOCK * n + 64 * j
            _four_bits(q, U8(0), steps[2 * j], single, half, at, width)
            _four_bits(q, U8(4), steps[2 * j + 1], single, half, at + 32, width)


@part
def _five_bits(q, shift, high, bit, step, single, half, at, width):
    d, m, single, half = step[0], step[1], _cut(single, at, width), _cut(half, at, width)
    for i in range(width):
        fifth = U8(U8(high[i] >> bit) & U8(1)) << U8(4)
        _put(d * F(I32(((q[i] >> shift) & U8(15)) | fifth)) - m, single, half, i)


@jit
def _q5_k(blocks, single, half, halves, tables, width):
    steps = np.empty((8, 2), F)
    for n in range(len(blocks)):
        block = blocks[n]
        high = block[16:48]
        _steps(block, halves, steps)
        for j in range(4):
            q, at = block[48 + 32 * j : 80 + 32 * j], SUPERBLOCK * n + 64 * j
            _five_bits(q, U8(0), high, U8(2 * j), steps[2 * j], single, half, at, width)
            _five_bits(q, U8(4), high, U8(2 * j + 1), steps[2 * j + 1], single, half, at + 32, width)


@part
def _six_bits(low, shift, high, up, d, d2, single, half, at, width):
    """d for the first 16 weights, d2 for the others."""
    single, half = _cut(single, at, width), _cut(half, at, width)
    for i in range(width):
        q = ((low[i] >> shift) & U8(15)) | (U8(U8(high[i] >> up) & U8(3)) << U8(4))
        _put((d if i < 16 else d2) * F(I32(I32(q) - I32(32))), single, half, i)


@jit
def _q6_k(blocks, single, half, halves, tables, width):
    for n in range(len(blocks)):
        block = blocks[n]
        d, s = halves[_word(block, 208)], block[192:208].view(np.int8)
        for j in range(2):
            high = block[128 + 32 * j : 160 + 32 * j]
            for k in range(4):
                low, at = block[64 * j + 32 * (k & 1) :], SUPERBLOCK * n + 128 * j + 32 * k
                one, other = d * F(s[8 * j + 2 * k]), d * F(s[8 * j + 2 * k + 1])
                _six_bits(low[:32], U8(4 * (k >> 1)), high, U8(2 * k), one, other, single, half, at, width)


@part
def _scaled(codes, d, single, half, at, width):
    single, half = _cut(single, at, width), _cut(half, at, width)
    for i in range(width):
        _put(_as_float(U32(U32(codes[i]) << U32(16))) * d, single, half, i)


@jit
def _iq1_s(blocks, single, half, halves, tables, width):
    entries, grid = np.empty(SUPERBLOCK // 4, U64), tables[0]
    codes = entries.view(U16)
    for n in range(len(blocks)):
        block = blocks[n]
        d = halves[_word(block, 0)]
        for b in range(8):
            high = _word(block, 34 + 2 * b)
            shifted = U64(U32(high >> U32(15)) << U32(11))  # the second half of the table: a grid moved the other way
            for k in range(4):
                e = shifted | U64(block[2 + 4 * b + k]) | (U64(U64(high >> U32(3 * k)) & U64(7)) << U64(8))
                # both are read before any is written: else LLVM must suppose that a write changes the other one
                first, second = grid[e << U64(1)], grid[(e << U64(1)) + U64(1)]
                entries[8 * b + 2 * k], entries[8 * b + 2 * k + 1] = first, second
        for b in range(8):
            s = d * F(I32(2 * ((block[35 + 2 * b] >> U8(4)) & U8(7)) + 1))
            _scaled(codes[32 * b : 32 * b + 32], s, single, half, SUPERBLOCK * n + 32 * b, width)


@jit
def _iq2_xxs(blocks, single, half, halves, tables, width):
    entries, grid, signs = np.empty(SUPERBLOCK // 4, U64), tables[0], tables[1]
    codes = entries.view(U16)
    for n in range(len(blocks)):
        block = blocks[n]
        d = halves[_word(block, 0)]
        for b in range(8):
            q = block[2 + 8 * b : 10 + 8 * b]
            high = _word(q, 4) | U32(_word(q, 6) << U32(16))
            for k in range(4):
                e, s = U64(q[k]) << U64(1), U64(U64(high >> U32(7 * k)) & U64(127)) << U64(1)
                first, second = grid[e] ^ signs[s], grid[e + U64(1)] ^ signs[s + U64(1)]
                entries[8 * b + 2 * k], entries[8 * b + 2 * k + 1] = first, second
        for b in range(8):
            s = d * (F(0.5) + F(I32(block[9 + 8 * b] >> U8(4)))) * F(0.25)
            _scaled(codes[32 * b : 32 * b + 32], s, single, half, SUPERBLOCK * n + 32 * b, width)


@cache
def _halves() -> np.ndarray:
    """What each float16 is, by its bits: float32 [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _entries(values: np.ndarray) -> np.ndarray:
    """float32 [n, 8], exact as bfloat16, -> its bits, uint64 [2 n]."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint64)


def _iq1_s_tables() -> tuple[np.ndarray, ...]:
    """The grid shifted up, then down."""
    grid = ggml_grid("IQ1_S")
    return (_entries(np.concatenate([grid + np.float32(0.125), grid - np.float32(0.125)])),)


def _iq2_xxs_tables() -> tuple[np.ndarray, ...]:
    """The grid, and the sign bits of 128 patterns, of which the eighth makes their product +1."""
    bits = (np.arange(128)[:, None] >> np.arange(7)) & 1
    signs = np.concatenate([bits, bits.sum(1, keepdims=True) % 2], axis=1).astype(np.uint16) << 15
    return _entries(ggml_grid("IQ2_XXS")), signs.reshape(-1).view(np.uint64)


KERNELS = {"Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "IQ1_S": _iq1_s, "IQ2_XXS": _iq2_xxs}
TABLES = {"IQ1_S": _iq1_s_tables, "IQ2_XXS": _iq2_xxs_tables}


@cache
def _tables(qtype: str) -> tuple[np.ndarray, ...]:
    return TABLES[qtype]() if qtype in TABLES else ()


def decode(qtype: str, blocks: np.ndarray, single: np.ndarray | None, half: np.ndarray | None) -> None:
    """Blocks uint8 [n, bytes] of a type in KERNELS into one flat output: float32, or the bits of bfloat16 (uint16)."""
    KERNELS[qtype](blocks, single, half, _halves(), _tables(qtype), WIDTH)
