"""Triton: products with quantized matrices, decoded in registers, and what decoding needs besides.

All types are taken apart into groups of 8 neighbouring weights, `scale · v + offset` with the eight int8 in two words;
`blocks.py` holds the plain twins. Blocks are read as they lie in the file, so only 2-byte alignment is certain.
"""

import gguf
import torch
import triton
import triton.language as tl

from quantkit.codecs.blocks import grid
from quantkit.models.config import DeepseekConfig

WARPS = 4
GROUPS = 128  # groups of 8 columns per step of a program: one per thread


@triton.jit
def _signed(word, i: tl.constexpr):
    """Byte i of a word as a signed number."""
    return ((word << (24 - 8 * i)) >> 24).to(tl.float32)


@triton.jit
def _products(
    data,
    x,
    ids,
    out,
    table,
    n_out,
    row_bytes,
    matrix_bytes,
    x_share,
    n_in: tl.constexpr,
    qtype: tl.constexpr,
    size: tl.constexpr,
    per_block: tl.constexpr,
    chosen: tl.constexpr,
    rows: tl.constexpr,
    groups: tl.constexpr,
):
    """`rows` outputs of pair program_id(1): matrix ids[pair] (the first without ids) times row pair / x_share of x."""
    pair = tl.program_id(1)
    row = tl.program_id(0) * rows + tl.arange(0, rows)
    data += tl.minimum(row, n_out - 1).to(tl.int64)[None, :] * row_bytes
    if chosen:
        data += tl.load(ids + pair).to(tl.int64) * matrix_bytes
    x += (pair // x_share).to(tl.int64) * n_in
    last: tl.constexpr = n_in // 8
    # Groups come first: then Triton gives each thread one group of all rows, and x needs no exchange between threads.
    total = tl.zeros([groups, rows], tl.float32)
    for start in range(0, last, groups):
        g = start + tl.arange(0, groups)
        inside = g < last
        lo, hi, scale, offset = _unpack(data, tl.minimum(g, last - 1)[:, None], table, qtype, size, per_block)
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
    tl.store(out + pair.to(tl.int64) * n_out + row, tl.sum(total, axis=0), mask=row < n_out)


@triton.jit
def _weights(
    data,
    out,
    table,
    row_bytes,
    n_in: tl.constexpr,
    qtype: tl.constexpr,
    size: tl.constexpr,
    per_block: tl.constexpr,
    groups: tl.constexpr,
):
    """Dequantize `groups` groups of row program_id(0)."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * groups + tl.arange(0, groups)
    last: tl.constexpr = n_in // 8
    lo, hi, scale, offset = _unpack(data + row * row_bytes, tl.minimum(g, last - 1), table, qtype, size, per_block)
    even = tl.join(tl.join(_signed(lo, 0), _signed(hi, 0)), tl.join(_signed(lo, 2), _signed(hi, 2)))
    odd = tl.join(tl.join(_signed(lo, 1), _signed(hi, 1)), tl.join(_signed(lo, 3), _signed(hi, 3)))
    v = tl.reshape(tl.join(even, odd), (groups, 8))  # from [half, pair, parity]
    v = (v * scale[:, None] + offset[:, None]).to(out.dtype.element_ty)
    here = g[:, None] * 8 + tl.arange(0, 8)[None, :]
    tl.store(out + row * n_in + here, v, mask=here < n_in)


@triton.jit
def _route(
    logits,
    bias,
    ids,
    weights,
    n_expert,
    factor,
    n_group: tl.constexpr,
    n_group_used: tl.constexpr,
    n_used: tl.constexpr,
    best: tl.constexpr,
    sigmoid: tl.constexpr,
    norm: tl.constexpr,
    has_bias: tl.constexpr,
    size: tl.constexpr,
    groups: tl.constexpr,
    slots: tl.constexpr,
):
    """One token's experts, as layers.route: groups (padded to `groups`) of `size` (padded) experts."""
    token = tl.program_id(0)
    a, b = tl.arange(0, groups)[:, None], tl.arange(0, size)[None, :]
    per_group = n_expert // n_group
    real = (a < n_group) & (b < per_group)
    index = a * per_group + b
    x = tl.load(logits + token * n_expert + index, mask=real, other=float("-inf"))
    if sigmoid:
        score = 1 / (1 + tl.exp(-x))
    else:
        top = tl.max(tl.max(x, axis=1), axis=0)
        score = tl.exp(x - top)
        score = score / tl.sum(tl.sum(score, axis=1), axis=0)
    choice = score
    if has_bias:
        choice += tl.load(bias + index, mask=real, other=0.0)
    choice = tl.where(real, choice, float("-inf"))
    if n_group > 1:
        first = tl.max(choice, axis=1)
        value = first
        if best == 2:
            at = tl.argmax(choice, axis=1)
            value += tl.max(tl.where(b == at[:, None], float("-inf"), choice), axis=1)
        group = tl.arange(0, groups)
        value = tl.where(group < n_group, value, float("-inf"))
        kept = group < 0
        for _ in tl.static_range(n_group_used):
            at = tl.argmax(value, axis=0)
            kept = kept | (group == at)
            value = tl.where(group == at, float("-inf"), value)
        choice = tl.where(kept[:, None], choice, float("-inf"))
    slot = tl.arange(0, slots)
    expert = tl.zeros([slots], tl.int32)
    weight = tl.zeros([slots], tl.float32)
    for k in tl.static_range(n_used):
        at_group = tl.argmax(tl.max(choice, axis=1), axis=0)
        inner = tl.max(tl.where(a == at_group, choice, float("-inf")), axis=0)
        at = at_group * per_group + tl.argmax(inner, axis=0)
        chosen = (index == at) & real
        w = tl.sum(tl.sum(tl.where(chosen, score, 0.0), axis=1), axis=0)
        choice = tl.where(chosen, float("-inf"), choice)
        expert = tl.where(slot == k, at, expert)
        weight = tl.where(slot == k, w, weight)
    if norm:
        weight = weight / (tl.sum(weight, axis=0) + 1e-20)
    tl.store(ids + token * n_used + slot, expert, mask=slot < n_used)
    tl.store(weights + token * n_used + slot, weight * factor, mask=slot < n_used)


def _shape(qtype: str) -> tuple[int, int]:
    """(bytes of a block, groups of 8 in it)."""
    weights, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]]
    return size, weights // 8


def _tile(n_in: int) -> int:
    """Groups per step."""
    exact = (size for size in (GROUPS, GROUPS // 2) if n_in // 8 % size == 0)
    return next(exact, min(GROUPS, triton.next_power_of_2(n_in // 8)))


def products(qtype: str, data: torch.Tensor, x: torch.Tensor, ids: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [pairs, n_out]: of pair p, matrix ids[p] (without ids: the only one) times its row of x.

    data: uint8 [n_matrices, n_out, row_bytes]. x: float32 [n, n_in]; pairs is a multiple of n, and neighbouring pairs
    share a row. ids: int32 [pairs]. Every pair is computed alone, so its bits do not depend on the others.
    """
    (n, n_in), (_, n_out, row_bytes) = x.shape, data.shape
    pairs = n if ids is None else ids.numel()
    out = torch.empty(pairs, n_out, dtype=torch.float32, device=x.device)
    groups = _tile(n_in)
    rows = max(1, min(8 if n_out * pairs >= 8 * 512 else 4, 1024 // groups))
    _products[(triton.cdiv(n_out, rows), pairs)](
        data,
        x.contiguous(),
        ids,
        out,
        grid(qtype, data.device),
        n_out,
        row_bytes,
        n_out * row_bytes,
        pairs // n,
        n_in,
        qtype,
        *_shape(qtype),
        ids is not None,
        rows,
        groups,
        num_warps=WARPS,
    )
    return out


def dequantize(qtype: str, data: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, row_bytes] -> out [rows, n_in], contiguous, in its dtype."""
    n_rows, n_in = out.shape
    groups = _tile(n_in)
    _weights[(n_rows, triton.cdiv(n_in // 8, groups))](
        data, out, grid(qtype, data.device), data.shape[-1], n_in, qtype, *_shape(qtype), groups, num_warps=WARPS
    )
    return out


def route(logits: torch.Tensor, bias: torch.Tensor | None, c: DeepseekConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """As layers.route from its logits float32 [n, n_expert]; the experts as int32."""
    n = len(logits)
    ids = torch.empty(n, c.n_used, dtype=torch.int32, device=logits.device)
    weights = torch.empty(n, c.n_used, dtype=torch.float32, device=logits.device)
    powers = [triton.next_power_of_2(size) for size in (c.n_expert // c.n_group, c.n_group, c.n_used)]
    _route[(n,)](
        logits,
        bias,
        ids,
        weights,
        c.n_expert,
        c.weights_scale,
        c.n_group,
        c.n_group_used,
        c.n_used,
        2 if c.group_score == "top2" else 1,
        c.scoring == "sigmoid",
        c.norm_weights,
        bias is not None,
        *powers,
        num_warps=1,
    )
    return ids, weights
