"""Rotary embedding with YaRN frequencies, on interleaved pairs as DeepSeek and llama.cpp's `deepseek2` have them."""

import math

import torch

from quantkit.models.config import ModelConfig, Yarn


def frequencies(config: ModelConfig) -> torch.Tensor:
    """Angle per position of each pair: float32 [qk_rope / 2]. YaRN (arXiv 2309.00071) as DeepSeek-V3 computes it."""
    half = config.qk_rope // 2
    extrapolated = config.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    if config.yarn is None:
        return extrapolated.float()
    low, high = _correction_range(config, config.yarn)
    ramp = ((torch.arange(half, dtype=torch.float64) - low) / max(0.001, high - low)).clamp(0, 1)
    return (extrapolated / config.yarn.factor * ramp + extrapolated * (1 - ramp)).float()


def _correction_range(config: ModelConfig, yarn: Yarn) -> tuple[int, int]:
    """Pairs that turn more than beta_fast times within the original context are kept, under beta_slow interpolated."""

    def pair(turns: float) -> float:
        return (
            config.qk_rope * math.log(yarn.original_context / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))
        )

    return max(math.floor(pair(yarn.beta_fast)), 0), min(math.ceil(pair(yarn.beta_slow)), config.qk_rope - 1)


def angles(config: ModelConfig, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, float32 [..., qk_rope / 2], for integer positions of any shape."""
    turns = positions.float().unsqueeze(-1) * frequencies(config).to(positions.device)
    return turns.cos(), turns.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn pairs (x0, x1), (x2, x3), ... of the last dimension; cos and sin broadcast against [..., n / 2]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)
