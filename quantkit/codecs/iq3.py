"""IQ3_XXS and IQ3_S: entries of 4 magnitudes, signs beside them; 3.0625 and 3.4375 bpw."""

import torch

from quantkit.codecs.codebooks import ggml_grid
from quantkit.codecs.format import Codes, Format, Rounding, as_bytes, gather_bits, words


def pack_iq3_xxs(c: Codes) -> torch.Tensor:
    """d | 64 entries of a byte | 8 words: 4 × 7 sign bits, 4 bits of scale."""
    signs = gather_bits((c.sign & 127).view(-1, 8, 4), [0, 7, 14, 21]) | c.scale << 28
    return as_bytes(c.d, c.entry, words(signs, 4))


def pack_iq3_s(c: Codes) -> torch.Tensor:
    """d | 64 low bytes | 8 bytes of ninth bits | 32 bytes of signs | 8 nibbles of scale."""
    high = gather_bits((c.entry >> 8).view(-1, 8, 8), list(range(8)))
    return as_bytes(c.d, c.entry & 255, high, c.sign, gather_bits(c.scale.view(-1, 4, 2), [0, 4]))


def formats() -> list[Format]:
    halves = tuple((0.5 + code) * 0.5 for code in range(16))
    odd = tuple(1.0 + 2 * code for code in range(16))
    fours = Rounding(tuple(float(v) for v in range(4, 61, 8)), (0.0,), 32)
    odds = Rounding(tuple(float(v) for v in range(1, 16, 2)), (0.0,), 32)
    return [
        Format("IQ3_XXS", 32, halves, pack_iq3_xxs, ggml_grid("IQ3_XXS"), signs="even", rounding=fours),
        Format("IQ3_S", 32, odd, pack_iq3_s, ggml_grid("IQ3_S"), signs="free", rounding=odds),
    ]
