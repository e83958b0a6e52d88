"""Triton: products with quantized matrices, decoded in registers, and what decoding needs besides.

All types are taken apart into groups of 8 neighbouring weights, `scale · v + offset` with the eight int8 in two words;
`blocks.py` holds the plain twins. Blocks are read as they lie in the file, so only 2-byte alignment is certain.
"""

import gguf
import torch
import triton
import triton.language as tl

from quantkit.codecs.blocks import grid
from quantkit.models.config import ModelConfig

WARPS = 4
GROUPS = 128  # groups of 8 columns per step of a program: one per thread


@triton.jit
def _byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _u16(p):
    return tl.load(p.to(tl.pointer_type(tl.uint16))).to(tl.int32)


@triton.jit
def _u32(p):
    return _u16(p) | (_u16(p + 2) << 16)


@triton.jit
def _word(p):
    """Four bytes of a type whose blocks are a multiple of that."""
    return tl.load(p.to(tl.pointer_type(tl.int32)))


@triton.jit
def _f16(p):
    return tl.load(p.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _upper(word, shift: tl.constexpr):
    """Logical shift of an int32 to the right."""
    return (word.to(tl.uint32, bitcast=True) >> shift).to(tl.int32, bitcast=True)


@triton.jit
def _flip(word, signs):
    """Negate the bytes (none is 0) of a word whose sign bits, the lowest four, are set."""
    spread = ((signs & 15) * 0x00204081) & 0x01010101
    return (word ^ (spread * 255)) + spread


@triton.jit
def _even(signs):
    """Seven sign bits and an eighth that makes their number even."""
    parity = signs ^ (signs >> 4)
    parity = parity ^ (parity >> 2)
    return signs | (((parity ^ (parity >> 1)) & 1) << 7)


@triton.jit
def _levels(word, shift, table):
    """Four nibbles of a word through a table of 16 int8."""
    out = word * 0
    for i in tl.static_range(4):
        v = tl.load(table + ((word >> (shift + 8 * i)) & 15)).to(tl.int32)
        out = out | ((v & 255) << (8 * i))
    return out


@triton.jit
def _scale_min(p, s):
    """Scale and min s of the 12 bytes in Q4_K and Q5_K."""
    first = _byte(p + (s & 3))
    second = _byte(p + 4 + (s & 3))
    rest = _byte(p + 8 + (s & 3))
    low = s < 4
    scale = tl.where(low, first & 63, (rest & 15) | ((first >> 6) << 4))
    return scale.to(tl.float32), tl.where(low, second & 63, (rest >> 4) | ((second >> 6) << 4)).to(tl.float32)


@triton.jit
def _unpack(row, g, table, qtype: tl.constexpr, size: tl.constexpr, per_block: tl.constexpr):
    """Group g of the rows that begin at `row` -> eight int8 in two words, scale, offset: in the shape of both."""
    p = row + (g // per_block) * size
    j = g % per_block
    words = table.to(tl.pointer_type(tl.int32))
    offset = tl.zeros_like(p.to(tl.int64)).to(tl.float32)
    if qtype == "IQ1_S":
        high = _u16(p + 34 + 2 * (j // 4))
        entry = _byte(p + 2 + j) | (((high >> (3 * (j % 4))) & 7) << 8)
        scale = _f16(p) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
        offset = scale * tl.where((high & 0x8000) != 0, -0.125, 0.125)
        lo, hi = tl.load(words + 2 * entry), tl.load(words + 2 * entry + 1)
    elif qtype == "IQ1_M":
        s0, s1, s2, s3 = _u16(p + 48), _u16(p + 50), _u16(p + 52), _u16(p + 54)
        bits = (s0 >> 12) | ((s1 >> 8) & 0xF0) | ((s2 >> 4) & 0xF00) | (s3 & 0xF000)
        d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = _byte(p + 32 + j // 2) >> (4 * (j % 2))
        entry = _byte(p + j) | ((high & 7) << 8)
        code = (_u16(p + 48 + 2 * (j // 8)) >> (3 * ((j // 2) % 4))) & 7
        scale = d * (2 * code + 1).to(tl.float32)
        offset = scale * tl.where((high & 8) != 0, -0.125, 0.125)
        lo, hi = tl.load(words + 2 * entry), tl.load(words + 2 * entry + 1)
    elif qtype == "IQ2_XXS":
        entry = _byte(p + 2 + 8 * (j // 4) + j % 4)
        word = _u32(p + 6 + 8 * (j // 4))
        signs = _even((word >> (7 * (j % 4))) & 127)
        scale = _f16(p) * (0.5 + _upper(word, 28).to(tl.float32)) * 0.25
        lo = _flip(tl.load(words + 2 * entry), signs)
        hi = _flip(tl.load(words + 2 * entry + 1), signs >> 4)
    elif qtype == "IQ2_XS":
        word = _u16(p + 2 + 2 * j)
        code = (_byte(p + 66 + j // 4) >> (4 * ((j // 2) % 2))) & 15
        signs, entry = _even(word >> 9), word & 511
        scale = _f16(p) * (0.5 + code.to(tl.float32)) * 0.25
        lo = _flip(tl.load(words + 2 * entry), signs)
        hi = _flip(tl.load(words + 2 * entry + 1), signs >> 4)
    elif qtype == "IQ2_S":
        entry = _byte(p + 2 + j) | (((_byte(p + 66 + j // 4) >> (2 * (j % 4))) & 3) << 8)
        code = (_byte(p + 74 + j // 4) >> (4 * ((j // 2) % 2))) & 15
        signs = _byte(p + 34 + j)
        scale = _f16(p) * (0.5 + code.to(tl.float32)) * 0.25
        lo = _flip(tl.load(words + 2 * entry), signs)
        hi = _flip(tl.load(words + 2 * entry + 1), signs >> 4)
    elif qtype == "IQ3_XXS":
        word = _u32(p + 66 + 4 * (j // 4))
        signs = _even((word >> (7 * (j % 4))) & 127)
        scale = _f16(p) * (0.5 + _upper(word, 28).to(tl.float32)) * 0.5
        lo = _flip(tl.load(words + _byte(p + 2 + 2 * j)), signs)
        hi = _flip(tl.load(words + _byte(p + 3 + 2 * j)), signs >> 4)
    elif qtype == "IQ3_S":
        high = _byte(p + 66 + j // 4) >> (2 * (j % 4))
        code = (_byte(p + 106 + j // 8) >> (4 * ((j // 4) % 2))) & 15
        signs = _byte(p + 74 + j)
        scale = _f16(p) * (1 + 2 * code).to(tl.float32)
        lo = _flip(tl.load(words + (_byte(p + 2 + 2 * j) | ((high & 1) << 8))), signs)
        hi = _flip(tl.load(words + (_byte(p + 3 + 2 * j) | ((high & 2) << 7))), signs >> 4)
    elif qtype == "Q2_K":
        code, shift = _byte(p + j // 2), 2 * ((j % 16) // 4)
        at = p + 16 + 32 * (j // 16) + 8 * (j % 4)
        lo, hi = (_word(at) >> shift) & 0x03030303, (_word(at + 4) >> shift) & 0x03030303
        scale = _f16(p + 80) * (code & 15).to(tl.float32)
        offset = -_f16(p + 82) * (code >> 4).to(tl.float32)
    elif qtype == "Q3_K":
        shift, bit, k = 2 * ((j % 16) // 4), j // 4, j // 2
        at, top = p + 32 + 32 * (j // 16) + 8 * (j % 4), p + 8 * (j % 4)
        lo = ((_u32(at) >> shift) & 0x03030303) | (((_u32(top) >> bit) & 0x01010101) << 2)
        hi = ((_u32(at + 4) >> shift) & 0x03030303) | (((_u32(top + 4) >> bit) & 0x01010101) << 2)
        code = (_byte(p + 96 + k % 8) >> (4 * (k // 8))) & 15
        code = code | (((_byte(p + 104 + k % 4) >> (2 * (k // 4))) & 3) << 4)
        scale = _f16(p + 108) * (code - 32).to(tl.float32)
        offset = -4 * scale
    elif qtype == "Q4_K":
        shift = 4 * ((j // 4) % 2)
        at = p + 16 + 32 * (j // 8) + 8 * (j % 4)
        lo, hi = (_word(at) >> shift) & 0x0F0F0F0F, (_word(at + 4) >> shift) & 0x0F0F0F0F
        code, low = _scale_min(p + 4, j // 4)
        scale, offset = _f16(p) * code, -_f16(p + 2) * low
    elif qtype == "Q5_K":
        shift, bit = 4 * ((j // 4) % 2), j // 4
        at, top = p + 48 + 32 * (j // 8) + 8 * (j % 4), p + 16 + 8 * (j % 4)
        lo = ((_word(at) >> shift) & 0x0F0F0F0F) | (((_word(top) >> bit) & 0x01010101) << 4)
        hi = ((_word(at + 4) >> shift) & 0x0F0F0F0F) | (((_word(top + 4) >> bit) & 0x01010101) << 4)
        code, low = _scale_min(p + 4, j // 4)
        scale, offset = _f16(p) * code, -_f16(p + 2) * low
    elif qtype == "Q6_K":
        q = (j % 16) // 4
        at, top = p + 64 * (j // 16) + 32 * (q % 2) + 8 * (j % 4), p + 128 + 32 * (j // 16) + 8 * (j % 4)
        shift, bit = 4 * (q // 2), 2 * q
        lo = ((_u32(at) >> shift) & 0x0F0F0F0F) | (((_u32(top) >> bit) & 0x03030303) << 4)
        hi = ((_u32(at + 4) >> shift) & 0x0F0F0F0F) | (((_u32(top + 4) >> bit) & 0x03030303) << 4)
        scale = _f16(p + 208) * _byte(p + 192 + j // 2).to(tl.int8).to(tl.float32)
        offset = -32 * scale
    elif qtype == "Q8_0":
        lo, hi, scale = _u32(p + 2 + 8 * j), _u32(p + 6 + 8 * j), _f16(p)
    elif qtype == "Q4_0":
        at, shift = p + 2 + 8 * (j % 2), 4 * (j // 2)
        lo, hi, scale = (_u32(at) >> shift) & 0x0F0F0F0F, (_u32(at + 4) >> shift) & 0x0F0F0F0F, _f16(p)
        offset = -8 * scale
    elif qtype == "IQ4_NL":
        at, shift = p + 2 + 8 * (j % 2), 4 * (j // 2)
        lo, hi, scale = _levels(_u32(at), shift, table), _levels(_u32(at + 4), shift, table), _f16(p)
    else:
        tl.static_assert(qtype == "IQ4_XS")
        at, shift, s = p + 8 + 16 * (j // 4) + 8 * (j % 2), 4 * ((j // 2) % 2), j // 4
        lo, hi = _levels(_word(at), shift, table), _levels(_word(at + 4), shift, table)
        code = (_byte(p + 4 + s // 2) >> (4 * (s % 2))) & 15
        code = code | (((_u16(p + 2) >> (2 * s)) & 3) << 4)
        scale = _f16(p) * (code - 32).to(tl.float32)
    return lo, hi, scale, offset


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


def route(logits: torch.Tensor, bias: torch.Tensor | None, c: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
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
