"""Rotary embedding: turning interleaved pairs, as DeepSeek and llama.cpp's `deepseek2` have them, or halves."""

from typing import NamedTuple

import torch


class Angles(NamedTuple):
    """What each position turns each pair by: cos and sin, float32 [..., qk_rope / 2]."""

    cos: torch.Tensor
    sin: torch.Tensor


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (x0, x1), (x2, x3), ... of the last dimension; cos and sin broadcast against [..., n / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def rotate_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate`, of pairs (x0, x_n/2), (x1, x_n/2+1), ...: what others call half-split or NEOX."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x.dtype)


def rotate_last(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As `rotate`, of the last numbers of the last dimension, as many as there are angles for; the others stay."""
    turning = 2 * cos.shape[-1]
    rest, last = x.split([x.shape[-1] - turning, turning], dim=-1)
    return torch.cat((rest, rotate(last, cos, sin)), dim=-1)


def unit_rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] over its root mean square, computed in float32, in the dtype of x."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)).to(x.dtype)
