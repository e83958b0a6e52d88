"""Triton: products with quantized matrices, decoded in registers.

All types are taken apart into groups of 8 neighbouring weights, `scale · v + offset` with the eight int8 in two words,
by the functions of `codecs/triton_decode.py`. They are multiplied as integers, four at a time (dp4a), by activations of
16 bits: a signed and an unsigned byte each, so that next to nothing is lost.
"""

import torch
import triton
import triton.language as tl

from quantkit.codecs import types as qtypes
from quantkit.codecs.codebooks import for_kernels
from quantkit.codecs.registry import codec, triton_twin
from quantkit.codecs.triton_decode import INTERPRETED
from quantkit.codecs.triton_wide import WIDE
from quantkit.runtime.activations import Activations
from quantkit.runtime.launches import jit_kernel
from quantkit.runtime.parts import Matrices, first_of, group_of, part_of

WARPS = 4
GROUPS = 128  # groups of 8 columns per step of a program that dequantizes: one per thread
LANES = 32  # of a warp


@triton.jit
def _signed(word, i: tl.constexpr):
    """Byte i of a word as a signed number."""
    return ((word << (24 - 8 * i)) >> 24).to(tl.float32)


@triton.jit
def _dot4(weights, x, total, signed: tl.constexpr):
    """total + the four products of a word of int8 with one of int8, or of uint8."""
    if INTERPRETED:
        for i in tl.static_range(4):
            byte = (x << (24 - 8 * i)) >> 24 if signed else (x >> (8 * i)) & 255
            total = total + ((weights << (24 - 8 * i)) >> 24) * byte
        return total
    if signed:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [weights, x, total], dtype=tl.int32, is_pure=True, pack=1
        )
    return tl.inline_asm_elementwise(
        "dp4a.s32.u32 $0, $1, $2, $3;", "=r,r,r,r", [weights, x, total], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _tokens(x, scales, g, n_in, there):
    """Eight activations of each group: the words of their upper bytes and of their lower, and what integers count."""
    words, plane = x + g, n_in // 8
    a, b = tl.load(words, mask=there, other=0), tl.load(words + plane, mask=there, other=0)
    c, d = tl.load(words + 2 * plane, mask=there, other=0), tl.load(words + 3 * plane, mask=there, other=0)
    return a, b, c, d, tl.load(scales + g // 4, mask=there, other=0.0)


@triton.jit
def _dots(lo, hi, a, b, c, d, upper, lower):
    """Eight int8 in two words times activations' upper bytes a, b (signed) and lower ones c, d: added to the sums of
    both."""
    return _dot4(hi, b, _dot4(lo, a, upper, True), True), _dot4(hi, d, _dot4(lo, c, lower, False), False)


@triton.jit
def _number(upper, lower, unit):
    return (upper * 256 + lower).to(tl.float32) * unit


@triton.jit
def _activations(x, scales, token, w, at, last):
    """A token's part for group or chunk `at` of every row: of each group five as `_tokens` gives them, and the sum of
    those of groups with one scale, which their offset is multiplied by, at the last of them."""
    x += token * (w.n_in // 2)
    scales += token * (w.n_in // 32)
    found = ()
    ones, up, low = at * 0 + 0x01010101, at * 0, at * 0
    for k in tl.static_range(4 if w.wide else 1):
        g = first_of(w, at) + (k % 2) * w.near + (k // 2) * w.far if w.wide else at
        a, b, c, d, unit = _tokens(x, scales, g, w.n_in, at < last)
        count = unit
        if w.offset:
            up, low = _dots(ones, ones, a, b, c, d, up, low)
            if ((w.alike - 1) & k) == w.alike - 1:
                count = _number(up, low, unit)
                up, low = at * 0, at * 0
        found = found + (a, b, c, d, unit, count)
    return found


@triton.jit
def _times(part, x, w):
    """A part of a row times activations. Groups with one scale are summed as integers."""
    groups: tl.constexpr = 4 if w.wide else 1
    total = part[2 * groups] * 0
    upper, lower = part[0] * 0, part[0] * 0
    for k in tl.static_range(groups):
        upper, lower = _dots(
            part[2 * k], part[2 * k + 1], x[6 * k], x[6 * k + 1], x[6 * k + 2], x[6 * k + 3], upper, lower
        )
        if ((w.alike - 1) & k) == w.alike - 1:
            total += part[2 * groups + k] * _number(upper, lower, x[6 * k + 4])
            upper, lower = part[0] * 0, part[0] * 0
            if w.offset:
                total += part[3 * groups + k] * x[6 * k + 5]
    return total


@jit_kernel(do_not_specialize=["pairs"])
def _products(w, second, x, scales, ids, out, x_share, pairs, rows: tl.constexpr, tile: tl.constexpr):
    """`rows` outputs of pair program_id(1): matrix ids[pair] (the first without ids) times row pair / x_share of x; 0
    where ids is below 0.

    second: the bytes of other matrices like w, whose outputs follow: those of program_id(2) = 1. Everything has one
    dimension, a thread for each part of a row: in two Triton gives neighbouring threads neighbouring rows.
    """
    pair = tl.program_id(1)
    row = tl.program_id(0) * rows
    data = w.data
    if second is not None:
        if tl.program_id(2) == 1:
            data = second
            out += w.n_out * pairs
    last: tl.constexpr = w.n_in // 32 if w.wide else w.n_in // 8
    stop = last
    if ids is not None:
        matrix = tl.load(ids + pair)
        data += tl.maximum(matrix, 0).to(tl.int64) * w.matrix_bytes
        stop = tl.where(matrix < 0, 0, last)
    token = (pair // x_share).to(tl.int64)
    totals = ()
    for _ in tl.static_range(rows):
        totals = totals + (tl.zeros([tile], tl.float32),)
    for start in range(0, stop, tile):
        at = start + tl.arange(0, tile)
        activations = _activations(x, scales, token, w, at, last)
        sums = ()
        for r in tl.static_range(rows):
            part = part_of(w, data + tl.minimum(row + r, w.n_out - 1).to(tl.int64) * w.row_bytes, at, last)
            sums = sums + (totals[r] + _times(part, activations, w),)
        totals = sums
    to = out + pair.to(tl.int64) * w.n_out + row
    for r in tl.static_range(rows):
        tl.store(to + r, tl.sum(totals[r], axis=0), mask=row + r < w.n_out)


@jit_kernel
def _weights(w, out, groups: tl.constexpr):
    """Dequantize `groups` groups of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * groups + tl.arange(0, groups)
    last: tl.constexpr = w.n_in // 8
    lo, hi, scale, offset = group_of(w, w.data + row * w.row_bytes, tl.minimum(g, last - 1))
    even = tl.join(tl.join(_signed(lo, 0), _signed(hi, 0)), tl.join(_signed(lo, 2), _signed(hi, 2)))
    odd = tl.join(tl.join(_signed(lo, 1), _signed(hi, 1)), tl.join(_signed(lo, 3), _signed(hi, 3)))
    v = tl.reshape(tl.join(even, odd), (groups, 8))  # from [half, pair, parity]
    v = (v * scale[:, None] + offset[:, None]).to(out.dtype.element_ty)
    here = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + row * w.n_in + here, v, mask=here < w.n_in)


def matrices(
    qtype: str, data: torch.Tensor, n_in: int, chunks: bool = False, second: torch.Tensor | None = None
) -> Matrices:
    """chunks: of 32 weights, where there is a function for that. second: others like them."""
    n_out, row_bytes = data.shape[-2:]
    sizes, wide = qtypes.stored(qtype), WIDE.get(qtype) if chunks else None
    of_chunks = (wide.near, wide.far, wide.alike, wide.offset) if wide else (1, 2, 1, True)
    return Matrices(
        data,
        for_kernels(codec(qtype).codebook, data.device),
        n_out,
        row_bytes,
        n_out * row_bytes,
        tl.constexpr(n_in),
        wide.decode if wide else triton_twin(qtype),
        tl.constexpr(sizes.type_size),
        tl.constexpr(sizes.block_size // 8),
        tl.constexpr(wide is not None),
        tl.constexpr(row_bytes % 4 == 0 == data.data_ptr() % 4 and (second is None or second.data_ptr() % 4 == 0)),
        *map(tl.constexpr, of_chunks),
    )


def _tile(n_in: int) -> int:
    """Groups per step."""
    exact = (size for size in (GROUPS, GROUPS // 2) if n_in // 8 % size == 0)
    return next(exact, min(GROUPS, triton.next_power_of_2(n_in // 8)))


def tiling(n_out: int, n_in: int, chosen: bool) -> tuple[int, int]:
    """Rows of a program, and its warps, which share each of them. Measured with R1's matrices on an H200; the number of
    tokens has no say, or their sums would depend on it."""
    if n_in < 512 or (chosen and n_in >= 1024):
        return 8, 1
    return (4, 4) if n_in >= 4096 and n_out <= 8192 else (4, 1)


def products(
    qtype: str,
    data: torch.Tensor,
    x: Activations,
    ids: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
) -> torch.Tensor:
    """float32 [pairs, n_out]: of pair p, matrix ids[p] (without ids: the only one) times its row of x.

    data: uint8 [n_matrices, n_out, row_bytes]. x: of n rows; pairs is a multiple of n, and neighbouring pairs share a
    row. ids: int32 [pairs]; below 0: no matrix, the product is 0. second: other matrices like data, whose products are
    made too: the result is then [2, pairs, n_out]. Every pair is computed alone: its bits do not depend on the others.
    """
    assert x.words is not None and x.scales is not None
    n, n_out, n_in = len(x.x), data.shape[1], x.x.shape[-1]
    pairs = n if ids is None else ids.numel()
    out = torch.empty(1 if second is None else 2, pairs, n_out, dtype=torch.float32, device=data.device)
    rows, warps = tiling(n_out, n_in, ids is not None)
    rows = min(rows, triton.next_power_of_2(n_out))
    _products[(triton.cdiv(n_out, rows), pairs, len(out))](
        matrices(qtype, data, n_in, n_in >= 32 * LANES, second),
        second,
        x.words,
        x.scales,
        ids,
        out,
        pairs // n,
        pairs,
        rows,
        LANES * warps,
        num_warps=warps,
        enable_fp_fusion=False,  # or a token's last bits would depend on how many there are
    )
    return out[0] if second is None else out


def dequantize(qtype: str, data: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] -> out [rows, n_in], contiguous, in its dtype."""
    n_rows, n_in = out.shape
    groups = _tile(n_in)
    rows = matrices(qtype, data, n_in)._replace(n_out=0, matrix_bytes=0)  # not read: or 1 and 16 had their own kernels
    _weights[(n_rows, triton.cdiv(n_in // 8, groups))](rows, out, groups, num_warps=WARPS)
    return out
