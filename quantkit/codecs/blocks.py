"""Blocks of ggml's types taken apart with torch: any device, all rows at once.

Every type here is groups of 8 neighbouring weights `scale · v + offset` with v in int8. The Triton kernels
(`kernels.py`) compute from the same three; these are their plain twins. Layouts: ggml-common.h.
"""

from collections.abc import Callable
from functools import cache

import gguf
import torch

from quantkit.codecs.codebooks import ggml_grid

Fields = tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]
"""v float32 [n, groups, 8], scale float32 [n, groups], offset [n, groups] or 0."""


@cache
def grid(qtype: str, device: torch.device) -> torch.Tensor:
    """A codebook, int8 [entries, width]; of the types without one: their 16 levels, or one unused byte."""
    if qtype in ("IQ1_M", "IQ1_S"):
        values = ggml_grid("IQ1_S")
    elif qtype.startswith(("IQ2", "IQ3")):
        values = ggml_grid(qtype)
    elif qtype.startswith("IQ4"):
        values = gguf.quants.IQ4_NL.kvalues
    else:
        values = [0]
    return torch.tensor(values, dtype=torch.int8, device=device)


def _half(b: torch.Tensor, at: int) -> torch.Tensor:
    return b[:, at : at + 2].contiguous().view(torch.float16).float()


def _words(b: torch.Tensor, at: int, n: int, size: int = 2) -> torch.Tensor:
    """n little-endian words of 2 or 4 bytes, int64 [len(b), n]."""
    parts = b[:, at : at + n * size].reshape(len(b), n, size).long()
    return (parts << torch.arange(0, 8 * size, 8, device=b.device)).sum(-1)


def _bits(t: torch.Tensor, shifts: range, mask: int) -> torch.Tensor:
    """[n, k] -> the fields at these bit positions, side by side: int64 [n, k · len(shifts)]."""
    at = torch.tensor(list(shifts), device=t.device)
    return ((t.long()[..., None] >> at) & mask).flatten(1)


def _strided(t: torch.Tensor, stride: int, shifts: range, mask: int) -> torch.Tensor:
    """Bytes that hold weights `stride` apart: [n, k] -> int64 [n, k · len(shifts)] in order of the weights."""
    at = torch.tensor(list(shifts), device=t.device)[:, None]
    return ((t.long().view(len(t), -1, 1, stride) >> at) & mask).flatten(1)


def _spread(t: torch.Tensor, groups: int = 32) -> torch.Tensor:
    """[n, k] -> [n, groups], each repeated."""
    return t.repeat_interleave(groups // t.shape[1], dim=1)


def _negative(signs: torch.Tensor) -> torch.Tensor:
    """Eight sign bits [n, groups] -> ±1 [n, groups, 8]."""
    return 1 - 2 * ((signs[..., None] >> torch.arange(8, device=signs.device)) & 1)


def _even(signs: torch.Tensor) -> torch.Tensor:
    """The eighth sign bit makes the number of set ones even."""
    parity = signs ^ (signs >> 4)
    parity ^= parity >> 2
    return signs | ((parity ^ (parity >> 1)) & 1) << 7


def _iq1_s(b: torch.Tensor) -> Fields:
    high = _words(b, 34, 8)
    entry = b[:, 2:34].long() | _bits(high, range(0, 12, 3), 7) << 8
    scale = _spread(_half(b, 0) * (2 * (high >> 12 & 7) + 1))
    return grid("IQ1_S", b.device)[entry], scale, scale * _spread(0.125 - 0.25 * (high >> 15))


def _iq1_m(b: torch.Tensor) -> Fields:
    words = _words(b, 48, 4)
    bits = sum((words[:, i] >> 12) << 4 * i for i in range(4))
    d = bits.to(torch.int16).view(torch.float16).float()[:, None]
    high = _bits(b[:, 32:48], range(0, 8, 4), 15)
    scale = _spread(d * (2 * _bits(words, range(0, 12, 3), 7) + 1))
    entry = b[:, :32].long() | (high & 7) << 8
    return grid("IQ1_M", b.device)[entry], scale, scale * (0.125 - 0.25 * (high >> 3))


def _iq2_xxs(b: torch.Tensor) -> Fields:
    blocks = b[:, 2:].reshape(-1, 8)
    word = _words(blocks, 4, 1, 4)
    v = grid("IQ2_XXS", b.device)[blocks[:, :4].long()] * _negative(_even(_bits(word, range(0, 28, 7), 127)))
    scale = _half(b, 0) * 0.25 * (0.5 + (word >> 28).view(-1, 8))
    return v.view(-1, 32, 8), _spread(scale), 0.0


def _iq2_xs(b: torch.Tensor) -> Fields:
    word = _words(b, 2, 32)
    scale = _half(b, 0) * 0.25 * (0.5 + _bits(b[:, 66:], range(0, 8, 4), 15))
    return grid("IQ2_XS", b.device)[word & 511] * _negative(_even(word >> 9)), _spread(scale), 0.0


def _iq2_s(b: torch.Tensor) -> Fields:
    entry = b[:, 2:34].long() | _bits(b[:, 66:74], range(0, 8, 2), 3) << 8
    scale = _half(b, 0) * 0.25 * (0.5 + _bits(b[:, 74:], range(0, 8, 4), 15))
    return grid("IQ2_S", b.device)[entry] * _negative(b[:, 34:66].long()), _spread(scale), 0.0


def _iq3_xxs(b: torch.Tensor) -> Fields:
    word = _words(b, 66, 8, 4)
    v = grid("IQ3_XXS", b.device)[b[:, 2:66].long()].view(-1, 32, 8)
    scale = _half(b, 0) * 0.5 * (0.5 + (word >> 28))
    return v * _negative(_even(_bits(word, range(0, 28, 7), 127))), _spread(scale), 0.0


def _iq3_s(b: torch.Tensor) -> Fields:
    entry = b[:, 2:66].long() | _bits(b[:, 66:74], range(8), 1) << 8
    scale = _half(b, 0) * (1 + 2 * _bits(b[:, 106:], range(0, 8, 4), 15))
    v = grid("IQ3_S", b.device)[entry].view(-1, 32, 8)
    return v * _negative(b[:, 74:106].long()), _spread(scale), 0.0


def _q2_k(b: torch.Tensor) -> Fields:
    v = _strided(b[:, 16:80], 32, range(0, 8, 2), 3)
    code = b[:, :16].long()
    return v.view(-1, 32, 8), _spread(_half(b, 80) * (code & 15)), _spread(-_half(b, 82) * (code >> 4))


def _q3_k(b: torch.Tensor) -> Fields:
    v = _strided(b[:, 32:96], 32, range(0, 8, 2), 3) + 4 * _strided(b[:, :32], 32, range(8), 1) - 4
    low = _strided(b[:, 96:104], 8, range(0, 8, 4), 15)
    code = low + 16 * _strided(b[:, 104:108], 4, range(0, 8, 2), 3) - 32
    return v.view(-1, 32, 8), _spread(_half(b, 108) * code), 0.0


def _scale_min(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """12 bytes of Q4_K and Q5_K -> 8 scales and 8 mins of 6 bits."""
    q = q.long()
    first, second, rest = q[:, :4], q[:, 4:8], q[:, 8:]
    scale = torch.cat((first & 63, (rest & 15) | first >> 6 << 4), 1)
    return scale, torch.cat((second & 63, rest >> 4 | second >> 6 << 4), 1)


def _q4_k(b: torch.Tensor) -> Fields:
    scale, low = _scale_min(b[:, 4:16])
    v = _strided(b[:, 16:], 32, range(0, 8, 4), 15)
    return v.view(-1, 32, 8), _spread(_half(b, 0) * scale), _spread(-_half(b, 2) * low)


def _q5_k(b: torch.Tensor) -> Fields:
    scale, low = _scale_min(b[:, 4:16])
    v = _strided(b[:, 48:], 32, range(0, 8, 4), 15) + 16 * _strided(b[:, 16:48], 32, range(8), 1)
    return v.view(-1, 32, 8), _spread(_half(b, 0) * scale), _spread(-_half(b, 2) * low)


def _q6_k(b: torch.Tensor) -> Fields:
    v = _strided(b[:, :128], 64, range(0, 8, 4), 15) + 16 * _strided(b[:, 128:192], 32, range(0, 8, 2), 3) - 32
    scale = _half(b, 208) * b[:, 192:208].contiguous().view(torch.int8)
    return v.view(-1, 32, 8), _spread(scale), 0.0


def _q8_0(b: torch.Tensor) -> Fields:
    return b[:, 2:].contiguous().view(torch.int8).view(-1, 4, 8), _spread(_half(b, 0), 4), 0.0


def _q4_0(b: torch.Tensor) -> Fields:
    return _strided(b[:, 2:], 16, range(0, 8, 4), 15).view(-1, 4, 8) - 8, _spread(_half(b, 0), 4), 0.0


def _iq4_nl(b: torch.Tensor) -> Fields:
    v = grid("IQ4_NL", b.device)[_strided(b[:, 2:], 16, range(0, 8, 4), 15)]
    return v.view(-1, 4, 8), _spread(_half(b, 0), 4), 0.0


def _iq4_xs(b: torch.Tensor) -> Fields:
    code = _bits(b[:, 4:8], range(0, 8, 4), 15) + 16 * _bits(_words(b, 2, 1), range(0, 16, 2), 3) - 32
    v = grid("IQ4_XS", b.device)[_strided(b[:, 8:], 16, range(0, 8, 4), 15)]
    return v.view(-1, 32, 8), _spread(_half(b, 0) * code), 0.0


TYPES: dict[str, Callable[[torch.Tensor], Fields]] = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
    "IQ4_XS": _iq4_xs,
    "IQ4_NL": _iq4_nl,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
}


def dequantize(qtype: str, data: torch.Tensor) -> torch.Tensor:
    """uint8 [..., row_bytes] -> float32 [..., n_in], of a type in TYPES."""
    size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[qtype]][1]
    v, scale, offset = TYPES[qtype](data.reshape(-1, size))
    if isinstance(offset, torch.Tensor):
        offset = offset[..., None]
    return (v * scale[..., None] + offset).view(*data.shape[:-1], -1)
