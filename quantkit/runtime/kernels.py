"""Triton: products with quantized matrices, decoded in registers, and what decoding needs besides.

All types are taken apart into groups of 8 neighbouring weights, `scale · v + offset` with the eight int8 in two words,
by the functions of `codecs/triton_decode.py`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.codecs import types as qtypes
from quantkit.codecs.codebooks import on_device
from quantkit.codecs.registry import codec, triton_twin
from quantkit.models.config import ModelConfig

WARPS = 4
GROUPS = 128  # groups of 8 columns per step of a program: one per thread


class Matrices(NamedTuple):
    """Quantized matrices [n_matrices, n_out, n_in] as the kernels take them; Any is a number or a constant.

    table: the codebook's bytes. decode: the type's function of triton_decode. size, groups: bytes of a block, and its
    groups of 8 weights.
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


@triton.jit
def _signed(word, i: tl.constexpr):
    """Byte i of a word as a signed number."""
    return ((word << (24 - 8 * i)) >> 24).to(tl.float32)


@triton.jit
def _group(w, row, g):
    """Group g of the rows that begin at `row` -> eight int8 in two words, scale, offset: in the shape of both."""
    return w.decode(row + (g // w.groups) * w.size, g % w.groups, w.table)


@triton.jit
def _products(w, x, ids, out, x_share, rows: tl.constexpr, groups: tl.constexpr):
    """`rows` outputs of pair program_id(1): matrix ids[pair] (the first without ids) times row pair / x_share of x."""
    pair = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    data = w.data + tl.minimum(row, w.n_out - 1).to(tl.int64)[None, :] * w.row_bytes
    if ids is not None:
        data += tl.load(ids + pair).to(tl.int64) * w.matrix_bytes
    x += (pair // x_share).to(tl.int64) * w.n_in
    last: tl.constexpr = w.n_in // 8
    # Groups come first: then Triton gives each thread one group of all rows, and x needs no exchange between threads.
    total = tl.zeros([groups, rows], tl.float32)
    for start in range(0, last, groups):
        g = start + tl.arange(0, groups)
        inside = g < last
        lo, hi, scale, offset = _group(w, data, tl.minimum(g, last - 1)[:, None])
        part = tl.zeros([groups, rows], tl.float32)
        sums = tl.zeros([groups], tl.float32)
        for i in tl.static_range(4):
            v = tl.load(x + 8 * g + i, mask=inside, other=0.0)
            part += _signed(lo, i) * v[:, None]
            sums += v
        for i in tl.static_range(4):
            v = tl.load(x + 8 * g + 4 + i, mask=inside, other=0.0)
            part += _signed(hi, i) * v[:, None]
            sums += v
        total += scale * part + offset * sums[:, None]
    tl.store(out + pair.to(tl.int64) * w.n_out + row, tl.sum(total, axis=0), mask=row < w.n_out)


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
def _route(logits, bias, ids, weights, n_expert, factor, how):
    """One token's experts, as layers.route: groups of experts, both padded."""
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
    tl.store(ids + token * how.n_used + slot, expert, mask=slot < how.n_used)
    tl.store(weights + token * how.n_used + slot, weight * factor, mask=slot < how.n_used)


def _matrices(qtype: str, data: torch.Tensor, n_in: int) -> Matrices:
    n_out, row_bytes = data.shape[-2:]
    sizes = qtypes.stored(qtype)
    return Matrices(
        data,
        on_device(codec(qtype).codebook, data.device),
        n_out,
        row_bytes,
        n_out * row_bytes,
        tl.constexpr(n_in),
        triton_twin(qtype),
        tl.constexpr(sizes.type_size),
        tl.constexpr(sizes.block_size // 8),
    )


def _tile(n_in: int) -> int:
    """Groups per step."""
    exact = (size for size in (GROUPS, GROUPS // 2) if n_in // 8 % size == 0)
    return next(exact, min(GROUPS, triton.next_power_of_2(n_in // 8)))


def products(qtype: str, data: torch.Tensor, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [pairs, n_out]: of pair p, matrix ids[p] (without ids: the only one) times its row of x.

    data: uint8 [n_matrices, n_out, row_bytes]. x: float32 [n, n_in]; pairs is a multiple of n, and neighbouring pairs
    share a row. ids: int32 [pairs]. Every pair is computed alone, so its bits do not depend on the others.
    """
    (n, n_in), n_out = x.shape, data.shape[1]
    pairs = n if ids is None else ids.numel()
    out = torch.empty(pairs, n_out, dtype=torch.float32, device=x.device)
    groups = _tile(n_in)
    rows = max(1, min(8 if n_out * pairs >= 8 * 512 else 4, 1024 // groups))
    _products[(triton.cdiv(n_out, rows), pairs)](
        _matrices(qtype, data, n_in),
        x.contiguous(),
        ids,
        out,
        pairs // n,
        rows,
        groups,
        num_warps=WARPS,
    )
    return out


def dequantize(qtype: str, data: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] -> out [rows, n_in], contiguous, in its dtype."""
    n_rows, n_in = out.shape
    groups = _tile(n_in)
    _weights[(n_rows, triton.cdiv(n_in // 8, groups))](_matrices(qtype, data, n_in), out, groups, num_warps=WARPS)
    return out


def route(logits: torch.Tensor, bias: torch.Tensor | None, c: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As layers.route from its logits float32 [n, n_expert]; the experts as int32."""
    n = len(logits)
    ids = torch.empty(n, c.n_used, dtype=torch.int32, device=logits.device)
    weights = torch.empty(n, c.n_used, dtype=torch.float32, device=logits.device)
    powers = [triton.next_power_of_2(size) for size in (c.n_expert // c.n_group, c.n_group, c.n_used)]
    numbers = (c.n_group, c.n_group_used, c.n_used, 2 if c.group_score == "top2" else 1)
    how = Routing(*map(tl.constexpr, (*numbers, c.scoring == "sigmoid", c.norm_weights, *powers)))
    _route[(n,)](logits, bias, ids, weights, c.n_expert, c.weights_scale, how, num_warps=1)
    return ids, weights
