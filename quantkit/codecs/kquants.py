"""Q2_K … Q6_K and IQ4_XS: each weight rounded alone, under a scale (and a min) of 16 or 32 weights."""

import numpy as np
import torch

from quantkit.codecs.bits import as_bytes, gather_bits, interleave, separate, split_bits, spread, words
from quantkit.codecs.codebooks import IQ4_LEVELS, entries
from quantkit.codecs.codec import Codec, Groups, Parts
from quantkit.codecs.format import Codes, Format

# scales: 16 × (scale, min) nibbles. qs: 4 weights 32 apart in each.
Q2_K = np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")])

# hmask: high bits, 8 weights 32 apart in each. qs: low pairs, 4 weights 32 apart. scales: 16 of 6 bits, biased by 32:
# 8 bytes of low nibbles, 8 apart, and 4 of high pairs, 4 apart.
Q3_K = np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")])

# scales: 8 scales and 8 mins of 6 bits. qs: 2 weights 32 apart in each.
Q4_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)])

# As Q4_K; qh: the fifth bits, 8 weights 32 apart in each.
Q5_K = np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)])

# ql: low nibbles, 2 weights 64 apart in each. qh: high pairs, 4 weights 32 apart. Both biased by 32.
Q6_K = np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")])

# scales_h, scales_l: 8 high pairs, 8 low nibbles, biased by 32. qs: 2 weights 16 apart in each.
IQ4_XS = np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)])

NIBBLES, PAIRS = (0, 4), (0, 2, 4, 6)


def integers(low: int, high: int) -> tuple[float, ...]:
    """low … high, both included."""
    return tuple(float(v) for v in range(low, high + 1))


def pack_q2_k(c: Codes) -> torch.Tensor:
    """Codes -> Q2_K."""
    return as_bytes(c.scale | c.offset << 4, interleave(c.entry, 2, 32, PAIRS), c.d, c.dmin)


def unpack_q2_k(b: Parts) -> Groups:
    """Q2_K -> weights."""
    v, code = separate(b["qs"], 32, PAIRS, 3), b["scales"]
    return Groups(v.view(-1, 32, 8), spread(b["d"] * (code & 15)), spread(-b["dmin"] * (code >> 4)))


def pack_q3_k(c: Codes) -> torch.Tensor:
    """Codes -> Q3_K."""
    high, low = interleave(c.entry >> 2, 1, 32, range(8)), interleave(c.entry & 3, 2, 32, PAIRS)
    nibbles = (c.scale[:, :8] & 15) | (c.scale[:, 8:] & 15) << 4
    pairs = gather_bits((c.scale >> 4).view(-1, 4, 4).transpose(1, 2), PAIRS)
    return as_bytes(high, low, nibbles, pairs, c.d)


def unpack_q3_k(b: Parts) -> Groups:
    """Q3_K -> weights."""
    v = separate(b["qs"], 32, PAIRS, 3) + 4 * separate(b["hmask"], 32, range(8), 1) - 4
    low, high = separate(b["scales"][:, :8], 8, NIBBLES, 15), separate(b["scales"][:, 8:], 4, PAIRS, 3)
    return Groups(v.view(-1, 32, 8), spread(b["d"] * (low + 16 * high - 32)))


def pack_scales_mins(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """8 scales and 8 mins of 6 bits -> 12 bytes (gguf.quants.Q4_K.get_scale_min reads them)."""
    first = scale[:, :4] | (scale[:, 4:] >> 4) << 6
    second = low[:, :4] | (low[:, 4:] >> 4) << 6
    return torch.cat([first, second, (scale[:, 4:] & 15) | (low[:, 4:] & 15) << 4], 1)


def unpack_scales_mins(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes of Q4_K and Q5_K -> 8 scales and 8 mins of 6 bits."""
    first, second, rest = q[:, :4], q[:, 4:8], q[:, 8:]
    scale = torch.cat((first & 63, (rest & 15) | first >> 6 << 4), 1)
    return scale, torch.cat((second & 63, rest >> 4 | second >> 6 << 4), 1)


def pack_q4_k(c: Codes) -> torch.Tensor:
    """Codes -> Q4_K."""
    return as_bytes(c.d, c.dmin, pack_scales_mins(c.scale, c.offset), interleave(c.entry, 4, 32, NIBBLES))


def unpack_q4_k(b: Parts) -> Groups:
    """Q4_K -> weights."""
    scale, low = unpack_scales_mins(b["scales"])
    v = separate(b["qs"], 32, NIBBLES, 15)
    return Groups(v.view(-1, 32, 8), spread(b["d"] * scale), spread(-b["dmin"] * low))


def pack_q5_k(c: Codes) -> torch.Tensor:
    """Codes -> Q5_K."""
    high, low = interleave(c.entry >> 4, 1, 32, range(8)), interleave(c.entry & 15, 4, 32, NIBBLES)
    return as_bytes(c.d, c.dmin, pack_scales_mins(c.scale, c.offset), high, low)


def unpack_q5_k(b: Parts) -> Groups:
    """Q5_K -> weights."""
    scale, low = unpack_scales_mins(b["scales"])
    v = separate(b["qs"], 32, NIBBLES, 15) + 16 * separate(b["qh"], 32, range(8), 1)
    return Groups(v.view(-1, 32, 8), spread(b["d"] * scale), spread(-b["dmin"] * low))


def pack_q6_k(c: Codes) -> torch.Tensor:
    """Codes -> Q6_K."""
    low, high = interleave(c.entry & 15, 2, 64, NIBBLES), interleave(c.entry >> 4, 2, 32, PAIRS)
    return as_bytes(low, high, c.scale ^ 128, c.d)  # scale code 0 is −128: two's complement


def unpack_q6_k(b: Parts) -> Groups:
    """Q6_K -> weights."""
    v = separate(b["ql"], 64, NIBBLES, 15) + 16 * separate(b["qh"], 32, PAIRS, 3) - 32
    return Groups(v.view(-1, 32, 8), spread(b["d"] * b["scales"]))


def pack_iq4_xs(c: Codes) -> torch.Tensor:
    """Codes -> IQ4_XS."""
    high = words(gather_bits(c.scale >> 4, range(0, 16, 2))[:, None], 2)
    low = gather_bits((c.scale & 15).view(-1, 4, 2), NIBBLES)
    return as_bytes(c.d, high, low, interleave(c.entry, 8, 16, NIBBLES))


def unpack_iq4_xs(b: Parts) -> Groups:
    """IQ4_XS -> weights."""
    code = split_bits(b["scales_l"], NIBBLES, 15) + 16 * split_bits(b["scales_h"], range(0, 16, 2), 3) - 32
    v = entries("IQ4_NL", separate(b["qs"], 16, NIBBLES, 15))
    return Groups(v.view(-1, 32, 8), spread(b["d"] * code))


SIX_BITS, SIGNED = integers(0, 63), integers(-32, 31)
BOTH, HALF = (torch.float32, torch.bfloat16), (torch.bfloat16,)
IQ4 = tuple(float(v) for v in IQ4_LEVELS)
CODECS = (
    Codec(
        "Q2_K",
        Q2_K,
        unpack_q2_k,
        format=Format("Q2_K", 16, integers(0, 15), pack_q2_k, levels=integers(0, 3), n_mins=16),
    ),
    Codec("Q3_K", Q3_K, unpack_q3_k, format=Format("Q3_K", 16, SIGNED, pack_q3_k, levels=integers(-4, 3))),
    Codec(
        "Q4_K",
        Q4_K,
        unpack_q4_k,
        format=Format("Q4_K", 32, SIX_BITS, pack_q4_k, levels=integers(0, 15), n_mins=64),
        compiled=HALF,
    ),
    Codec(
        "Q5_K",
        Q5_K,
        unpack_q5_k,
        format=Format("Q5_K", 32, SIX_BITS, pack_q5_k, levels=integers(0, 31), n_mins=64),
        compiled=HALF,
    ),
    Codec(
        "Q6_K",
        Q6_K,
        unpack_q6_k,
        format=Format("Q6_K", 16, integers(-128, 127), pack_q6_k, levels=SIGNED),
        compiled=BOTH,
    ),
    Codec(
        "IQ4_XS",
        IQ4_XS,
        unpack_iq4_xs,
        codebook="IQ4_NL",
        format=Format("IQ4_XS", 32, SIGNED, pack_iq4_xs, levels=IQ4),
    ),
)
