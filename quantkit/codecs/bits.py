"""Bits of packed blocks with torch, on any device: put together for the packers, taken apart for the decoders."""

from collections.abc import Sequence

import torch


def as_bytes(*parts: torch.Tensor) -> torch.Tensor:
    """float16 [n], bytes, or integers below 256 [n, …] -> their little-endian bytes side by side, uint8 [n, k]."""
    out = []
    for part in parts:
        if part.dtype == torch.float16:
            part = part.contiguous().view(-1, 1).view(torch.uint8)
        elif part.dtype != torch.uint8:
            part = part.to(torch.uint8)
        out.append(part.reshape(len(part), -1))
    return torch.cat(out, 1)


def words(t: torch.Tensor, size: int) -> torch.Tensor:
    """int32 [n, …, k] -> the little-endian bytes of each as a word of 2 or 4: uint8 [n, …, k · size]."""
    return t.to(torch.int16 if size == 2 else torch.int32).contiguous().view(torch.uint8)


def gather_bits(fields: torch.Tensor, shifts: Sequence[int]) -> torch.Tensor:
    """[n, …, k] small integers, or-ed together at these bit positions -> int32 [n, …]."""
    at = torch.tensor(shifts, dtype=torch.int32, device=fields.device)
    return (fields.int() << at).sum(-1, dtype=torch.int32)


def split_bits(t: torch.Tensor, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """[n, k] -> the fields at these bit positions, side by side: [n, k · len(shifts)]."""
    at = torch.tensor(shifts, device=t.device)
    return ((t[..., None] >> at) & mask).flatten(1)


def interleave(entry: torch.Tensor, parts: int, stride: int, shifts: Sequence[int]) -> torch.Tensor:
    """Weights `stride` apart share a byte: [n, 256] -> [n, parts, stride] of bits at these positions."""
    return gather_bits(entry.view(-1, parts, len(shifts), stride).transpose(2, 3), shifts)


def separate(t: torch.Tensor, stride: int, shifts: Sequence[int], mask: int) -> torch.Tensor:
    """Bytes that hold weights `stride` apart: [n, k] -> [n, k · len(shifts)] in order of the weights."""
    at = torch.tensor(shifts, device=t.device)[:, None]
    return ((t.view(len(t), -1, 1, stride) >> at) & mask).flatten(1)


def spread(t: torch.Tensor, groups: int = 32) -> torch.Tensor:
    """[n, k] -> [n, groups], each repeated."""
    return t.repeat_interleave(groups // t.shape[1], dim=1)


def negative(signs: torch.Tensor) -> torch.Tensor:
    """Eight sign bits [n, groups] -> ±1 [n, groups, 8]."""
    return 1 - 2 * ((signs[..., None] >> torch.arange(8, device=signs.device)) & 1)


def even(signs: torch.Tensor) -> torch.Tensor:
    """The eighth sign bit makes the number of set ones even."""
    parity = signs ^ (signs >> 4)
    parity ^= parity >> 2
    return signs | ((parity ^ (parity >> 1)) & 1) << 7
