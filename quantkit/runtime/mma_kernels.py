"""Triton: products of quantized matrices with some tokens by tensor cores, without shared memory.

What a thread decodes, 32 weights of a row, is in its registers already what the instruction m16n8k16 wants of it: that
asks of four neighbouring threads for columns of one row, of which each has some, and which of them are multiplied
together is free, as long as activations come in the same order. So threads wait for nothing but their own loads.
"""

import torch
import triton
import triton.language as tl

from quantkit.codecs.triton_decode import INTERPRETED
from quantkit.runtime.activations import Halves
from quantkit.runtime.launches import jit_kernel
from quantkit.runtime.parts import Matrices, first_of, part_of
from quantkit.runtime.run_kernels import LIFT, Runs, block_of, pairs_of, side_of, split, summed

BUSY = 1200  # programs that keep a GPU busy: sums of small matrices are split until there are so many
COLUMNS = 128  # of a row that a warp takes at a time


@triton.jit
def _packed(lo, hi, scale, offset):
    """Eight int8 in two words -> scale · v + offset as eight float16 in four words."""
    if INTERPRETED:
        found = ()
        for i in tl.static_range(4):
            word = lo * 0
            for k in tl.static_range(2):
                v = ((lo if i < 2 else hi) << (24 - 8 * (2 * (i % 2) + k))) >> 24
                half = (v.to(tl.float32) * scale + offset).to(tl.float16).to(tl.int16, bitcast=True)
                word = word | ((half.to(tl.int32) & 0xFFFF) << (16 * k))
            found = found + (word,)
        return found
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, o, a, b, m, k;
        cvt.rn.f16x2.f32 s, $6, $6;
        cvt.rn.f16x2.f32 o, $7, $7;
        mov.b32 k, 0x64646464;
        mov.b32 m, 0x64806480;
        xor.b32 a, $4, 0x80808080;
        xor.b32 b, $5, 0x80808080;
        prmt.b32 $0, a, k, 0x4140;
        prmt.b32 $1, a, k, 0x4342;
        prmt.b32 $2, b, k, 0x4140;
        prmt.b32 $3, b, k, 0x4342;
        sub.rn.f16x2 $0, $0, m;
        sub.rn.f16x2 $1, $1, m;
        sub.rn.f16x2 $2, $2, m;
        sub.rn.f16x2 $3, $3, m;
        fma.rn.f16x2 $0, $0, s, o;
        fma.rn.f16x2 $1, $1, s, o;
        fma.rn.f16x2 $2, $2, s, o;
        fma.rn.f16x2 $3, $3, s, o;
        }
        """,
        "=&r,=&r,=&r,=&r,r,r,f,f",
        [lo, hi, scale, offset],
        dtype=(tl.int32,) * 4,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _four(p):
    """Four words at a multiple of 16 bytes."""
    if INTERPRETED:
        at = p.to(tl.pointer_type(tl.int32))
        return tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    return tl.inline_asm_elementwise(
        "ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];",
        "=r,=r,=r,=r,l",
        [p.to(tl.int64)],
        dtype=(tl.int32,) * 4,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _float(word, k: tl.constexpr):
    """Half k of a word."""
    return (word >> (16 * k)).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _eight(a, b, c, d, warps: tl.constexpr):
    """Four words of each thread -> their halves [warps, 8, 32], by what the threads with one row or token have."""
    v = tl.join(
        tl.join(tl.join(_float(a, 0), _float(c, 0)), tl.join(_float(b, 0), _float(d, 0))),
        tl.join(tl.join(_float(a, 1), _float(c, 1)), tl.join(_float(b, 1), _float(d, 1))),
    )
    return tl.reshape(v, (warps, 8, 32))


@triton.jit
def _of_mma(rows, tokens, warps: tl.constexpr):
    even, odd = tl.split(tl.reshape(tl.sum(rows[:, :, None, :] * tokens[:, None, :, :], axis=3), (warps, 8, 4, 2)))
    return tl.reshape(even, (32 * warps,)), tl.reshape(odd, (32 * warps,))


@triton.jit
def _mma(sums, a, below, x, warps: tl.constexpr):
    """sums + of 32 columns: a row's words a, and those of the row 8 further down, times tokens' words x."""
    if INTERPRETED:
        tokens = _eight(x[0], x[1], x[2], x[3], warps)
        p, q = _of_mma(_eight(a[0], a[1], a[2], a[3], warps), tokens, warps)
        r, s = _of_mma(_eight(below[0], below[1], below[2], below[3], warps), tokens, warps)
        return sums[0] + p, sums[1] + q, sums[2] + r, sums[3] + s
    return tl.inline_asm_elementwise(
        """
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {$0, $1, $2, $3}, {$8, $12, $9, $13}, {$16, $17}, {$0, $1, $2, $3};
        mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32
            {$0, $1, $2, $3}, {$10, $14, $11, $15}, {$18, $19}, {$0, $1, $2, $3};
        """,
        "=f,=f,=f,=f,0,1,2,3,r,r,r,r,r,r,r,r,r,r,r,r",
        [
            sums[0], sums[1], sums[2], sums[3], a[0], a[1], a[2], a[3],
            below[0], below[1], below[2], below[3], x[0], x[1], x[2], x[3],
        ],
        dtype=(tl.float32,) * 4,
        is_pure=True,
        pack=1,
    )  # fmt: skip


@triton.jit
def _of(sums, i: tl.constexpr):
    """The four of a tile."""
    return sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]


@triton.jit
def _sixteen(w, data, row, chunk):
    """A chunk of each row: 32 float16 as four times four words."""
    base = data + tl.minimum(row, w.n_out - 1).to(tl.int64) * w.row_bytes
    part = part_of(w, base, chunk, w.n_in // 32)
    found = ()
    for k in tl.static_range(4):
        found = found + (_packed(part[2 * k], part[2 * k + 1], part[8 + k] * LIFT, part[12 + k] * LIFT),)
    return found


@jit_kernel(do_not_specialize=["x_share", "pairs", "splits", "steps"])
def _products(
    w,
    second,
    x,
    scales,
    order,
    table,
    out,
    x_share,
    pairs,
    splits,
    steps,
    tiles: tl.constexpr,
    sets: tl.constexpr,
    warps: tl.constexpr,
    scattered: tl.constexpr,
):
    """16 · tiles outputs from program_id(0) on, of the pairs of block program_id(1), 8 · sets at most, from the part
    program_id(2) % splits of their columns, `steps` steps: as `tile_kernels` has them."""
    mine, data, out = side_of(w, second, out, pairs, splits)
    last: tl.constexpr = w.n_in // 32
    end = tl.minimum(last // 4, (mine + 1) * steps)
    data, first, count, end = block_of(w, data, table, pairs, end, 8 * sets)
    thread = tl.arange(0, 32 * warps)
    eighth, fourth = (thread % 32) // 4, thread % 4
    tokens = ()
    for s in tl.static_range(sets):
        at = 8 * s + eighth
        pair = tl.where(at < count, first + at, first)
        if order is not None:
            pair = tl.load(order + pair)
        tokens = tokens + (x + (pair // x_share).to(tl.int64) * w.n_in,)
    row = tl.program_id(0) * 16 * tiles + eighth
    sums = ()
    for _ in tl.static_range(4 * tiles * sets):
        sums = sums + (tl.zeros([32 * warps], tl.float32),)
    for begin in range(mine * steps, end, warps):
        chunk = 4 * (begin + thread // 32) + fourth
        words = ()
        for k in tl.static_range(4):
            column = 8 * (first_of(w, chunk) + (k % 2) * w.near + (k // 2) * w.far)
            for s in tl.static_range(sets):
                words = words + (_four(tokens[s] + column),)
        new = ()
        for r in tl.static_range(tiles):
            weights = _sixteen(w, data, row + 16 * r, chunk) + _sixteen(w, data, row + 16 * r + 8, chunk)
            for s in tl.static_range(sets):
                total = _of(sums, r * sets + s)
                for k in tl.static_range(4):
                    total = _mma(total, weights[k], weights[4 + k], words[k * sets + s], warps)
                new = new + total
        sums = new
    lane = tl.arange(0, 32)[:, None, None]
    for s in tl.static_range(sets):
        at = 8 * s + 2 * (lane % 4) + tl.arange(0, 2)[None, None, :]
        here = at < count
        pair = tl.where(here, first + at, first)
        result = pair
        if order is not None:
            pair = tl.load(order + pair)
            if scattered:
                result = pair
        scale = tl.load(scales + pair // x_share) / LIFT
        for r in tl.static_range(tiles):
            total = _of(sums, r * sets + s)
            v = tl.join(tl.join(total[0], total[2]), tl.join(total[1], total[3]))
            v = tl.sum(tl.reshape(v, (warps, 32, 2, 2)), axis=0) * scale
            to = (tl.program_id(0) * tiles + r) * 16 + lane // 4 + 8 * tl.arange(0, 2)[None, :, None]
            tl.store(out + result.to(tl.int64) * w.n_out + to, v, mask=here & (to < w.n_out))


def able(w: Matrices, tokens: int) -> bool:
    """Whether so many tokens of a program can be multiplied so."""
    return bool(w.wide.value) and w.n_in.value % COLUMNS == 0 and tokens <= 16


def tiling(n_out: int, chosen: bool, tokens: int) -> tuple[int, int]:
    """Tiles of 16 rows of a program, and its warps, which share the columns. Measured with R1's matrices on an H200."""
    return (2, 2 if tokens == 8 else 1) if chosen or n_out >= 4096 else (1, 4)


def products(w: Matrices, x: Halves, runs: Runs | None = None, second: torch.Tensor | None = None) -> torch.Tensor:
    """As `tile_kernels.products`."""
    order, table, pairs, tokens, share, scattered = runs or pairs_of(x)
    n = w.n_in.value // COLUMNS
    tiles, warps = tiling(w.n_out, table is not None, tokens)
    warps = min(warps, n & -n)
    blocks, twice = triton.cdiv(pairs, tokens) if table is None else len(table), 1 if second is None else 2
    programs = triton.cdiv(w.n_out, 16 * tiles) * blocks * twice
    steps, splits = split(n // warps, programs, BUSY)
    out = torch.empty(twice, splits, pairs, w.n_out, dtype=torch.float32, device=w.data.device)
    _products[(triton.cdiv(w.n_out, 16 * tiles), blocks, twice * splits)](
        w, second, *x, order, table, out, share, pairs, splits, warps * steps, tiles, tokens // 8, warps, scattered,
        num_warps=warps, num_stages=1,
    )  # fmt: skip
    return summed(out)
