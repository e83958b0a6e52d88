"""Decoders of ggml blocks for the CPU, compiled by numba (LLVM in a wheel: no compiler is needed on the machine) and
cached on disk.

Each takes blocks uint8 [n, bytes], scales float32 [n, 1 or 2] (the blocks' float16 numbers), one flat output of float32
or of bfloat16 bits (uint16), the other being None, the tables of `unpack`, and GROUP.
"""

import numba
import numpy as np

SUPERBLOCK = 256
GROUP = 16  # weights of a Q6_K block with one scale
F, U8, U16, U32, U64, I32 = np.float32, np.uint8, np.uint16, np.uint32, np.uint64, np.int32
DELTA = F(0.125)  # by which IQ1_S shifts its grid

HOW = {"nogil": True, "cache": True, "error_model": "numpy", "boundscheck": False}
jit, part = numba.njit(**HOW), numba.njit(**HOW, forceinline=True)


@part
def _put(values, at, single, half):
    """A superblock to float32, or rounded to bfloat16 (to nearest, ties to even). The other output is None: numba
    compiles each kernel once for either. Casts keep numba's 64-bit integers out of the vector registers."""
    if single is not None:
        for i in range(SUPERBLOCK):
            single[at + i] = values[i]
    if half is not None:
        bits, out = values.view(U32), half[at : at + SUPERBLOCK]
        for i in range(SUPERBLOCK):
            b = bits[i]
            out[i] = U16(U32(U32(b + U32(0x7FFF)) + U32(U32(b >> U32(16)) & U32(1))) >> U32(16))


@part
def _steps(block, d, low, out):
    """The eight six-bit scales and minima of a Q4_K block, times d and low: out [8, 2]."""
    for j in range(8):
        if j < 4:
            s, m = block[4 + j] & U8(63), block[8 + j] & U8(63)
        else:
            s = (block[8 + j] & U8(15)) | ((block[j] >> U8(6)) << U8(4))
            m = (block[8 + j] >> U8(4)) | ((block[4 + j] >> U8(6)) << U8(4))
        out[j, 0], out[j, 1] = d * F(I32(s)), low * F(I32(m))


@part
def _four_bits(q, y, d1, m1, d2, m2, width):
    """width: 32, from an argument of the kernel: LLVM would unroll a constant loop before it could become vectors."""
    for i in range(width):
        y[i] = d1 * F(I32(q[i] & U8(15))) - m1
        y[i + 32] = d2 * F(I32(q[i] >> U8(4))) - m2


@jit
def _q4_k(blocks, scales, single, half, tables, width):
    values, steps = np.empty(SUPERBLOCK, F), np.empty((8, 2), F)
    for n in range(len(blocks)):
        block = blocks[n]
        _steps(block, scales[n, 0], scales[n, 1], steps)
        for j in range(4):
            _four_bits(block[16 + 32 * j : 48 + 32 * j], values[64 * j : 64 * j + 64], steps[2 * j, 0], steps[2 * j, 1],
                       steps[2 * j + 1, 0], steps[2 * j + 1, 1], 2 * width)  # fmt: skip
        _put(values, n * SUPERBLOCK, single, half)


@part
def _six_bits(low, low2, high, y, d1, d2, d3, d4, width):
    """width: GROUP; see _four_bits."""
    for i in range(width):
        a, b, h = low[i], low2[i], high[i]
        y[i] = d1 * F(I32(I32((a & U8(15)) | ((h & U8(3)) << U8(4))) - I32(32)))
        y[i + 32] = d2 * F(I32(I32((b & U8(15)) | (((h >> U8(2)) & U8(3)) << U8(4))) - I32(32)))
        y[i + 64] = d3 * F(I32(I32((a >> U8(4)) | (((h >> U8(4)) & U8(3)) << U8(4))) - I32(32)))
        y[i + 96] = d4 * F(I32(I32((b >> U8(4)) | ((h >> U8(6)) << U8(4))) - I32(32)))


@jit
def _q6_k(blocks, scales, single, half, tables, width):
    values = np.empty(SUPERBLOCK, F)
    for n in range(len(blocks)):
        block, d = blocks[n], scales[n, 0]
        for j in range(2):
            for k in range(2):
                s, low, y = block[192 + 8 * j + k : 208].view(np.int8), 64 * j + 16 * k, values[128 * j + 16 * k :]
                _six_bits(block[low:], block[low + 32 :], block[128 + 32 * j + 16 * k :], y,
                          d * F(s[0]), d * F(s[2]), d * F(s[4]), d * F(s[6]), width)  # fmt: skip
        _put(values, n * SUPERBLOCK, single, half)


@part
def _eight(table, at):
    """Eight numbers, all read before any is written: else LLVM must suppose that a write changes the next one."""
    at = U64(at) * U64(8)
    return (table[at], table[at + U64(1)], table[at + U64(2)], table[at + U64(3)], table[at + U64(4)],
            table[at + U64(5)], table[at + U64(6)], table[at + U64(7)])  # fmt: skip


@jit
def _iq1_s(blocks, scales, single, half, tables, width):
    values, grid = np.empty(SUPERBLOCK, F), tables[0]
    for n in range(len(blocks)):
        block, d = blocks[n], scales[n, 0]
        for b in range(8):
            high = U32(U32(block[34 + 2 * b]) | U32(U32(block[35 + 2 * b]) << U32(8)))
            s = d * F(I32(2 * ((high >> U32(12)) & U32(7)) + 1))
            t = -DELTA if high & U32(0x8000) else DELTA
            for k in range(4):
                e = _eight(grid, U64(block[2 + 4 * b + k]) | U64(U64(high >> U32(3 * k)) & U64(7)) << U64(8))
                v = (s * (e[0] + t), s * (e[1] + t), s * (e[2] + t), s * (e[3] + t),
                     s * (e[4] + t), s * (e[5] + t), s * (e[6] + t), s * (e[7] + t))  # fmt: skip
                y = 32 * b + 8 * k
                values[y], values[y + 1], values[y + 2], values[y + 3] = v[0], v[1], v[2], v[3]
                values[y + 4], values[y + 5], values[y + 6], values[y + 7] = v[4], v[5], v[6], v[7]
        _put(values, n * SUPERBLOCK, single, half)


@jit
def _iq2_xxs(blocks, scales, single, half, tables, width):
    values, grid, signs = np.empty(SUPERBLOCK, F), tables[0], tables[1]
    for n in range(len(blocks)):
        block, d = blocks[n], scales[n, 0]
        for b in range(8):
            q = block[2 + 8 * b : 10 + 8 * b]
            high = U64(q[4]) | U64(q[5]) << U64(8) | U64(q[6]) << U64(16) | U64(q[7]) << U64(24)
            s = d * (F(0.5) + F(I32(high >> U64(28)))) * F(0.25)
            for k in range(4):
                e, t = _eight(grid, q[k]), _eight(signs, (high >> U64(7 * k)) & U64(127))
                v = (s * e[0] * t[0], s * e[1] * t[1], s * e[2] * t[2], s * e[3] * t[3],
                     s * e[4] * t[4], s * e[5] * t[5], s * e[6] * t[6], s * e[7] * t[7])  # fmt: skip
                y = 32 * b + 8 * k
                values[y], values[y + 1], values[y + 2], values[y + 3] = v[0], v[1], v[2], v[3]
                values[y + 4], values[y + 5], values[y + 6], values[y + 7] = v[4], v[5], v[6], v[7]
        _put(values, n * SUPERBLOCK, single, half)


KERNELS = {"Q4_K": _q4_k, "Q6_K": _q6_k, "IQ1_S": _iq1_s, "IQ2_XXS": _iq2_xxs}
