"""IQ1_S and IQ1_M: 2048 ternary entries of 8 weights, shifted by ±1/8 of the scale; 1.5625 and 1.75 bpw."""

import numpy as np
import torch

from quantkit.codecs.bits import as_bytes, gather_bits, split_bits, spread, words
from quantkit.codecs.codebooks import entries, ggml_grid
from quantkit.codecs.codec import Codec, Groups, Parts
from quantkit.codecs.format import Codes, Format, Rounding, scaled

ODD = tuple(2.0 * code + 1 for code in range(8))
SHIFTS = (0.125, -0.125)
TERNARY = (-1.0, 0.0, 1.0)
D_SHIFTS = (12, 8, 4, 0)  # word i of IQ1_M's scales holds bits 4 i .. 4 i + 3 of d in its upper nibble

# qs: low bytes of the entries. qh: 4 × 3 high bits, 3 bits of scale, sign of the shift.
IQ1_S = np.dtype([("d", "<f2"), ("qs", "u1", 32), ("qh", "<u2", 8)])

# qs: low bytes. qh: per entry 3 high bits and the sign of its shift. scales: 4 scales of 3 bits and a nibble of d.
IQ1_M = np.dtype([("qs", "u1", 32), ("qh", "u1", 16), ("scales", "<u2", 4)])


def pack_iq1_s(c: Codes) -> torch.Tensor:
    """Codes -> IQ1_S."""
    qh = gather_bits((c.entry >> 8).view(-1, 8, 4), (0, 3, 6, 9)) | c.scale << 12 | c.offset << 15
    return as_bytes(c.d, c.entry & 255, words(qh, 2))


def unpack_iq1_s(b: Parts) -> Groups:
    """IQ1_S -> weights."""
    high = b["qh"]
    entry = b["qs"] | split_bits(high, range(0, 12, 3), 7) << 8
    scale = spread(b["d"] * (2 * (high >> 12 & 7) + 1))
    return Groups(entries("IQ1_S", entry), scale, scale * spread(0.125 - 0.25 * (high >> 15)))


def pack_iq1_m(c: Codes) -> torch.Tensor:
    """Codes -> IQ1_M."""
    qh = gather_bits((c.entry >> 8).view(-1, 16, 2), (0, 4))  # entry is 12 bits: 11 of the grid, then the shift
    d = c.d.view(torch.int16).int()[:, None] >> torch.tensor([0, 4, 8, 12], device=c.d.device, dtype=torch.int32)
    scales = gather_bits(c.scale.view(-1, 4, 4), (0, 3, 6, 9)) | (d & 15) << 12
    return as_bytes(c.entry & 255, qh, words(scales, 2))


def unpack_iq1_m(b: Parts) -> Groups:
    """IQ1_M -> weights."""
    nibbles = b["scales"] >> 12
    bits = (nibbles << torch.arange(0, 16, 4, device=nibbles.device)).sum(-1)
    d = bits.to(torch.int16).view(torch.float16).float()[:, None]
    high = split_bits(b["qh"], (0, 4), 15)
    scale = spread(d * (2 * split_bits(b["scales"], range(0, 12, 3), 7) + 1))
    return Groups(entries("IQ1_S", b["qs"] | (high & 7) << 8), scale, scale * (0.125 - 0.25 * (high >> 3)))


def rescale_iq1_m(blocks: np.ndarray, by: np.ndarray) -> None:
    """Multiply d, which is spread over the words of scales."""
    scales, shifts = blocks["scales"].astype(np.uint32), np.array(D_SHIFTS, np.uint32)
    d = ((scales & 0xF000) >> shifts).sum(1).astype("<u2").view(np.float16)
    new = scaled(d, by).view("<u2").astype(np.uint32)
    blocks["scales"] = (scales & 0x0FFF) | ((new[:, None] << shifts) & 0xF000)


def _both() -> np.ndarray:
    """IQ1_M chooses the shift with each entry: the grid moved up, then down."""
    return np.concatenate([ggml_grid("IQ1_S") + 0.125, ggml_grid("IQ1_S") - 0.125])


CODECS = (
    Codec(
        "IQ1_S",
        IQ1_S,
        unpack_iq1_s,
        codebook="IQ1_S",
        format=Format(
            "IQ1_S",
            32,
            ODD,
            pack_iq1_s,
            lambda: ggml_grid("IQ1_S"),
            shifts=SHIFTS,
            rounding=Rounding(TERNARY, SHIFTS, 32),
            needs_hessian=True,
        ),
        compiled=(torch.float32, torch.bfloat16),
    ),
    Codec(
        "IQ1_M",
        IQ1_M,
        unpack_iq1_m,
        codebook="IQ1_S",
        format=Format("IQ1_M", 16, ODD, pack_iq1_m, _both, rounding=Rounding(TERNARY, SHIFTS, 8), needs_hessian=True),
        rescale=rescale_iq1_m,
    ),
)
