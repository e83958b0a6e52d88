"""Triton: products of quantized matrices with some more tokens than `kernels` takes, by tensor cores.

A program decodes a tile of a matrix as `kernels` does, into float16, and multiplies it by all tokens that want it: no
matrix is ever whole in another form. Activations are float16 with a scale for each row, so that eleven bits of both
count (bfloat16 has eight); sums are float32.
"""

import torch
import triton
import triton.language as tl

from quantkit.codecs.triton_decode import INTERPRETED
from quantkit.runtime.activations import Halves
from quantkit.runtime.launches import jit_kernel
from quantkit.runtime.parts import Matrices, part_of
from quantkit.runtime.run_kernels import LIFT, Runs, block_of, pairs_of, side_of, split, summed

BUSY = 264  # programs that keep a GPU busy: sums of small matrices are split until there are so many
ROWS, COLUMNS, WARPS = 64, 128, 4  # of a tile, and a program's; measured with R1's matrices on an H200
LEAST = 16  # tokens of a program


@triton.jit
def _eight(lo, hi, scale, offset):
    """Eight int8 in two words -> scale · v + offset as eight float16."""
    if INTERPRETED:
        found = ()
        for i in tl.static_range(8):
            v = ((lo if i < 4 else hi) << (24 - 8 * (i % 4))) >> 24
            found = found + ((v.to(tl.float32) * scale + offset).to(tl.float16),)
        return found
    return tl.inline_asm_elementwise(
        """
        {
        .reg .b32 s, o, a, b, m, k;
        .reg .b32 p, q, r, t;
        cvt.rn.f16x2.f32 s, $10, $10;
        cvt.rn.f16x2.f32 o, $11, $11;
        mov.b32 k, 0x64646464;
        mov.b32 m, 0x64806480;
        xor.b32 a, $8, 0x80808080;
        xor.b32 b, $9, 0x80808080;
        prmt.b32 p, a, k, 0x4140;
        prmt.b32 q, a, k, 0x4342;
        prmt.b32 r, b, k, 0x4140;
        prmt.b32 t, b, k, 0x4342;
        sub.rn.f16x2 p, p, m;
        sub.rn.f16x2 q, q, m;
        sub.rn.f16x2 r, r, m;
        sub.rn.f16x2 t, t, m;
        fma.rn.f16x2 p, p, s, o;
        fma.rn.f16x2 q, q, s, o;
        fma.rn.f16x2 r, r, s, o;
        fma.rn.f16x2 t, t, s, o;
        mov.b32 {$0, $1}, p;
        mov.b32 {$2, $3}, q;
        mov.b32 {$4, $5}, r;
        mov.b32 {$6, $7}, t;
        }
        """,
        "=h,=h,=h,=h,=h,=h,=h,=h,r,r,f,f",
        [lo, hi, scale, offset],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _joined(a, b, c, d):
    """[n] each -> [n, 2, 2]: a, b, c, d."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def _tile(w, part, rows: tl.constexpr, chunks: tl.constexpr):
    """What was decoded of rows · chunks chunks, or groups -> float16 [rows, columns], columns in their order."""
    if w.wide:
        a = _eight(part[0], part[1], part[8] * LIFT, part[12] * LIFT)
        b = _eight(part[2], part[3], part[9] * LIFT, part[13] * LIFT)
        c = _eight(part[4], part[5], part[10] * LIFT, part[14] * LIFT)
        d = _eight(part[6], part[7], part[11] * LIFT, part[15] * LIFT)
        v = tl.join(
            tl.join(
                tl.join(_joined(a[0], b[0], c[0], d[0]), _joined(a[4], b[4], c[4], d[4])),
                tl.join(_joined(a[2], b[2], c[2], d[2]), _joined(a[6], b[6], c[6], d[6])),
            ),
            tl.join(
                tl.join(_joined(a[1], b[1], c[1], d[1]), _joined(a[5], b[5], c[5], d[5])),
                tl.join(_joined(a[3], b[3], c[3], d[3]), _joined(a[7], b[7], c[7], d[7])),
            ),
        )
        if w.near == 4:
            v = tl.reshape(v, (rows, chunks // 4, 4, 4, 8))
            v = tl.permute(v, (0, 1, 3, 2, 4))
        elif w.far == 4:
            v = tl.reshape(v, (rows, chunks // 2, 2, 2, 2, 8))
            v = tl.permute(v, (0, 1, 3, 2, 4, 5))
        return tl.reshape(v, (rows, 32 * chunks))
    else:
        a = _eight(part[0], part[1], part[2] * LIFT, part[3] * LIFT)
        v = tl.join(
            tl.join(tl.join(a[0], a[4]), tl.join(a[2], a[6])), tl.join(tl.join(a[1], a[5]), tl.join(a[3], a[7]))
        )
        return tl.reshape(v, (rows, 8 * chunks))


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
    rows: tl.constexpr,
    tokens: tl.constexpr,
    chunks: tl.constexpr,
    scattered: tl.constexpr,
):
    """`rows` outputs from program_id(0) on, of the pairs of block program_id(1), from the part program_id(2) % splits
    of their columns, `steps` tiles: out [2 (with second), splits, pairs, n_out]. second: as in `kernels`."""
    mine, data, out = side_of(w, second, out, pairs, splits)
    last = w.n_in // 32 if w.wide else w.n_in // 8
    end = tl.minimum(last, (mine + 1) * steps * chunks)
    data, first, count, end = block_of(w, data, table, pairs, end, tokens)
    at = tl.arange(0, tokens)
    here = at < count
    pair = tl.minimum(first + at, pairs - 1)
    result = pair
    if order is not None:
        pair = tl.load(order + pair)
        if scattered:
            result = pair
    token = (pair // x_share).to(tl.int64)
    place = tl.arange(0, rows * chunks)
    row = tl.minimum(tl.program_id(0) * rows + place // chunks, w.n_out - 1)
    base = data + row.to(tl.int64) * w.row_bytes
    width: tl.constexpr = (32 if w.wide else 8) * chunks
    xs = x + token[:, None] * w.n_in + tl.arange(0, width)[None, :]
    total = tl.zeros([rows, tokens], tl.float32)
    for begin in range(mine * steps * chunks, end, chunks):
        weights = _tile(w, part_of(w, base, begin + place % chunks, last), rows, chunks)
        columns = tl.load(xs + begin * (width // chunks), mask=here[:, None], other=0.0)
        total = tl.dot(weights, tl.trans(columns), total)
    total *= tl.load(scales + token, mask=here, other=0.0)[None, :] / LIFT
    to = tl.program_id(0) * rows + tl.arange(0, rows)
    address = out + result.to(tl.int64)[None, :] * w.n_out + to[:, None]
    tl.store(address, total, mask=here[None, :] & (to < w.n_out)[:, None])


def _chunks(w: Matrices) -> int:
    """Chunks of 32 weights, or groups of 8, of a row at a time: what a row has is a multiple of them."""
    size = 32 if w.wide.value else 8
    n = w.n_in.value // size
    return min(COLUMNS // size, n & -n)


def products(w: Matrices, x: Halves, runs: Runs | None = None, second: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [pairs, n_out]: of each pair its matrix times its row of x; without runs, of each row the only matrix.

    second: other matrices like w, whose products are made too: the result is then [2, pairs, n_out]. Weights beyond
    1,023 overflow.
    """
    n_out, n_in = w.n_out, x.x.shape[1]
    order, table, pairs, tokens, share, scattered = runs or pairs_of(x)
    tokens = max(tokens, LEAST)
    chunks, twice = _chunks(w), 1 if second is None else 2
    blocks = triton.cdiv(pairs, tokens) if table is None else len(table)
    tile = min(ROWS, max(16, triton.next_power_of_2(n_out)))
    programs = triton.cdiv(n_out, tile) * blocks * twice
    tiles = triton.cdiv(n_in, chunks * (32 if w.wide.value else 8))
    steps, splits = split(tiles, programs, BUSY)
    out = torch.empty(twice, splits, pairs, n_out, dtype=torch.float32, device=w.data.device)
    _products[(triton.cdiv(n_out, tile), blocks, twice * splits)](
        w, second, *x, order, table, out, share, pairs, splits, steps, tile, tokens, chunks,
        scattered, num_warps=WARPS, num_stages=1,
    )  # fmt: skip
    return summed(out)
