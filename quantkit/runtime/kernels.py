"""Triton: products with quantized matrices, decoded in registers, and routing.

All types are taken apart into groups of 8 neighbouring weights, `scale · v + offset` with the eight int8 in two words,
by the functions of `codecs/triton_decode.py`. They are multiplied as integers, four at a time (dp4a), by activations of
16 bits: a signed and an unsigned byte each, so that next to nothing is lost.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.codecs import types as qtypes
from quantkit.codecs.codebooks import for_kernels
from quantkit.codecs.registry import codec, triton_twin
from quantkit.codecs.triton_wide import WIDE
from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import Activations

WARPS = 4
GROUPS = 128  # groups of 8 columns per step of a program that dequantizes: one per thread
LANES = 32  # of a program that multiplies: one warp, which needs no barriers
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without inline assembly
PDL, FETCH, NARROW = True, 1, True  # switches
FORCED: dict = {}


def launching(device) -> dict:
    if PDL and device.type == "cuda" and not INTERPRETED.value and torch.cuda.get_device_capability(device) >= (9, 0):
        return {"overlap": True, "launch_pdl": True}
    return {"overlap": False}


@triton.jit
def follow(overlap: tl.constexpr):
    """The next kernel may get its programs into place; what the one before has written is there."""
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _fetch(p, size, lanes: tl.constexpr, how: tl.constexpr):
    """Ask for bytes from p on, that they be in the L2 cache when they are read."""
    first = p.to(tl.int64) & -16
    size = (p.to(tl.int64) + size - first) & -16
    if how == 1:
        part = (((size + 15) // lanes + 15) // 16 * 16).to(tl.int32)
        at = first + tl.minimum(tl.arange(0, lanes) * part, tl.maximum(size - part, 0))
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [at, tl.minimum(part, size.to(tl.int32)) + tl.arange(0, lanes) * 0],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        for begin in range(0, size, lanes * 128):
            at = first + tl.minimum(begin + tl.arange(0, lanes) * 128, size)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
            )


class Matrices(NamedTuple):
    """Quantized matrices [n_matrices, n_out, n_in] as the kernels take them; Any is a number or a constant.

    table: the codebook. decode: the type's function of triton_decode, or if `wide` of triton_wide, as near ... offset
    are. size, groups: bytes of a block, and its groups of 8 weights.
    """

    data: torch.Tensor
    table: torch.Tensor
    n_out: int
    row_bytes: int
    matrix_bytes: int
    n_in: Any
    decode: Any
    size: Any
    groups: Any
    wide: Any
    near: Any
    far: Any
    alike: Any
    offset: Any


@triton.jit
def _signed(word, i: tl.constexpr):
    """Byte i of a word as a signed number."""
    return ((word << (24 - 8 * i)) >> 24).to(tl.float32)


@triton.jit
def _group(w, row, g):
    """Group g of the rows that begin at `row` -> eight int8 in two words, scale, offset: in the shape of both."""
    return w.decode(row + (g // w.groups) * w.size, g % w.groups, w.table)


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
def _first(w, chunk):
    """The group that a chunk begins with."""
    if w.near == 4:
        return 16 * (chunk // 4) + chunk % 4
    elif w.far == 4:
        return 8 * (chunk // 2) + 2 * (chunk % 2)
    else:
        return 4 * chunk


@triton.jit
def _activations(x, scales, token, w, at, last):
    """A token's part for group or chunk `at` of every row: of each group five as `_tokens` gives them, and the sum of
    those of groups with one scale, which their offset is multiplied by, at the last of them."""
    x += token * (w.n_in // 2)
    scales += token * (w.n_in // 32)
    found = ()
    ones, up, low = at * 0 + 0x01010101, at * 0, at * 0
    for k in tl.static_range(4 if w.wide else 1):
        g = _first(w, at) + (k % 2) * w.near + (k // 2) * w.far if w.wide else at
        a, b, c, d, unit = _tokens(x, scales, g, w.n_in, at < last)
        sum = unit
        if w.offset:
            up, low = _dots(ones, ones, a, b, c, d, up, low)
            if ((w.alike - 1) & k) == w.alike - 1:
                sum = _number(up, low, unit)
                up, low = at * 0, at * 0
        found = found + (a, b, c, d, unit, sum)
    return found


@triton.jit
def _part(w, row, at, last):
    """What a thread decodes of a row: group or chunk `at`."""
    at = tl.minimum(at, last - 1)
    if w.wide:
        per_block = w.groups // 4
        return w.decode(row + (at // per_block) * w.size, at % per_block, w.table)
    else:
        return _group(w, row, at)


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


@triton.jit
def _products(
    w,
    second,
    x,
    scales,
    ids,
    out,
    x_share,
    pairs,
    rows: tl.constexpr,
    tile: tl.constexpr,
    few: tl.constexpr,
    known: tl.constexpr,
    fetch: tl.constexpr,
    overlap: tl.constexpr,
):
    """`rows` outputs of pair program_id(1): matrix ids[pair] (the first without ids) times row pair / x_share of x; 0
    where ids is below 0.

    few (1, or 4 without ids): so many tokens for which a matrix is decoded once, those from program_id(1) * few on.
    second: the bytes of other matrices like w, whose outputs follow: those of program_id(2) = 1. Everything has one
    dimension, a thread for each part of a row: in two Triton gives neighbouring threads neighbouring rows.
    """
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
        if not known:
            tl.extra.cuda.gdc_wait()
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
    if fetch:
        begin = tl.maximum(tl.minimum(row, w.n_out - rows), 0).to(tl.int64)
        _fetch(data + begin * w.row_bytes, tl.minimum(rows, w.n_out) * w.row_bytes, tile, fetch)
    if overlap:
        if known:
            tl.extra.cuda.gdc_wait()
    token = (pair * few // x_share).to(tl.int64)
    totals = ()
    for _ in tl.static_range(rows * few):
        totals = totals + (tl.zeros([tile], tl.float32),)
    for start in range(0, stop, tile):
        at = start + tl.arange(0, tile)
        acts = ()
        for t in tl.static_range(few):
            acts = acts + (_activations(x, scales, tl.minimum(token + t, pairs - 1) if few > 1 else token, w, at, last),)
        sums = ()
        for r in tl.static_range(rows):
            part = _part(w, data + tl.minimum(row + r, w.n_out - 1).to(tl.int64) * w.row_bytes, at, last)
            for t in tl.static_range(few):
                sums = sums + (totals[r * few + t] + _times(part, acts[t], w),)
        totals = sums
    to = out + (pair * few).to(tl.int64) * w.n_out + row
    for r in tl.static_range(rows):
        for t in tl.static_range(few):
            there = row + r < w.n_out
            if few > 1:
                there = there & (token + t < pairs)
            tl.store(to + t * w.n_out + r, tl.sum(totals[r * few + t], axis=0), mask=there)


@triton.jit
def _weights(w, out, groups: tl.constexpr):
    """Dequantize `groups` groups of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * groups + tl.arange(0, groups)
    last: tl.constexpr = w.n_in // 8
    lo, hi, scale, offset = _group(w, w.data + row * w.row_bytes, tl.minimum(g, last - 1))
    even = tl.join(tl.join(_signed(lo, 0), _signed(hi, 0)), tl.join(_signed(lo, 2), _signed(hi, 2)))
    odd = tl.join(tl.join(_signed(lo, 1), _signed(hi, 1)), tl.join(_signed(lo, 3), _signed(hi, 3)))
    v = tl.reshape(tl.join(even, odd), (groups, 8))  # from [half, pair, parity]
    v = (v * scale[:, None] + offset[:, None]).to(out.dtype.element_ty)
    here = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + row * w.n_in + here, v, mask=here < w.n_in)


class Routing(NamedTuple):
    """Constants of _route. best: how many experts speak for their group. size, groups, slots: experts of a group,
    groups and chosen experts, each padded to a power of two."""

    n_group: Any
    n_group_used: Any
    n_used: Any
    best: Any
    sigmoid: Any
    norm: Any
    size: Any
    groups: Any
    slots: Any


@triton.jit
def _route(logits, bias, ids, weights, table, frames, n_expert, factor, how, overlap: tl.constexpr):
    """One token's experts, as layers.route: groups of experts, both padded. table (or None): as `route`."""
    follow(overlap)
    token = tl.program_id(0)
    a, b = tl.arange(0, how.groups)[:, None], tl.arange(0, how.size)[None, :]
    per_group = n_expert // how.n_group
    real = (a < how.n_group) & (b < per_group)
    index = a * per_group + b
    x = tl.load(logits + token * n_expert + index, mask=real, other=float("-inf"))
    if how.sigmoid:
        score = 1 / (1 + tl.exp(-x))
    else:
        top = tl.max(tl.max(x, axis=1), axis=0)
        score = tl.exp(x - top)
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    choice = score
    if bias is not None:
        choice += tl.load(bias + index, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if how.n_group > 1:
        first = tl.max(choice, axis=1)
        value = first
        if how.best == 2:
            at = tl.argmax(choice, axis=1)
            value += tl.max(tl.where(b == at[:, None], float("-inf"), choice), axis=1)
        group = tl.arange(0, how.groups)
        value = tl.where(group < how.n_group, value, float("-inf"))
        kept = group < 0
        for _ in tl.static_range(how.n_group_used):
            at = tl.argmax(value, axis=0)
            kept = kept | (group == at)
            value = tl.where(group == at, float("-inf"), value)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    slot = tl.arange(0, how.slots)
    expert = tl.zeros([how.slots], tl.int32)
    weight = tl.zeros([how.slots], tl.float32)
    for k in tl.static_range(how.n_used):
        at_group = tl.argmax(tl.max(choice, axis=1), axis=0)
        inner = tl.max(tl.where(a == at_group, choice, float("-inf")), axis=0)
        at = at_group * per_group + tl.argmax(inner, axis=0)
        chosen = (index == at) & real
        w = tl.sum(tl.sum(tl.where(chosen, score, 0.0), axis=1), axis=0)
        choice = tl.where(chosen, float("-inf"), choice)
        expert = tl.where(slot == k, at, expert)
        weight = tl.where(slot == k, w, weight)
    if how.norm:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    if table is not None:
        found = tl.load(table + expert)
        tl.store(frames + token * how.n_used + slot, found, mask=slot < how.n_used)
        expert = tl.where(found < 0, expert, -1 - expert)
    tl.store(ids + token * how.n_used + slot, expert, mask=slot < how.n_used)
    tl.store(weights + token * how.n_used + slot, weight * factor, mask=slot < how.n_used)


def _matrices(qtype: str, data: torch.Tensor, n_in: int, chunks: bool = False) -> Matrices:
    """chunks: of 32 weights, where there is a function for that."""
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
        *map(tl.constexpr, of_chunks),
    )


def _tile(n_in: int) -> int:
    """Groups per step."""
    exact = (size for size in (GROUPS, GROUPS // 2) if n_in // 8 % size == 0)
    return next(exact, min(GROUPS, triton.next_power_of_2(n_in // 8)))


def tiling(n_out: int, n_in: int) -> tuple[int, int]:
    """Rows of a program and its warps."""
    if not NARROW:
        return (8 if n_out >= 4096 else 2), 1
    return (8, 1) if n_out >= 8192 else (4, 4)


def products(
    qtype: str,
    data: torch.Tensor,
    x: Activations,
    ids: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
    known: bool = False,
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
    rows, warps = FORCED.get((qtype, n_out, n_in)) or tiling(n_out * (pairs // n), n_in)
    few = 4 if ids is None and n > 2 else 1
    _products[(triton.cdiv(n_out, rows), triton.cdiv(pairs, few), len(out))](
        _matrices(qtype, data, n_in, chunks=n_in >= 32 * LANES),
        second,
        x.words,
        x.scales,
        ids,
        out,
        pairs // n,
        pairs,
        rows,
        LANES * warps,
        few,
        ids is None or known,
        FETCH if data.is_cuda and torch.cuda.get_device_capability(data.device) >= (9, 0) else 0,
        num_warps=warps,
        enable_fp_fusion=False,  # or a token's last bits would depend on how many there are
        **launching(data.device),
    )
    return out[0] if second is None else out


@triton.jit
def _scores(x, weights, out, d, n_expert, width: tl.constexpr, overlap: tl.constexpr):
    """Row program_id(0) of weights [n_expert, d] times token program_id(1), float32."""
    expert, token = tl.program_id(0), tl.program_id(1)
    column = tl.arange(0, width)
    if overlap:
        tl.extra.cuda.gdc_launch_dependents()
    w = tl.load(weights + expert * d + column, mask=column < d, other=0.0)
    if overlap:
        tl.extra.cuda.gdc_wait()
    v = tl.load(x + token.to(tl.int64) * d + column, mask=column < d, other=0.0)
    tl.store(out + token * n_expert + expert, tl.sum(w * v, axis=0))


ROUTED = 8  # tokens up to which a program a score is faster than a product of matrices


def scores(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """x float32 [n, d] times weights float32 [n_expert, d] -> [n, n_expert]."""
    (n, d), n_expert = x.shape, len(weights)
    if n > ROUTED or not NARROW:
        return x @ weights.T
    out = torch.empty(n, n_expert, device=x.device)
    _scores[(n_expert, n)](
        x, weights, out, d, n_expert, triton.next_power_of_2(d), num_warps=8, **launching(x.device)
    )
    return out


def dequantize(qtype: str, data: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] -> out [rows, n_in], contiguous, in its dtype."""
    n_rows, n_in = out.shape
    groups = _tile(n_in)
    _weights[(n_rows, triton.cdiv(n_in // 8, groups))](_matrices(qtype, data, n_in), out, groups, num_warps=WARPS)
    return out


def route(
    logits: torch.Tensor, bias: torch.Tensor | None, table: torch.Tensor | None, c: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """As `Between.route`, from logits float32 [n, n_expert]."""
    n = len(logits)
    ids = torch.empty(n, c.n_used, dtype=torch.int32, device=logits.device)
    weights = torch.empty(n, c.n_used, dtype=torch.float32, device=logits.device)
    frames = None if table is None else torch.empty_like(ids)
    powers = [triton.next_power_of_2(size) for size in (c.n_expert // c.n_group, c.n_group, c.n_used)]
    numbers = (c.n_group, c.n_group_used, c.n_used, 2 if c.group_score == "top2" else 1)
    how = Routing(*map(tl.constexpr, (*numbers, c.scoring == "sigmoid", c.norm_weights, *powers)))
    _route[(n,)](logits, bias, ids, weights, table, frames, c.n_expert, c.weights_scale, how, num_warps=1, **launching(logits.device))
    return ids, weights, frames
