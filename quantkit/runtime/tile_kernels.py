"""Triton: products of quantized matrices with some more tokens than `kernels` takes, by tensor cores.

A program decodes a tile of a matrix as `kernels` does, into float16, and multiplies it by all tokens that want it: no
matrix is ever whole in another form. Activations are float16 with a scale for each row, so that eleven bits of both
count (bfloat16 has eight); sums are float32.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.codecs.triton_decode import INTERPRETED
from quantkit.runtime.activations import Halves
from quantkit.runtime.parts import Matrices, part_of

BUSY = 264  # programs that keep a GPU busy: sums of small matrices are split until there are so many
LIFT = tl.constexpr(64.0)  # float16 has its full precision from 6e-5 on, and weights are as small


class Tiling(NamedTuple):
    """rows and columns of a tile, and the program's warps."""

    rows: int
    columns: int
    warps: int
    stages: int = 1


TILINGS = {
    16: Tiling(64, 256, 4),
    32: Tiling(64, 256, 4),
    64: Tiling(128, 128, 8),
    128: Tiling(128, 128, 8),
}  # by the tokens of a program; measured with R1's matrices on an H200


class Runs(NamedTuple):
    """Pairs of a token and a matrix, those of one matrix together. order: int32 [pairs], sorted by matrix; None: they
    are. table: int32 [blocks, 3]: a matrix (-1: none, zeros), the first of its pairs in that order, and how many, at
    most `tokens`; 0 beyond the last. share: neighbouring pairs that share a row of activations. scattered: results are
    in the pairs' own order, not in this one."""

    order: torch.Tensor | None
    table: torch.Tensor | None
    pairs: int
    tokens: int
    share: int
    scattered: bool


@triton.jit
def _halves(gate, up, out, scales, n, width: tl.constexpr):
    """Row program_id(0) of gate, or silu(gate) · up, as float16 of at most 1, and what it is to be multiplied by."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < n
    v = tl.load(gate + row * n + at, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        v = v / (1 + tl.exp(-v)) * tl.load(up + row * n + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(v), axis=0), 1e-30)
    tl.store(out + row * n + at, (v / largest).to(tl.float16), mask=inside)
    tl.store(scales + row, largest)


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


@triton.jit
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
    block, split = tl.program_id(1), tl.program_id(2) % splits
    data = w.data
    if second is not None:
        if tl.program_id(2) >= splits:
            data = second
    out += tl.program_id(2).to(tl.int64) * pairs * w.n_out
    last = w.n_in // 32 if w.wide else w.n_in // 8
    end = tl.minimum(last, (split + 1) * steps * chunks)
    if table is None:
        first, count = block * tokens, tl.minimum(tokens, pairs - block * tokens)
    else:
        matrix, first = tl.load(table + 3 * block), tl.load(table + 3 * block + 1)
        count = tl.load(table + 3 * block + 2)
        data += tl.maximum(matrix, 0).to(tl.int64) * w.matrix_bytes
        end = tl.where((matrix < 0) | (count == 0), 0, end)
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
    for begin in range(split * steps * chunks, end, chunks):
        weights = _tile(w, part_of(w, base, begin + place % chunks, last), rows, chunks)
        columns = tl.load(xs + begin * (width // chunks), mask=here[:, None], other=0.0)
        total = tl.dot(weights, tl.trans(columns), total)
    total *= tl.load(scales + token, mask=here, other=0.0)[None, :] / LIFT
    to = tl.program_id(0) * rows + tl.arange(0, rows)
    address = out + result.to(tl.int64)[None, :] * w.n_out + to[:, None]
    tl.store(address, total, mask=here[None, :] & (to < w.n_out)[:, None])


@triton.jit
def _order(ids, order, table, n, n_matrices, blocks, width: tl.constexpr, kinds: tl.constexpr, tokens: tl.constexpr):
    """`Runs` of ids [n]: programs from 1 on place a pair each, the first one writes the table."""
    at = tl.arange(0, width)
    matrix = tl.load(ids + at, mask=at < n, other=-1)
    matrix = tl.where(at < n, tl.where(matrix < 0, n_matrices, matrix), kinds)
    me = tl.program_id(0) - 1
    if me >= 0:
        mine = tl.load(ids + me)
        mine = tl.where(mine < 0, n_matrices, mine)
        place = tl.sum(((matrix < mine) | ((matrix == mine) & (at < me))).to(tl.int32), axis=0)
        tl.store(order + place, me)
    else:
        kind = tl.arange(0, kinds)
        counts = tl.histogram(tl.minimum(matrix, kinds - 1), kinds)
        _table(tl.where(kind <= n_matrices, counts, 0), table, n_matrices, blocks, kinds, tokens)


@triton.jit
def _of_ends(ends, table, n_matrices, blocks, kinds: tl.constexpr, tokens: tl.constexpr):
    """The table of runs that end at `ends`, one of each matrix."""
    kind = tl.arange(0, kinds)
    end = tl.load(ends + kind, mask=kind < n_matrices, other=0)
    begin = tl.load(ends + kind - 1, mask=(kind > 0) & (kind < n_matrices), other=0)
    _table(tl.where(kind < n_matrices, end - begin, 0), table, n_matrices, blocks, kinds, tokens)


@triton.jit
def _table(counts, table, n_matrices, blocks, kinds: tl.constexpr, tokens: tl.constexpr):
    kind = tl.arange(0, kinds)
    first = tl.cumsum(counts, axis=0) - counts
    parts = (counts + tokens - 1) // tokens
    to = tl.cumsum(parts, axis=0) - parts
    matrix = tl.where(kind < n_matrices, kind, -1)
    for i in range(tl.max(parts, axis=0)):
        there = i < parts
        entry = table + 3 * (to + i)
        tl.store(entry, matrix, mask=there)
        tl.store(entry + 1, first + i * tokens, mask=there)
        tl.store(entry + 2, tl.minimum(counts - i * tokens, tokens), mask=there)
    used = tl.sum(parts, axis=0)
    for begin in range(0, blocks, kinds):
        entry = begin + kind
        tl.store(table + 3 * entry + 2, 0, mask=(entry >= used) & (entry < blocks))


def halves(gate: torch.Tensor, up: torch.Tensor | None = None) -> Halves:
    """gate, or silu(gate) · up: [n, n_in], contiguous, of any kind of float."""
    n, n_in = gate.shape
    found = Halves(torch.empty(n, n_in, dtype=torch.float16, device=gate.device), torch.empty(n, device=gate.device))
    width = triton.next_power_of_2(n_in)
    _halves[(n,)](gate, up, *found, n_in, width, num_warps=min(16, max(1, width // 512)))
    return found


def tokens_of(pairs: int, n_matrices: int) -> int:
    """Of a program: for so many pairs, evenly spread."""
    mean = pairs / n_matrices
    return next((n for n in TILINGS if n >= mean), max(TILINGS))


def _blocks(pairs: int, n_matrices: int, tokens: int) -> int:
    """Of a table at most."""
    return min(pairs, n_matrices + pairs // tokens)


def runs(ids: torch.Tensor, n_matrices: int, share: int = 1) -> Runs:
    """Of a few pairs: ids int32 [pairs] of matrices, below 0 none. Nothing waits for the GPU."""
    pairs = len(ids)
    tokens = tokens_of(pairs, n_matrices)
    blocks = _blocks(pairs, n_matrices + 1, tokens)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    table = torch.empty(blocks, 3, dtype=torch.int32, device=ids.device)
    width, kinds = triton.next_power_of_2(pairs), triton.next_power_of_2(n_matrices + 2)
    _order[(1 + pairs,)](ids, order, table, pairs, n_matrices, blocks, width, kinds, tokens, num_warps=4)
    return Runs(order, table, pairs, tokens, share, True)


def sorted_runs(order: torch.Tensor, ends: torch.Tensor, share: int) -> Runs:
    """Of pairs in this order, int32, of which those of each matrix end at ends int32 [n_matrices]."""
    pairs, n_matrices = len(order), len(ends)
    tokens = tokens_of(pairs, n_matrices)
    blocks = _blocks(pairs, n_matrices, tokens)
    table = torch.empty(blocks, 3, dtype=torch.int32, device=ends.device)
    _of_ends[(1,)](ends, table, n_matrices, blocks, triton.next_power_of_2(n_matrices), tokens, num_warps=4)
    return Runs(order, table, pairs, tokens, share, False)


def _chunks(w: Matrices, columns: int) -> int:
    """Chunks of 32 weights, or groups of 8, of a row at a time: what a row has is a multiple of them."""
    size = 32 if w.wide.value else 8
    n = w.n_in.value // size
    return min(columns // size, n & -n)


def products(w: Matrices, x: Halves, runs: Runs | None = None, second: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [pairs, n_out]: of each pair its matrix times its row of x; without runs, of each row the only matrix.

    second: other matrices like w, whose products are made too: the result is then [2, pairs, n_out]. Weights beyond
    1,023 overflow.
    """
    n_out, n_in = w.n_out, x.x.shape[1]
    order, table, pairs, tokens, share, scattered = runs or Runs(None, None, len(x.x), tokens_of(len(x.x), 1), 1, False)
    tiling = TILINGS[tokens]
    chunks, twice = _chunks(w, tiling.columns), 1 if second is None else 2
    blocks = triton.cdiv(pairs, tokens) if table is None else len(table)
    tile = min(tiling.rows, max(16, triton.next_power_of_2(n_out)))
    programs = triton.cdiv(n_out, tile) * blocks * twice
    tiles = triton.cdiv(n_in, chunks * (32 if w.wide.value else 8))
    steps = triton.cdiv(tiles, min(tiles, triton.cdiv(BUSY, programs)))
    splits = triton.cdiv(tiles, steps)
    out = torch.empty(twice, splits, pairs, n_out, dtype=torch.float32, device=w.data.device)
    _products[(triton.cdiv(n_out, tile), blocks, twice * splits)](
        w, second, *x, order, table, out, share, pairs, splits, steps, tile, tokens, chunks,
        scattered, num_warps=tiling.warps, num_stages=tiling.stages,
    )  # fmt: skip
    found = out[:, 0] if splits == 1 else out.sum(1)
    return found[0] if second is None else found
