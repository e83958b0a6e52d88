"""Blocks decoded in registers by Triton: one function a type, the twins of `unpack_*` in the kinds' files.

Each takes p, where a block begins, j, which of its groups of 8 neighbouring weights, and its codebook as bytes
(`codebooks.for_kernels`), in any shape. It returns the eight int8 in two words, scale and offset: the weights are
`scale · v + offset`. Blocks are read as they lie in the file, so only 2-byte alignment is certain, and of blocks of 17
bytes (MXFP4) none. Imported only where Triton is.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # without inline assembly


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
def _u32_anywhere(p):
    """Four bytes of a type whose blocks are an odd number of them."""
    return _byte(p) | (_byte(p + 1) << 8) | (_byte(p + 2) << 16) | (_byte(p + 3) << 24)


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
def _no_offset(p):
    return tl.zeros_like(p.to(tl.int64)).to(tl.float32)


@triton.jit
def _odd(p):
    """Whether an address of 2-byte data is not a multiple of 4; and the word that it lies in."""
    at = p.to(tl.int64)
    return (at & 2) != 0, (at & -4).to(tl.pointer_type(tl.int32))


@triton.jit
def _joined(odd, a, b):
    """The word that begins in the middle of a if odd, else a."""
    return tl.where(odd, _upper(a, 16) | (b << 16), a)


@triton.jit
def _two(p):
    """Two words at an even address."""
    odd, at = _odd(p)
    a, b = tl.load(at), tl.load(at + 1)
    return _joined(odd, a, b), _joined(odd, b, tl.load(at + 2, mask=odd, other=0))


@triton.jit
def _halves(p):
    """Two float16 in a word."""
    word = _word(p)
    low = (word & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, _upper(word, 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _spread(bits):
    """The lowest four bits, each in a byte of a word."""
    return ((bits & 15) * 0x00204081) & 0x01010101


@triton.jit
def _entry(table, index, least: tl.constexpr, first: tl.constexpr, second: tl.constexpr):
    """Eight weights of a codebook of three levels, from the bits that say which have the second and third."""
    bits = tl.load(table.to(tl.pointer_type(tl.uint16)) + index).to(tl.int32)
    lo = least + first * _spread(bits) + second * _spread(bits >> 8)
    return lo, least + first * _spread(bits >> 4) + second * _spread(bits >> 12)


@triton.jit
def _ternary(table, index):
    """-1, 0 or 1."""
    return _entry(table, index, 0, 1, 255)


@triton.jit
def _magnitudes(table, index):
    """8, 25 or 43."""
    return _entry(table, index, 0x08080808, 17, 35)


@triton.jit
def _flip(word, signs):
    """Negate the bytes (none is 0) of a word whose sign bits, the lowest four, are set."""
    spread = _spread(signs)
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
def iq1_s(p, j, table):
    """`iq1.unpack_iq1_s`."""
    high = _u16(p + 34 + 2 * (j // 4))
    entry = _byte(p + 2 + j) | (((high >> (3 * (j % 4))) & 7) << 8)
    scale = _f16(p) * (2 * ((high >> 12) & 7) + 1).to(tl.float32)
    offset = scale * tl.where((high & 0x8000) != 0, -0.125, 0.125)
    lo, hi = _ternary(table, entry)
    return lo, hi, scale, offset


@triton.jit
def iq1_m(p, j, table):
    """`iq1.unpack_iq1_m`."""
    s0, s1, s2, s3 = _u16(p + 48), _u16(p + 50), _u16(p + 52), _u16(p + 54)
    bits = (s0 >> 12) | ((s1 >> 8) & 0xF0) | ((s2 >> 4) & 0xF00) | (s3 & 0xF000)
    d = bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    high = _byte(p + 32 + j // 2) >> (4 * (j % 2))
    entry = _byte(p + j) | ((high & 7) << 8)
    code = (_u16(p + 48 + 2 * (j // 8)) >> (3 * ((j // 2) % 4))) & 7
    scale = d * (2 * code + 1).to(tl.float32)
    offset = scale * tl.where((high & 8) != 0, -0.125, 0.125)
    lo, hi = _ternary(table, entry)
    return lo, hi, scale, offset


@triton.jit
def iq2_xxs(p, j, table):
    """`iq2.unpack_iq2_xxs`."""
    entry = _byte(p + 2 + 8 * (j // 4) + j % 4)
    word = _u32(p + 6 + 8 * (j // 4))
    signs = _even((word >> (7 * (j % 4))) & 127)
    scale = _f16(p) * (0.5 + _upper(word, 28).to(tl.float32)) * 0.25
    lo, hi = _magnitudes(table, entry)
    return _flip(lo, signs), _flip(hi, signs >> 4), scale, _no_offset(p)


@triton.jit
def iq2_xs(p, j, table):
    """`iq2.unpack_iq2_xs`."""
    word = _u16(p + 2 + 2 * j)
    code = (_byte(p + 66 + j // 4) >> (4 * ((j // 2) % 2))) & 15
    signs, entry = _even(word >> 9), word & 511
    scale = _f16(p) * (0.5 + code.to(tl.float32)) * 0.25
    lo, hi = _magnitudes(table, entry)
    return _flip(lo, signs), _flip(hi, signs >> 4), scale, _no_offset(p)


@triton.jit
def iq2_s(p, j, table):
    """`iq2.unpack_iq2_s`."""
    entry = _byte(p + 2 + j) | (((_byte(p + 66 + j // 4) >> (2 * (j % 4))) & 3) << 8)
    code = (_byte(p + 74 + j // 4) >> (4 * ((j // 2) % 2))) & 15
    signs = _byte(p + 34 + j)
    scale = _f16(p) * (0.5 + code.to(tl.float32)) * 0.25
    lo, hi = _magnitudes(table, entry)
    return _flip(lo, signs), _flip(hi, signs >> 4), scale, _no_offset(p)


@triton.jit
def iq3_xxs(p, j, table):
    """`iq3.unpack_iq3_xxs`."""
    words = table.to(tl.pointer_type(tl.int32))
    word = _u32(p + 66 + 4 * (j // 4))
    signs = _even((word >> (7 * (j % 4))) & 127)
    scale = _f16(p) * (0.5 + _upper(word, 28).to(tl.float32)) * 0.5
    lo = _flip(tl.load(words + _byte(p + 2 + 2 * j)), signs)
    hi = _flip(tl.load(words + _byte(p + 3 + 2 * j)), signs >> 4)
    return lo, hi, scale, _no_offset(p)


@triton.jit
def iq3_s(p, j, table):
    """`iq3.unpack_iq3_s`."""
    words = table.to(tl.pointer_type(tl.int32))
    high = _byte(p + 66 + j // 4) >> (2 * (j % 4))
    code = (_byte(p + 106 + j // 8) >> (4 * ((j // 4) % 2))) & 15
    signs = _byte(p + 74 + j)
    scale = _f16(p) * (1 + 2 * code).to(tl.float32)
    lo = _flip(tl.load(words + (_byte(p + 2 + 2 * j) | ((high & 1) << 8))), signs)
    hi = _flip(tl.load(words + (_byte(p + 3 + 2 * j) | ((high & 2) << 7))), signs >> 4)
    return lo, hi, scale, _no_offset(p)


@triton.jit
def q2_k(p, j, table):
    """`kquants.unpack_q2_k`."""
    code, shift = _byte(p + j // 2), 2 * ((j % 16) // 4)
    at = p + 16 + 32 * (j // 16) + 8 * (j % 4)
    lo, hi = (_word(at) >> shift) & 0x03030303, (_word(at + 4) >> shift) & 0x03030303
    d, least = _halves(p + 80)
    return lo, hi, d * (code & 15).to(tl.float32), -least * (code >> 4).to(tl.float32)


@triton.jit
def q3_k(p, j, table):
    """`kquants.unpack_q3_k`."""
    shift, bit, k = 2 * ((j % 16) // 4), j // 4, j // 2
    at, top = p + 32 + 32 * (j // 16) + 8 * (j % 4), p + 8 * (j % 4)
    lo, hi = _two(at)
    top_lo, top_hi = _two(top)
    lo = ((lo >> shift) & 0x03030303) | (((top_lo >> bit) & 0x01010101) << 2)
    hi = ((hi >> shift) & 0x03030303) | (((top_hi >> bit) & 0x01010101) << 2)
    code = (_byte(p + 96 + k % 8) >> (4 * (k // 8))) & 15
    code = code | (((_byte(p + 104 + k % 4) >> (2 * (k // 4))) & 3) << 4)
    scale = _f16(p + 108) * (code - 32).to(tl.float32)
    return lo, hi, scale, -4 * scale


@triton.jit
def q4_k(p, j, table):
    """`kquants.unpack_q4_k`."""
    shift = 4 * ((j // 4) % 2)
    at = p + 16 + 32 * (j // 8) + 8 * (j % 4)
    lo, hi = (_word(at) >> shift) & 0x0F0F0F0F, (_word(at + 4) >> shift) & 0x0F0F0F0F
    code, low = _scale_min(p + 4, j // 4)
    d, least = _halves(p)
    return lo, hi, d * code, -least * low


@triton.jit
def q5_k(p, j, table):
    """`kquants.unpack_q5_k`."""
    shift, bit = 4 * ((j // 4) % 2), j // 4
    at, top = p + 48 + 32 * (j // 8) + 8 * (j % 4), p + 16 + 8 * (j % 4)
    lo = ((_word(at) >> shift) & 0x0F0F0F0F) | (((_word(top) >> bit) & 0x01010101) << 4)
    hi = ((_word(at + 4) >> shift) & 0x0F0F0F0F) | (((_word(top + 4) >> bit) & 0x01010101) << 4)
    code, low = _scale_min(p + 4, j // 4)
    d, least = _halves(p)
    return lo, hi, d * code, -least * low


@triton.jit
def q6_k(p, j, table):
    """`kquants.unpack_q6_k`."""
    q = (j % 16) // 4
    at, top = p + 64 * (j // 16) + 32 * (q % 2) + 8 * (j % 4), p + 128 + 32 * (j // 16) + 8 * (j % 4)
    shift, bit = 4 * (q // 2), 2 * q
    lo, hi = _two(at)
    top_lo, top_hi = _two(top)
    lo = ((lo >> shift) & 0x0F0F0F0F) | (((top_lo >> bit) & 0x03030303) << 4)
    hi = ((hi >> shift) & 0x0F0F0F0F) | (((top_hi >> bit) & 0x03030303) << 4)
    scale = _f16(p + 208) * _byte(p + 192 + j // 2).to(tl.int8).to(tl.float32)
    return lo, hi, scale, -32 * scale


@triton.jit
def iq4_xs(p, j, table):
    """`kquants.unpack_iq4_xs`."""
    at, shift, s = p + 8 + 16 * (j // 4) + 8 * (j % 2), 4 * ((j // 2) % 2), j // 4
    lo, hi = _levels(_word(at), shift, table), _levels(_word(at + 4), shift, table)
    code = (_byte(p + 4 + s // 2) >> (4 * (s % 2))) & 15
    code = code | (((_u16(p + 2) >> (2 * s)) & 3) << 4)
    return lo, hi, _f16(p) * (code - 32).to(tl.float32), _no_offset(p)


@triton.jit
def q8_0(p, j, table):
    """`plain.unpack_q8_0`."""
    lo, hi = _two(p + 2 + 8 * j)
    return lo, hi, _f16(p), _no_offset(p)


@triton.jit
def q4_0(p, j, table):
    """`plain.unpack_q4_0`."""
    at, shift = p + 2 + 8 * (j % 2), 4 * (j // 2)
    scale = _f16(p)
    return (_u32(at) >> shift) & 0x0F0F0F0F, (_u32(at + 4) >> shift) & 0x0F0F0F0F, scale, -8 * scale


@triton.jit
def _fifth(bits):
    """Four bits, the lowest of a number -> 16 in those of the four bytes of a word whose bit is set."""
    return (((bits & 15) * 0x00204081) & 0x01010101) << 4


@triton.jit
def q5_0(p, j, table):
    """`plain.unpack_q5_0`."""
    at, shift, high = p + 6 + 8 * (j % 2), 4 * (j // 2), _byte(p + 2 + j)
    lo = ((_u32(at) >> shift) & 0x0F0F0F0F) | _fifth(high)
    hi = ((_u32(at + 4) >> shift) & 0x0F0F0F0F) | _fifth(high >> 4)
    scale = _f16(p)
    return lo, hi, scale, -16 * scale


@triton.jit
def q5_1(p, j, table):
    """`plain.unpack_q5_1`."""
    at, shift, high = p + 8 + 8 * (j % 2), 4 * (j // 2), _byte(p + 4 + j)
    lo = ((_u32(at) >> shift) & 0x0F0F0F0F) | _fifth(high)
    hi = ((_u32(at + 4) >> shift) & 0x0F0F0F0F) | _fifth(high >> 4)
    return lo, hi, _f16(p), _f16(p + 2)


@triton.jit
def iq4_nl(p, j, table):
    """`plain.unpack_iq4_nl`."""
    at, shift = p + 2 + 8 * (j % 2), 4 * (j // 2)
    return _levels(_u32(at), shift, table), _levels(_u32(at + 4), shift, table), _f16(p), _no_offset(p)


@triton.jit
def mxfp4(p, j, table):
    """`plain.unpack_mxfp4`."""
    at, shift, e = p + 1 + 8 * (j % 2), 4 * (j // 2), _byte(p)
    scale = tl.where(e < 2, 0x00200000 << (e & 1), (e - 1) << 23).to(tl.float32, bitcast=True)
    lo, hi = _levels(_u32_anywhere(at), shift, table), _levels(_u32_anywhere(at + 4), shift, table)
    return lo, hi, scale, _no_offset(p)


DECODERS = {
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ4_XS": iq4_xs,
    "IQ4_NL": iq4_nl,
    "MXFP4": mxfp4,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "Q8_0": q8_0,
    "Q4_0": q4_0,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
}
