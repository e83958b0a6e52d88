"""Q2_K … Q6_K and IQ4_XS: each weight rounded alone, under a scale (and a min) of 16 or 32 weights."""

import gguf
import torch

from quantkit.codecs.format import Codes, Format, as_bytes, gather_bits, words


def integers(low: int, high: int) -> tuple[float, ...]:
    return tuple(float(v) for v in range(low, high + 1))


def interleave(entry: torch.Tensor, parts: int, stride: int, shifts: list[int]) -> torch.Tensor:
    """Weights `stride` apart share a byte: [n, 256] -> [n, parts, stride] of bits at these positions."""
    return gather_bits(entry.view(-1, parts, len(shifts), stride).transpose(2, 3), shifts)


def pack_scales_mins(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """8 scales and 8 mins of 6 bits -> 12 bytes (gguf.quants.Q4_K.get_scale_min reads them)."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = low[:, :4] | (low[:, 4:] >> 4) << 6
    return torch.cat([first, second, (scale[:, 4:] & 15) | (low[:, 4:] & 15) << 4], 1)


def pack_q2_k(c: Codes) -> torch.Tensor:
    """16 × (scale, min) nibbles | 64 bytes: 4 weights 32 apart in each | d | dmin."""
    return as_bytes(c.scale | c.offset << 4, interleave(c.entry, 2, 32, [0, 2, 4, 6]), c.d, c.dmin)


def pack_q3_k(c: Codes) -> torch.Tensor:
    """32 bytes of high bits | 64 bytes of low pairs | 16 scales of 6 bits (biased by 32) | d."""
    high = interleave(c.entry >> 2, 1, 32, list(range(8)))
    low = interleave(c.entry & 3, 2, 32, [0, 2, 4, 6])
    nibbles = (c.scale[:, :8] & 15) | (c.scale[:, 8:] & 15) << 4
    pairs = gather_bits((c.scale >> 4).view(-1, 4, 4).transpose(1, 2), [0, 2, 4, 6])
    return as_bytes(high, low, nibbles, pairs, c.d)


def pack_q4_k(c: Codes) -> torch.Tensor:
    """d | dmin | scales and mins | 128 bytes: 2 weights 32 apart in each."""
    return as_bytes(c.d, c.dmin, pack_scales_mins(c.scale, c.offset), interleave(c.entry, 4, 32, [0, 4]))


def pack_q5_k(c: Codes) -> torch.Tensor:
    """As Q4_K, with 32 bytes of fifth bits before the nibbles."""
    high, low = interleave(c.entry >> 4, 1, 32, list(range(8))), interleave(c.entry & 15, 4, 32, [0, 4])
    return as_bytes(c.d, c.dmin, pack_scales_mins(c.scale, c.offset), high, low)


def pack_q6_k(c: Codes) -> torch.Tensor:
    """128 bytes of low nibbles, 2 weights 64 apart | 64 bytes of high pairs, 4 weights 32 apart | 16 scales | d."""
    low, high = interleave(c.entry & 15, 2, 64, [0, 4]), interleave(c.entry >> 4, 2, 32, [0, 2, 4, 6])
    return as_bytes(low, high, c.scale ^ 128, c.d)  # scale code 0 is −128: two's complement


def pack_iq4_xs(c: Codes) -> torch.Tensor:
    """d | word of 8 high scale pairs | 4 bytes of low scale nibbles | 128 bytes: 2 weights 16 apart in each."""
    high = words(gather_bits(c.scale >> 4, [0, 2, 4, 6, 8, 10, 12, 14])[:, None], 2)
    low = gather_bits((c.scale & 15).view(-1, 4, 2), [0, 4])
    return as_bytes(c.d, high, low, interleave(c.entry, 8, 16, [0, 4]))


def formats() -> list[Format]:
    six_bits, signed = integers(0, 63), integers(-32, 31)
    values = tuple(float(v) for v in gguf.quants.IQ4_NL.kvalues)
    return [
        Format("Q2_K", 16, integers(0, 15), pack_q2_k, levels=integers(0, 3), n_mins=16),
        Format("Q3_K", 16, signed, pack_q3_k, levels=integers(-4, 3)),
        Format("Q4_K", 32, six_bits, pack_q4_k, levels=integers(0, 15), n_mins=64),
        Format("Q5_K", 32, six_bits, pack_q5_k, levels=integers(0, 31), n_mins=64),
        Format("Q6_K", 16, integers(-128, 127), pack_q6_k, levels=integers(-32, 31)),
        Format("IQ4_XS", 32, signed, pack_iq4_xs, levels=values),
    ]
