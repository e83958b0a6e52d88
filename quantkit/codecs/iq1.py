"""IQ1_S and IQ1_M: 2048 ternary entries of 8 weights, shifted by ±1/8 of the scale; 1.5625 and 1.75 bpw."""

import numpy as np
import torch

from quantkit.codecs.codebooks import ggml_grid
from quantkit.codecs.format import Codes, Format, Rounding, as_bytes, gather_bits, words

ODD = tuple(2.0 * code + 1 for code in range(8))
SHIFTS = (0.125, -0.125)


def pack_iq1_s(c: Codes) -> torch.Tensor:
    """d | 32 low bytes of the entries | 8 words: 4 × 3 high bits, 3 bits of scale, sign of the shift."""
    qh = gather_bits((c.entry >> 8).view(-1, 8, 4), [0, 3, 6, 9]) | c.scale << 12 | c.offset << 15
    return as_bytes(c.d, c.entry & 255, words(qh, 2))


def pack_iq1_m(c: Codes) -> torch.Tensor:
    """32 low bytes | 16 bytes: per entry 3 high bits and its shift | 4 words: 4 scales of 3 bits and a nibble of d."""
    qh = gather_bits((c.entry >> 8).view(-1, 16, 2), [0, 4])  # entry is 12 bits: 11 of the grid, then the shift
    d = c.d.view(torch.int16).int()[:, None] >> torch.tensor([0, 4, 8, 12], device=c.d.device, dtype=torch.int32)
    scales = gather_bits(c.scale.view(-1, 4, 4), [0, 3, 6, 9]) | (d & 15) << 12
    return as_bytes(c.entry & 255, qh, words(scales, 2))


def formats() -> list[Format]:
    grid = ggml_grid("IQ1_S")
    both = np.concatenate([grid + 0.125, grid - 0.125])
    by_block, by_entry = (Rounding((-1.0, 0.0, 1.0), SHIFTS, span) for span in (32, 8))
    return [
        Format("IQ1_S", 32, ODD, pack_iq1_s, grid, shifts=SHIFTS, rounding=by_block, needs_hessian=True),
        Format("IQ1_M", 16, ODD, pack_iq1_m, both, rounding=by_entry, needs_hessian=True),
    ]
