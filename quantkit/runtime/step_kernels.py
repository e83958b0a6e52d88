"""Triton: what a decoding step does between its products, few kernels a layer; the twins of `engines.step.ByTorch`.

Attention over the compressed cache is split along the cache (flash decoding, Dao et al. 2023) and reads only the
positions that are there. Its operands are pairs of bfloat16 where float32 counts, so that the scores are.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import Activations, Where
from quantkit.runtime.launches import jit_kernel

HEADS = 16  # a program of attention: the least that the tensor cores take
POSITIONS = 32  # of the cache, in a step of such a program
OPERAND = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)  # the interpreter has no other
SPLITS = 64  # programs along the cache at most


class Words(NamedTuple):
    """Where `Activations` are written: x (or None), words, scales."""

    x: Any
    words: Any
    scales: Any


@triton.jit
def _write(to, v, row, begin, n, inside, blocks: tl.constexpr):
    """32 · blocks columns of a row, float32, from column `begin` on: as they are and as integers. n: columns of a row,
    inside: which there are."""
    column = tl.arange(0, 32 * blocks)
    if to.x is not None:
        tl.store(to.x + row * n + begin + column, v, mask=inside)
    v = tl.reshape(tl.where(inside, v, 0.0), (blocks, 32))
    largest = tl.max(tl.abs(v), axis=1)
    q = tl.floor(v * (32767 / tl.maximum(largest, 1e-30))[:, None] + 0.5).to(tl.int32)
    place = (8 * (tl.arange(0, 32) % 4))[None, :]
    upper = tl.sum(tl.reshape(((q >> 8) & 255) << place, (blocks, 8, 4)), axis=2)
    lower = tl.sum(tl.reshape((q & 255) << place, (blocks, 8, 4)), axis=2)
    block, word = tl.arange(0, blocks)[:, None], tl.arange(0, 8)[None, :]
    plane = n // 8
    there = to.words + row * (n // 2) + begin // 8 + 4 * block + word // 2 + plane * (word % 2)
    real = tl.max(tl.reshape(inside.to(tl.int32), (blocks, 32)), axis=1) > 0
    tl.store(there, upper, mask=real[:, None])
    tl.store(there + 2 * plane, lower, mask=real[:, None])
    tl.store(to.scales + (row * n + begin) // 32 + tl.arange(0, blocks), largest / 32767, mask=real)


@jit_kernel
def _gated(gate, up, to, n, blocks: tl.constexpr):
    """silu(gate) · up, or without up the first alone, of row program_id(0) from column block program_id(1) on."""
    row, begin = tl.program_id(0).to(tl.int64), tl.program_id(1) * 32 * blocks
    at, column = row * n, begin + tl.arange(0, 32 * blocks)
    inside = column < n
    v = tl.load(gate + at + column, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        v = v / (1 + tl.exp(-v)) * tl.load(up + at + column, mask=inside, other=0.0)
    _write(to, v, row, begin, n, inside, blocks)


@jit_kernel
def _norm(h, first, second, chosen, shares, n_used: tl.constexpr, weight, sum, to, n, eps, blocks: tl.constexpr):
    """h + first + second + Σ shares · chosen of row program_id(0) (each may be None) -> sum, and its RMS norm."""
    row = tl.program_id(0).to(tl.int64)
    at = row * n
    column = tl.arange(0, 32 * blocks)
    inside = column < n
    v = tl.load(h + at + column, mask=inside, other=0.0)
    if first is not None:
        v += tl.load(first + at + column, mask=inside, other=0.0)
    if second is not None:
        v += tl.load(second + at + column, mask=inside, other=0.0)
    if chosen is not None:
        for k in tl.static_range(n_used):
            y = tl.load(chosen + (row * n_used + k) * n + column, mask=inside, other=0.0)
            v += y * tl.load(shares + row * n_used + k)
    if sum is not None:
        tl.store(sum + at + column, v, mask=inside)
    v = v * tl.rsqrt(tl.sum(v * v, axis=0) / n + eps) * tl.load(weight + column, mask=inside, other=0.0)
    _write(to, v, row, 0, n, inside, blocks)


class Shape(NamedTuple):
    """Of attention, as constants; the last two padded to 32 times a power of two, in blocks of 32."""

    n_head: Any
    kv_lora: Any
    nope: Any
    rope: Any
    half: Any  # of rope, padded to a power of two
    nope_blocks: Any
    lora_blocks: Any


@jit_kernel
def _place(q, kv, kv_norm, turned, positions, cells, cache, rotated, to, eps, shape):
    """Of token program_id(0), head program_id(1): its query's two parts, the second rotated [n, n_head, rope]. The
    program after the last head: the cache's cell, normed latent and rotated key."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pair = tl.arange(0, shape.half)
    real = pair < shape.rope // 2
    turned += tl.load(positions + token) * shape.rope + 2 * pair
    cos, sin = tl.load(turned, mask=real, other=0.0), tl.load(turned + 1, mask=real, other=0.0)
    if head < shape.n_head:
        of = (token * shape.n_head + head).to(tl.int64)
        query = q + of * (shape.nope + shape.rope)
        column = tl.arange(0, 32 * shape.nope_blocks)
        inside = column < shape.nope
        plain = tl.load(query + column, mask=inside, other=0.0)
        _write(to, plain, of, 0, shape.nope, inside, shape.nope_blocks)
        even = tl.load(query + shape.nope + 2 * pair, mask=real, other=0.0)
        odd = tl.load(query + shape.nope + 2 * pair + 1, mask=real, other=0.0)
        turned_query = rotated + of * shape.rope + 2 * pair
        tl.store(turned_query, even * cos - odd * sin, mask=real)
        tl.store(turned_query + 1, even * sin + odd * cos, mask=real)
    else:
        new = kv + token * (shape.kv_lora + shape.rope)
        cell = cache + tl.load(cells + token) * (shape.kv_lora + shape.rope)
        latent = tl.arange(0, 32 * shape.lora_blocks)
        real_latent = latent < shape.kv_lora
        v = tl.load(new + latent, mask=real_latent, other=0.0)
        v = v * tl.rsqrt(tl.sum(v * v, axis=0) / shape.kv_lora + eps)
        v = v * tl.load(kv_norm + latent, mask=real_latent, other=0.0)
        tl.store(cell + latent, v.to(cache.dtype.element_ty), mask=real_latent)
        even_key = tl.load(new + shape.kv_lora + 2 * pair, mask=real, other=0.0)
        odd_key = tl.load(new + shape.kv_lora + 2 * pair + 1, mask=real, other=0.0)
        key = cell + shape.kv_lora + 2 * pair
        tl.store(key, (even_key * cos - odd_key * sin).to(cache.dtype.element_ty), mask=real)
        tl.store(key + 1, (even_key * sin + odd_key * cos).to(cache.dtype.element_ty), mask=real)


@triton.jit
def _pair(v):
    """float32 as a sum of two operands of the tensor cores."""
    upper = v.to(OPERAND)
    return upper, (v - upper.to(tl.float32)).to(OPERAND)


@jit_kernel(do_not_specialize=["span"])
def _attend(
    query,
    rotated,
    cache,
    slots,
    positions,
    out,
    sums,
    rows,
    span,
    scale,
    shape,
    heads: tl.constexpr,
    step: tl.constexpr,
):
    """Part program_id(0) of the cache, `span` positions, for some heads of token program_id(2): out [n, n_head, parts,
    kv_lora] not yet divided, sums [n, n_head, parts, 2]: greatest score and sum of exponentials (0: nothing there)."""
    part, token = tl.program_id(0), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(0)
    head = tl.program_id(1) * heads + tl.arange(0, heads)
    real = head < shape.n_head
    row = token * shape.n_head + tl.minimum(head, shape.n_head - 1)
    lora, turn = tl.arange(0, shape.kv_lora), tl.arange(0, shape.rope)
    end = tl.minimum(tl.load(positions + token) + 1, (part + 1) * span)
    sums += (row * parts + part) * 2
    greatest = tl.full([heads], float("-inf"), tl.float32)
    total = tl.zeros([heads], tl.float32)
    mixed = tl.zeros([heads, shape.kv_lora], tl.float32)
    q_hi, q_lo = _pair(tl.load(query + row[:, None] * shape.kv_lora + lora[None, :]))
    r_hi, r_lo = _pair(tl.load(rotated + row[:, None] * shape.rope + turn[None, :]))
    cache += tl.load(slots + token) * rows * (shape.kv_lora + shape.rope)
    for begin in range(part * span, end, step):
        position = begin + tl.arange(0, step)
        there = position < end
        data = cache + position[:, None].to(tl.int64) * (shape.kv_lora + shape.rope)
        latent = tl.load(data + lora[None, :], mask=there[:, None], other=0.0).to(OPERAND)
        key = tl.load(data + shape.kv_lora + turn[None, :], mask=there[:, None], other=0.0).to(OPERAND)
        score = tl.dot(q_lo, latent.T) + tl.dot(r_lo, key.T)
        score = tl.dot(q_hi, latent.T, score)
        score = tl.dot(r_hi, key.T, score) * scale
        score = tl.where(there[None, :], score, float("-inf"))
        top = tl.maximum(greatest, tl.max(score, axis=1))
        p = tl.exp(score - top[:, None])
        shrink = tl.exp(greatest - top)
        total = total * shrink + tl.sum(p, axis=1)
        p_hi, p_lo = _pair(p)
        mixed = tl.dot(p_hi, latent, tl.dot(p_lo, latent, mixed * shrink[:, None]))
        greatest = top
    tl.store(sums, greatest, mask=real)
    tl.store(sums + 1, total, mask=real)
    if end > part * span:
        to = out + (row * parts + part)[:, None] * shape.kv_lora + lora[None, :]
        tl.store(to, mixed, mask=real[:, None])


@jit_kernel(do_not_specialize=["parts"])  # or another number of them would be compiled while somebody waits
def _merge(out, sums, to, parts, shape):
    """The parts of head program_id(1) of token program_id(0) together -> one row of `to`."""
    row = (tl.program_id(0) * shape.n_head + tl.program_id(1)).to(tl.int64)
    column = tl.arange(0, 32 * shape.lora_blocks)
    inside = column < shape.kv_lora
    greatest = tl.load(sums + row * parts * 2)
    total = greatest * 0
    mixed = tl.zeros([32 * shape.lora_blocks], tl.float32)
    for part in range(parts):
        there = tl.load(sums + (row * parts + part) * 2 + 1)
        if there > 0:
            top = tl.load(sums + (row * parts + part) * 2)
            new = tl.maximum(greatest, top)
            shrink, grow = tl.exp(greatest - new), tl.exp(top - new)
            total = total * shrink + there * grow
            v = tl.load(out + (row * parts + part) * shape.kv_lora + column, mask=inside, other=0.0)
            mixed = mixed * shrink + v * grow
            greatest = new
    _write(to, mixed / total, row, 0, shape.kv_lora, inside, shape.lora_blocks)


@jit_kernel(do_not_specialize=["first", "count"])
def _collect(out, part, place, shares, first, count, d, n_used: tl.constexpr, width: tl.constexpr):
    """Add to token program_id(0) of out its rows of part, those whose place is first ... first + count."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * width + tl.arange(0, width)
    inside = column < d
    total = tl.load(out + token * d + column, mask=inside, other=0.0)
    for k in tl.static_range(n_used):
        at = tl.load(place + token * n_used + k) - first
        if (at >= 0) & (at < count):
            v = tl.load(part + at * d + column, mask=inside, other=0.0).to(tl.float32)
            total += v * tl.load(shares + token * n_used + k)
    tl.store(out + token * d + column, total, mask=inside)


def collect(out: torch.Tensor, part: torch.Tensor, place: torch.Tensor, shares: torch.Tensor, first: int) -> None:
    """out float32 [n, d] += shares float32 [n, k] times those of the rows part [count, d] that are the token's: where
    place int64 [n, k] less first is one of them. In the order of k, so that sums are reproducible."""
    (n, d), width = out.shape, 1024
    grid = (n, triton.cdiv(d, width))
    _collect[grid](out, part, place, shares, first, len(part), d, place.shape[1], width, num_warps=4)


def _blocks(n: int) -> int:
    """Blocks of 32 columns, a power of two, that hold n."""
    return triton.next_power_of_2(triton.cdiv(n, 32))


def _empty(n: int, n_in: int, device: torch.device) -> Activations:
    x = torch.empty(n, n_in, device=device)
    words = torch.empty(n, 4, n_in // 8, dtype=torch.int32, device=device)
    return Activations(x, words, torch.empty(n, n_in // 32, device=device))


def gated(gate: torch.Tensor, up: torch.Tensor | None) -> Activations:
    """silu(gate) · up, or gate alone without up: float32 [n, n_in], contiguous."""
    n, n_in = gate.shape
    to = _empty(n, n_in, gate.device)
    blocks = min(16, _blocks(n_in))
    _gated[(n, triton.cdiv(n_in, 32 * blocks))](gate, up, Words(*to[:3]), n_in, tl.constexpr(blocks), num_warps=4)
    return to


def norm(
    h: torch.Tensor,
    added: tuple[torch.Tensor | None, torch.Tensor | None],
    chosen: tuple[torch.Tensor, torch.Tensor] | None,
    weight: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, Activations]:
    """h + what is added, and its RMS norm. h, added: float32 [n, d]. chosen: outputs of experts [n · k, d] and their
    shares [n, k]."""
    n, d = h.shape
    anything = chosen is not None or any(part is not None for part in added)
    total = torch.empty_like(h) if anything else None
    to = _empty(n, d, h.device)
    y, shares = chosen or (None, None)
    used = tl.constexpr(1 if shares is None else shares.shape[1])
    blocks = _blocks(d)
    warps = min(16, max(1, blocks // 8))
    _norm[(n,)](
        h, *added, y, shares, used, weight, total, Words(*to[:3]), d, eps, tl.constexpr(blocks), num_warps=warps
    )
    return h if total is None else total, to


def _shape(c: ModelConfig) -> Shape:
    sizes = (c.n_head, c.kv_lora, c.qk_nope, c.qk_rope, triton.next_power_of_2(c.qk_rope // 2))
    return Shape(*map(tl.constexpr, (*sizes, _blocks(c.qk_nope), _blocks(c.kv_lora))))


def able(c: ModelConfig) -> bool:
    """Whether these kernels can compute attention: widths of the cache that are powers of two, integers in 32s."""
    widths = (c.kv_lora, c.qk_rope)
    return all(w == triton.next_power_of_2(w) >= 16 for w in widths) and c.qk_nope % 32 == 0 == c.v_head % 32


def place(
    q: torch.Tensor, kv: torch.Tensor, kv_norm: torch.Tensor, cache: torch.Tensor, where: Where, c: ModelConfig
) -> tuple[Activations, torch.Tensor]:
    """Write the new tokens' cells of the cache; their queries [n, n_head · (nope + rope)] apart: the first part
    [n · n_head, nope], the second rotated, float32 [n, n_head, rope]."""
    n = len(q)
    to = _empty(n * c.n_head, c.qk_nope, q.device)
    rotated = torch.empty(n, c.n_head, c.qk_rope, device=q.device)
    places = (where.turned, where.positions, where.cells)
    arguments = (q, kv, kv_norm, *places, cache, rotated, Words(*to[:3]), c.rms_eps, _shape(c))
    _place[(n, c.n_head + 1)](*arguments, num_warps=1)
    return to, rotated


def attend(
    query: torch.Tensor, rotated: torch.Tensor, cache: torch.Tensor, where: Where, n_kv: int, c: ModelConfig
) -> Activations:
    """Attention over the first positions of the cache, at most n_kv, [n_slots, rows, kv_lora + rope]; query float32
    [n, n_head, kv_lora] -> [n · n_head, kv_lora]."""
    n, rows = len(query), cache.shape[1]
    span = max(2 * POSITIONS, n_kv // SPLITS)
    parts = triton.cdiv(n_kv, span)
    out = torch.empty(n, c.n_head, parts, c.kv_lora, device=query.device)
    sums = torch.empty(n, c.n_head, parts, 2, device=query.device)
    to = _empty(n * c.n_head, c.kv_lora, query.device)
    shape, places = _shape(c), (where.slots, where.positions)
    _attend[(parts, triton.cdiv(c.n_head, HEADS), n)](
        query, rotated, cache, *places, out, sums, rows, span, c.softmax_scale, shape, HEADS, POSITIONS, num_stages=1
    )
    _merge[(n, c.n_head)](out, sums, Words(*to[:3]), parts, shape, num_warps=2)
    return to
