"""IQ2_XXS, IQ2_XS, IQ2_S: magnitudes 8, 25, 43 in entries of 8, signs beside them; 2.0625, 2.3125, 2.5625 bpw."""

import numpy as np
import torch

from quantkit.codecs.bits import as_bytes, even, gather_bits, negative, split_bits, spread, words
from quantkit.codecs.codebooks import entries, ggml_grid
from quantkit.codecs.codec import Codec, Groups, Parts
from quantkit.codecs.format import Codes, Format, Rounding

HALVES = tuple((0.5 + code) * 0.25 for code in range(16))
WIDE, NARROW = (Rounding((8.0, 25.5, 43.0), (0.0,), span) for span in (32, 16))

# qs: 8 × (4 entries of a byte; a word in two halves: 4 × 7 sign bits, 4 bits of scale). The 8th sign makes them even.
IQ2_XXS = np.dtype([("d", "<f2"), ("qs", "<u2", 32)])

# qs: 9 bits of entry, 7 sign bits. scales: 16 nibbles.
IQ2_XS = np.dtype([("d", "<f2"), ("qs", "<u2", 32), ("scales", "u1", 8)])

# qs: low bytes of the entries. signs: one bit each. qh: 4 × 2 high bits. scales: 16 nibbles.
IQ2_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("signs", "u1", 32), ("qh", "u1", 8), ("scales", "u1", 8)])


def pack_iq2_xxs(c: Codes) -> torch.Tensor:
    """Codes -> IQ2_XXS."""
    signs = gather_bits((c.sign & 127).view(-1, 8, 4), (0, 7, 14, 21)) | c.scale << 28
    blocks = torch.cat([c.entry.to(torch.uint8).view(-1, 8, 4), words(signs, 4).view(-1, 8, 4)], 2)
    return as_bytes(c.d, blocks)


def unpack_iq2_xxs(b: Parts) -> Groups:
    """IQ2_XXS -> weights."""
    q = b["qs"].view(-1, 4)
    word = q[:, 2:3] | q[:, 3:] << 16
    v = entries("IQ2_XXS", split_bits(q[:, :2], (0, 8), 255)) * negative(even(split_bits(word, range(0, 28, 7), 127)))
    scale = b["d"] * 0.25 * (0.5 + (word >> 28).view(-1, 8))
    return Groups(v.view(-1, 32, 8), spread(scale))


def pack_iq2_xs(c: Codes) -> torch.Tensor:
    """Codes -> IQ2_XS."""
    return as_bytes(c.d, words(c.entry | (c.sign & 127) << 9, 2), gather_bits(c.scale.view(-1, 8, 2), (0, 4)))


def unpack_iq2_xs(b: Parts) -> Groups:
    """IQ2_XS -> weights."""
    q = b["qs"]
    scale = b["d"] * 0.25 * (0.5 + split_bits(b["scales"], (0, 4), 15))
    return Groups(entries("IQ2_XS", q & 511) * negative(even(q >> 9)), spread(scale))


def pack_iq2_s(c: Codes) -> torch.Tensor:
    """Codes -> IQ2_S."""
    high = gather_bits((c.entry >> 8).view(-1, 8, 4), (0, 2, 4, 6))
    return as_bytes(c.d, c.entry & 255, c.sign, high, gather_bits(c.scale.view(-1, 8, 2), (0, 4)))


def unpack_iq2_s(b: Parts) -> Groups:
    """IQ2_S -> weights."""
    entry = b["qs"] | split_bits(b["qh"], range(0, 8, 2), 3) << 8
    scale = b["d"] * 0.25 * (0.5 + split_bits(b["scales"], (0, 4), 15))
    return Groups(entries("IQ2_S", entry) * negative(b["signs"]), spread(scale))


CODECS = (
    Codec(
        "IQ2_XXS",
        IQ2_XXS,
        unpack_iq2_xxs,
        codebook="IQ2_XXS",
        format=Format("IQ2_XXS", 32, HALVES, pack_iq2_xxs, lambda: ggml_grid("IQ2_XXS"), signs="even", rounding=WIDE),
        compiled=(torch.float32, torch.bfloat16),
    ),
    Codec(
        "IQ2_XS",
        IQ2_XS,
        unpack_iq2_xs,
        codebook="IQ2_XS",
        format=Format("IQ2_XS", 16, HALVES, pack_iq2_xs, lambda: ggml_grid("IQ2_XS"), signs="even", rounding=NARROW),
    ),
    Codec(
        "IQ2_S",
        IQ2_S,
        unpack_iq2_s,
        codebook="IQ2_S",
        format=Format("IQ2_S", 16, HALVES, pack_iq2_s, lambda: ggml_grid("IQ2_S"), signs="free", rounding=NARROW),
    ),
)
