"""32 weights of a block decoded in registers by Triton: what decoding tokens waits for, so with few loads.

A chunk is four groups of 8 neighbouring weights. Chunk j of a block begins with group `first(j)`; the others follow
after `near`, `far` and `near + far` groups, so that all four come of the same words. A function of a type takes p, the
address of a row or what is below it, a multiple of 4; o, where in it a block begins; j; and its codebook as bytes. It
returns four pairs of words with eight int8 each, four scales and four offsets, as `triton_decode` has them for one
group. Where rows are a multiple of 4 bytes, o and what is computed of it are the same for all of them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from quantkit.codecs.triton_decode import (
    INTERPRETED,
    _byte,
    _even,
    _f16,
    _flip,
    _halves,
    _magnitudes,
    _no_offset,
    _ternary,
    _u16,
    _upper,
    _word,
)


@triton.jit
def _shifted(o, a, b):
    """The word at offset o, a multiple of 2, of which a and b are the words around it."""
    if INTERPRETED:
        return tl.where((o & 2) != 0, _upper(a, 16) | (b << 16), a)
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, (o & 2) << 3], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def _words(p, o, c: tl.constexpr, n: tl.constexpr):
    """n words at p + o + c: p and c are multiples of 4, o of 2."""
    at = (p + (o & -4) + c).to(tl.pointer_type(tl.int32))
    last = tl.load(at + n, mask=(o & 2) != 0, other=0)
    if n == 2:
        a, b = tl.load(at), tl.load(at + 1)
        return _shifted(o, a, b), _shifted(o, b, last)
    elif n == 3:
        a, b, d = tl.load(at), tl.load(at + 1), tl.load(at + 2)
        return _shifted(o, a, b), _shifted(o, b, d), _shifted(o, d, last)
    else:
        a, b, d, e = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
        return _shifted(o, a, b), _shifted(o, b, d), _shifted(o, d, e), _shifted(o, e, last)


@triton.jit
def _of8(a, b, i):
    """Byte i of eight in two words."""
    return (tl.where(i < 4, a, b) >> (8 * (i & 3))) & 255


@triton.jit
def _signed_entry(table, index, signs):
    lo, hi = _magnitudes(table, index)
    return _flip(lo, signs), _flip(hi, signs >> 4)


@triton.jit
def iq1_s(p, o, j, table):
    at = p + o
    word = _u16(at + 2 + 4 * j) | (_u16(at + 4 + 4 * j) << 16)
    high = _u16(at + 34 + 2 * j)
    scale = _f16(at) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    offset = scale * tl.where((high & 0x8000) != 0, -0.125, 0.125)
    a, b = _ternary(table, (word & 255) | ((high & 7) << 8))
    c, d = _ternary(table, ((word >> 8) & 255) | (((high >> 3) & 7) << 8))
    e, f = _ternary(table, ((word >> 16) & 255) | (((high >> 6) & 7) << 8))
    g, h = _ternary(table, ((word >> 24) & 255) | (((high >> 9) & 7) << 8))
    return a, b, c, d, e, f, g, h, scale, scale, scale, scale, offset, offset, offset, offset


@triton.jit
def _iq1_m_group(word, high, d, codes, k: tl.constexpr, table):
    nibble = (high >> (4 * k)) & 15
    lo, hi = _ternary(table, ((word >> (8 * k)) & 255) | ((nibble & 7) << 8))
    scale = d * (2 * ((codes >> (3 * (k // 2))) & 7) + 1).to(tl.float32)
    return lo, hi, scale, scale * tl.where((nibble & 8) != 0, -0.125, 0.125)


@triton.jit
def iq1_m(p, o, j, table):
    at = p + o
    word, high = _word(at + 4 * j), _u16(at + 32 + 2 * j)
    s, t = _word(at + 48), _word(at + 52)
    bits = ((s >> 12) & 15) | ((s >> 24) & 0xF0) | ((t >> 4) & 0xF00) | ((t >> 16) & 0xF000)
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    codes = (tl.where(j < 4, s, t) >> (16 * ((j // 2) % 2))) >> (6 * (j % 2))
    a, b, s0, o0 = _iq1_m_group(word, high, d, codes, 0, table)
    c, e, s1, o1 = _iq1_m_group(word, high, d, codes, 1, table)
    f, g, s2, o2 = _iq1_m_group(word, high, d, codes, 2, table)
    h, i, s3, o3 = _iq1_m_group(word, high, d, codes, 3, table)
    return a, b, c, e, f, g, h, i, s0, s1, s2, s3, o0, o1, o2, o3


@triton.jit
def iq2_xxs(p, o, j, table):
    word, signs = _words(p, o + 2 + 8 * j, 0, 2)
    scale, zero = _f16(p + o) * (0.5 + _upper(signs, 28).to(tl.float32)) * 0.25, _no_offset(j)
    a, b = _signed_entry(table, word & 255, _even(signs & 127))
    c, d = _signed_entry(table, (word >> 8) & 255, _even((signs >> 7) & 127))
    e, f = _signed_entry(table, (word >> 16) & 255, _even((signs >> 14) & 127))
    g, h = _signed_entry(table, (word >> 24) & 255, _even((signs >> 21) & 127))
    return a, b, c, d, e, f, g, h, scale, scale, scale, scale, zero, zero, zero, zero


@triton.jit
def iq2_xs(p, o, j, table):
    low, high = _words(p, o + 2 + 8 * j, 0, 2)
    codes, d, zero = _byte(p + o + 66 + j), _f16(p + o) * 0.25, _no_offset(j)
    first, second = d * (0.5 + (codes & 15).to(tl.float32)), d * (0.5 + (codes >> 4).to(tl.float32))
    a, b = _signed_entry(table, low & 511, _even((low >> 9) & 127))
    c, e = _signed_entry(table, (low >> 16) & 511, _even((low >> 25) & 127))
    f, g = _signed_entry(table, high & 511, _even((high >> 9) & 127))
    h, i = _signed_entry(table, (high >> 16) & 511, _even((high >> 25) & 127))
    return a, b, c, e, f, g, h, i, first, first, second, second, zero, zero, zero, zero


@triton.jit
def iq2_s(p, o, j, table):
    at = p + o
    word = _u16(at + 2 + 4 * j) | (_u16(at + 4 + 4 * j) << 16)
    signs = _u16(at + 34 + 4 * j) | (_u16(at + 36 + 4 * j) << 16)
    high, codes, d, zero = _byte(at + 66 + j), _byte(at + 74 + j), _f16(at) * 0.25, _no_offset(j)
    first, second = d * (0.5 + (codes & 15).to(tl.float32)), d * (0.5 + (codes >> 4).to(tl.float32))
    a, b = _signed_entry(table, (word & 255) | ((high & 3) << 8), signs)
    c, e = _signed_entry(table, ((word >> 8) & 255) | (((high >> 2) & 3) << 8), signs >> 8)
    f, g = _signed_entry(table, ((word >> 16) & 255) | (((high >> 4) & 3) << 8), signs >> 16)
    h, i = _signed_entry(table, ((word >> 24) & 255) | (((high >> 6) & 3) << 8), signs >> 24)
    return a, b, c, e, f, g, h, i, first, first, second, second, zero, zero, zero, zero


@triton.jit
def _iq3_xxs_group(table, low, high, signs):
    words = table.to(tl.pointer_type(tl.int32))
    return _flip(tl.load(words + low), signs), _flip(tl.load(words + high), signs >> 4)


@triton.jit
def iq3_xxs(p, o, j, table):
    at = p + o
    low, high = _words(p, o + 2 + 8 * j, 0, 2)
    signs = _u16(at + 66 + 4 * j) | (_u16(at + 68 + 4 * j) << 16)
    scale, zero = _f16(at) * (0.5 + _upper(signs, 28).to(tl.float32)) * 0.5, _no_offset(j)
    a, b = _iq3_xxs_group(table, low & 255, (low >> 8) & 255, _even(signs & 127))
    c, d = _iq3_xxs_group(table, (low >> 16) & 255, (low >> 24) & 255, _even((signs >> 7) & 127))
    e, f = _iq3_xxs_group(table, high & 255, (high >> 8) & 255, _even((signs >> 14) & 127))
    g, h = _iq3_xxs_group(table, (high >> 16) & 255, (high >> 24) & 255, _even((signs >> 21) & 127))
    return a, b, c, d, e, f, g, h, scale, scale, scale, scale, zero, zero, zero, zero


@triton.jit
def q2_k(p, o, j, table):
    half, column = j // 4, j % 4
    m: tl.constexpr = 0x03030303
    at, codes = p + (o + 32 * half + 8 * column), p + (o + 8 * half)
    lo, hi = _word(at + 16), _word(at + 20)
    first, second = _word(codes), _word(codes + 4)
    shift = 8 * (column // 2)
    s, t = first >> shift, second >> shift  # the codes of groups 0, 1 and 2, 3: bytes 0 and 2
    d, low = _halves(p + o + 80)
    low = -low
    s0, s1 = d * (s & 15).to(tl.float32), d * ((s >> 16) & 15).to(tl.float32)
    s2, s3 = d * (t & 15).to(tl.float32), d * ((t >> 16) & 15).to(tl.float32)
    o0, o1 = low * ((s >> 4) & 15).to(tl.float32), low * ((s >> 20) & 15).to(tl.float32)
    o2, o3 = low * ((t >> 4) & 15).to(tl.float32), low * ((t >> 20) & 15).to(tl.float32)
    a, b, c, e = lo & m, hi & m, (lo >> 2) & m, (hi >> 2) & m
    f, g, h, i = (lo >> 4) & m, (hi >> 4) & m, (lo >> 6) & m, (hi >> 6) & m
    return a, b, c, e, f, g, h, i, s0, s1, s2, s3, o0, o1, o2, o3


@triton.jit
def _q3_k_group(lo, hi, top_lo, top_hi, a, b, c, half, column, k: tl.constexpr, d):
    bit, at = 4 * half + k, 2 * k + column // 2
    lo = ((lo >> (2 * k)) & 0x03030303) | (((top_lo >> bit) & 0x01010101) << 2)
    hi = ((hi >> (2 * k)) & 0x03030303) | (((top_hi >> bit) & 0x01010101) << 2)
    code = (_of8(a, b, at) >> (4 * half)) & 15
    code = code | (((c >> (8 * (at & 3) + 4 * half + 2 * (at // 4))) & 3) << 4)
    return lo, hi, d * (code - 32).to(tl.float32)


@triton.jit
def q3_k(p, o, j, table):
    half, column, d = j // 4, j % 4, _f16(p + o + 108)
    lo, hi = _words(p, o + 32 * half + 8 * column, 32, 2)
    top_lo, top_hi = _words(p, o + 8 * column, 0, 2)
    s, t, u = _words(p, o, 96, 3)
    a, b, s0 = _q3_k_group(lo, hi, top_lo, top_hi, s, t, u, half, column, 0, d)
    c, e, s1 = _q3_k_group(lo, hi, top_lo, top_hi, s, t, u, half, column, 1, d)
    f, g, s2 = _q3_k_group(lo, hi, top_lo, top_hi, s, t, u, half, column, 2, d)
    h, i, s3 = _q3_k_group(lo, hi, top_lo, top_hi, s, t, u, half, column, 3, d)
    return a, b, c, e, f, g, h, i, s0, s1, s2, s3, -4 * s0, -4 * s1, -4 * s2, -4 * s3


@triton.jit
def _scales(p, s):
    """Scale and offset of parts s and s + 1 (s even) of a block of Q4_K or Q5_K."""
    d, low = _halves(p)
    low = -low
    a, b, c = _word(p + 4), _word(p + 8), _word(p + 12)
    shift = 8 * (s & 3)
    a, b, c = a >> shift, b >> shift, c >> shift  # bytes 0 and 1 are those of the two parts
    early = s < 4
    scale = tl.where(early, a & 0x3F3F, (c & 0x0F0F) | ((a >> 2) & 0x3030))
    least = tl.where(early, b & 0x3F3F, ((c >> 4) & 0x0F0F) | ((b >> 2) & 0x3030))
    first, second = d * (scale & 255).to(tl.float32), d * ((scale >> 8) & 255).to(tl.float32)
    return first, second, low * (least & 255).to(tl.float32), low * ((least >> 8) & 255).to(tl.float32)


@triton.jit
def q4_k(p, o, j, table):
    at = p + (o + 16 * j)
    a, b, c, d = _word(at + 16), _word(at + 20), _word(at + 24), _word(at + 28)
    s, t, m0, m1 = _scales(p + o, 2 * (j // 2))
    m: tl.constexpr = 0x0F0F0F0F
    return (
        a & m,
        b & m,
        c & m,
        d & m,
        (a >> 4) & m,
        (b >> 4) & m,
        (c >> 4) & m,
        (d >> 4) & m,
        s,
        s,
        t,
        t,
        m0,
        m0,
        m1,
        m1,
    )


@triton.jit
def _fifth(word, top, shift: tl.constexpr, bit):
    return ((word >> shift) & 0x0F0F0F0F) | (((top >> bit) & 0x01010101) << 4)


@triton.jit
def q5_k(p, o, j, table):
    at, top, bit = p + (o + 16 * j), p + (o + 16 * (j % 2)), 2 * (j // 2)
    a, b, c, d = _word(at + 48), _word(at + 52), _word(at + 56), _word(at + 60)
    e, f, g, h = _word(top + 16), _word(top + 20), _word(top + 24), _word(top + 28)
    s, t, m0, m1 = _scales(p + o, bit)
    a0, a1 = _fifth(a, e, 0, bit), _fifth(a, e, 4, bit + 1)
    b0, b1 = _fifth(b, f, 0, bit), _fifth(b, f, 4, bit + 1)
    c0, c1 = _fifth(c, g, 0, bit), _fifth(c, g, 4, bit + 1)
    d0, d1 = _fifth(d, h, 0, bit), _fifth(d, h, 4, bit + 1)
    return a0, b0, c0, d0, a1, b1, c1, d1, s, s, t, t, m0, m0, m1, m1


@triton.jit
def _sixth(word, top, shift: tl.constexpr, bit: tl.constexpr):
    return ((word >> shift) & 0x0F0F0F0F) | (((top >> bit) & 0x03030303) << 4)


@triton.jit
def q6_k(p, o, j, table):
    half, column, d = j // 4, j % 4, _f16(p + o + 208)
    at = o + 64 * half + 8 * column
    a, b = _words(p, at, 0, 2)
    c, e = _words(p, at, 32, 2)
    t, u = _words(p, o + 32 * half + 8 * column, 128, 2)
    first, second = _words(p, o + 8 * half, 192, 2)
    shift = 8 * (column // 2)
    first, second = first >> shift, second >> shift  # those of groups 0, 1 and 2, 3: bytes 0 and 2
    s0, s1 = d * ((first << 24) >> 24).to(tl.float32), d * ((first << 8) >> 24).to(tl.float32)
    s2, s3 = d * ((second << 24) >> 24).to(tl.float32), d * ((second << 8) >> 24).to(tl.float32)
    a0, b0, c0, e0 = _sixth(a, t, 0, 0), _sixth(b, u, 0, 0), _sixth(c, t, 0, 2), _sixth(e, u, 0, 2)
    a1, b1, c1, e1 = _sixth(a, t, 4, 4), _sixth(b, u, 4, 4), _sixth(c, t, 4, 6), _sixth(e, u, 4, 6)
    return a0, b0, c0, e0, a1, b1, c1, e1, s0, s1, s2, s3, -32 * s0, -32 * s1, -32 * s2, -32 * s3


@triton.jit
def q8_0(p, o, j, table):
    a, b, c, d = _words(p, o + 2, 0, 4)
    e, f, g, h = _words(p, o + 2, 16, 4)
    scale, zero = _f16(p + o), _no_offset(o)
    return a, b, c, d, e, f, g, h, scale, scale, scale, scale, zero, zero, zero, zero


class Wide(NamedTuple):
    """A type's function; near and far: of its groups; alike: how many of them, from the first on, have one scale."""

    decode: Any
    near: int
    far: int
    alike: int
    offset: bool


WIDE = {
    "IQ1_S": Wide(iq1_s, 1, 2, 4, True),
    "IQ1_M": Wide(iq1_m, 1, 2, 1, True),
    "IQ2_XXS": Wide(iq2_xxs, 1, 2, 4, False),
    "IQ2_XS": Wide(iq2_xs, 1, 2, 2, False),
    "IQ2_S": Wide(iq2_s, 1, 2, 2, False),
    "IQ3_XXS": Wide(iq3_xxs, 1, 2, 4, False),
    "Q2_K": Wide(q2_k, 4, 8, 1, True),
    "Q3_K": Wide(q3_k, 4, 8, 1, True),
    "Q4_K": Wide(q4_k, 1, 4, 2, True),
    "Q5_K": Wide(q5_k, 1, 4, 2, True),
    "Q6_K": Wide(q6_k, 4, 8, 1, True),
    "Q8_0": Wide(q8_0, 1, 2, 4, False),
}
