"""IQ2_XXS, IQ2_XS, IQ2_S: magnitudes 8, 25, 43 in entries of 8, signs beside them; 2.0625, 2.3125, 2.5625 bpw."""

import torch

from quantkit.codecs.codebooks import ggml_grid
from quantkit.codecs.format import Codes, Format, Rounding, as_bytes, gather_bits, words

HALVES = tuple((0.5 + code) * 0.25 for code in range(16))


def pack_iq2_xxs(c: Codes) -> torch.Tensor:
    """d | 8 × (4 entries of a byte; a word: 4 × 7 sign bits, 4 bits of scale). The 8th sign follows from parity."""
    signs = gather_bits((c.sign & 127).view(-1, 8, 4), [0, 7, 14, 21]) | c.scale << 28
    blocks = torch.cat([c.entry.to(torch.uint8).view(-1, 8, 4), words(signs, 4).view(-1, 8, 4)], 2)
    return as_bytes(c.d, blocks)


def pack_iq2_xs(c: Codes) -> torch.Tensor:
    """d | 32 words: 9 bits of entry, 7 sign bits | 16 nibbles of scale."""
    return as_bytes(c.d, words(c.entry | (c.sign & 127) << 9, 2), gather_bits(c.scale.view(-1, 8, 2), [0, 4]))


def pack_iq2_s(c: Codes) -> torch.Tensor:
    """d | 32 low bytes | 32 bytes of signs | 8 bytes: 4 × 2 high bits | 16 nibbles of scale."""
    high = gather_bits((c.entry >> 8).view(-1, 8, 4), [0, 2, 4, 6])
    return as_bytes(c.d, c.entry & 255, c.sign, high, gather_bits(c.scale.view(-1, 8, 2), [0, 4]))


def formats() -> list[Format]:
    wide, narrow = (Rounding((8.0, 25.5, 43.0), (0.0,), span) for span in (32, 16))
    return [
        Format("IQ2_XXS", 32, HALVES, pack_iq2_xxs, ggml_grid("IQ2_XXS"), signs="even", rounding=wide),
        Format("IQ2_XS", 16, HALVES, pack_iq2_xs, ggml_grid("IQ2_XS"), signs="even", rounding=narrow),
        Format("IQ2_S", 16, HALVES, pack_iq2_s, ggml_grid("IQ2_S"), signs="free", rounding=narrow),
    ]
