"""Types that only ggml encodes: floats, and blocks of 32 weights under one scale (Q8_0, Q4_0, Q5_0, IQ4_NL, MXFP4), or
a scale and a minimum (Q5_1)."""

import numpy as np
import torch

from quantkit.codecs.bits import separate, split_bits, spread
from quantkit.codecs.codebooks import entries
from quantkit.codecs.codec import Codec, Groups, Parts

F32 = np.dtype([("x", "<f4")])
F16 = np.dtype([("x", "<f2")])
BF16 = np.dtype([("x", "<u2")])  # the upper half of a float32
Q8_0 = np.dtype([("d", "<f2"), ("qs", "i1", 32)])
Q4_0 = np.dtype([("d", "<f2"), ("qs", "u1", 16)])  # 2 weights 16 apart in each, biased by 8
Q5_0 = np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])  # likewise, their fifth bits in qh, biased by 16
Q5_1 = np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)])  # likewise, above a minimum
IQ4_NL = np.dtype([("d", "<f2"), ("qs", "u1", 16)])  # likewise, codes of 16 levels
MXFP4 = np.dtype([("e", "u1"), ("qs", "u1", 16)])  # likewise, codes of E2M1 doubled under 2^(e - 128)
GROUPS = 4  # of 8 weights in a block


def unpack_q8_0(b: Parts) -> Groups:
    """Q8_0 -> weights."""
    return Groups(b["qs"].view(-1, GROUPS, 8), spread(b["d"], GROUPS))


def unpack_q4_0(b: Parts) -> Groups:
    """Q4_0 -> weights."""
    return Groups(separate(b["qs"], 16, (0, 4), 15).view(-1, GROUPS, 8) - 8, spread(b["d"], GROUPS))


def _five_bits(b: Parts) -> torch.Tensor:
    """[n, GROUPS, 8]: the nibbles under their fifth bits, one for each weight in order."""
    low = separate(b["qs"], 16, (0, 4), 15).view(-1, GROUPS, 8)
    return low | (split_bits(b["qh"], range(8), 1).view(-1, GROUPS, 8) << 4)


def unpack_q5_0(b: Parts) -> Groups:
    """Q5_0 -> weights."""
    return Groups(_five_bits(b) - 16, spread(b["d"], GROUPS))


def unpack_q5_1(b: Parts) -> Groups:
    """Q5_1 -> weights."""
    return Groups(_five_bits(b), spread(b["d"], GROUPS), spread(b["m"], GROUPS))


def unpack_iq4_nl(b: Parts) -> Groups:
    """IQ4_NL -> weights."""
    v = entries("IQ4_NL", separate(b["qs"], 16, (0, 4), 15))
    return Groups(v.view(-1, GROUPS, 8), spread(b["d"], GROUPS))


def unpack_mxfp4(b: Parts) -> Groups:
    """MXFP4 (OCP Microscaling, E2M1 under E8M0) -> weights. The two smallest scales are denormal (ggml-impl.h)."""
    e = b["e"].to(torch.int32)
    bits = torch.where(e < 2, 0x00200000 << e.clamp(max=1), (e - 1) << 23)
    v = entries("MXFP4", separate(b["qs"], 16, (0, 4), 15))
    return Groups(v.view(-1, GROUPS, 8), spread(bits.view(torch.float32), GROUPS))


CODECS = (
    Codec("F32", F32),
    Codec("F16", F16),
    Codec("BF16", BF16),
    Codec("Q8_0", Q8_0, unpack_q8_0),
    Codec("Q4_0", Q4_0, unpack_q4_0),
    Codec("Q5_0", Q5_0, unpack_q5_0),
    Codec("Q5_1", Q5_1, unpack_q5_1),
    Codec("IQ4_NL", IQ4_NL, unpack_iq4_nl, codebook="IQ4_NL"),
    Codec("MXFP4", MXFP4, unpack_mxfp4, codebook="MXFP4"),
)
