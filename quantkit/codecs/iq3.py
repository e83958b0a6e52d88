"""IQ3_XXS and IQ3_S: entries of 4 magnitudes, signs beside them; 3.0625 and 3.4375 bpw."""

import numpy as np
import torch

from quantkit.codecs.bits import as_bytes, even, gather_bits, negative, split_bits, spread, words
from quantkit.codecs.codebooks import entries, ggml_grid
from quantkit.codecs.codec import Codec, Groups, Parts
from quantkit.codecs.format import Codes, Format, Rounding

HALVES = tuple((0.5 + code) * 0.5 for code in range(16))
ODD = tuple(1.0 + 2 * code for code in range(16))
FOURS = Rounding(tuple(float(v) for v in range(4, 61, 8)), (0.0,), 32)
ODDS = Rounding(tuple(float(v) for v in range(1, 16, 2)), (0.0,), 32)

# qs: an entry a byte. signs: 4 × 7 sign bits, 4 bits of scale. The 8th sign makes them even.
IQ3_XXS = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("signs", "<u4", 8)])

# qs: low bytes of the entries. qh: their ninth bits. signs: one bit each. scales: 8 nibbles.
IQ3_S = np.dtype([("d", "<f2"), ("qs", "u1", 64), ("qh", "u1", 8), ("signs", "u1", 32), ("scales", "u1", 4)])


def pack_iq3_xxs(c: Codes) -> torch.Tensor:
    """Codes -> IQ3_XXS."""
    signs = gather_bits((c.sign & 127).view(-1, 8, 4), (0, 7, 14, 21)) | c.scale << 28
    return as_bytes(c.d, c.entry, words(signs, 4))


def unpack_iq3_xxs(b: Parts) -> Groups:
    """IQ3_XXS -> weights."""
    v, word = entries("IQ3_XXS", b["qs"]).view(-1, 32, 8), b["signs"]
    scale = b["d"] * 0.5 * (0.5 + (word >> 28))
    return Groups(v * negative(even(split_bits(word, range(0, 28, 7), 127))), spread(scale))


def pack_iq3_s(c: Codes) -> torch.Tensor:
    """Codes -> IQ3_S."""
    high = gather_bits((c.entry >> 8).view(-1, 8, 8), range(8))
    return as_bytes(c.d, c.entry & 255, high, c.sign, gather_bits(c.scale.view(-1, 4, 2), (0, 4)))


def unpack_iq3_s(b: Parts) -> Groups:
    """IQ3_S -> weights."""
    v = entries("IQ3_S", b["qs"] | split_bits(b["qh"], range(8), 1) << 8).view(-1, 32, 8)
    scale = b["d"] * (1 + 2 * split_bits(b["scales"], (0, 4), 15))
    return Groups(v * negative(b["signs"]), spread(scale))


CODECS = (
    Codec(
        "IQ3_XXS",
        IQ3_XXS,
        unpack_iq3_xxs,
        codebook="IQ3_XXS",
        format=Format("IQ3_XXS", 32, HALVES, pack_iq3_xxs, lambda: ggml_grid("IQ3_XXS"), signs="even", rounding=FOURS),
    ),
    Codec(
        "IQ3_S",
        IQ3_S,
        unpack_iq3_s,
        codebook="IQ3_S",
        format=Format("IQ3_S", 32, ODD, pack_iq3_s, lambda: ggml_grid("IQ3_S"), signs="free", rounding=ODDS),
    ),
)
