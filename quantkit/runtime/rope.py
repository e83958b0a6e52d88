"""By what rotary embedding turns at each position: YaRN frequencies."""

import math
from dataclasses import replace

import torch

from quantkit.models.config import ModelConfig, Yarn
from quantkit.runtime.rotation import Angles


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


def turning(config: ModelConfig, compresses: bool) -> ModelConfig:
    """The numbers that a layer's rotary embedding has: YaRN and another θ where it compresses, neither elsewhere."""
    assert config.compression
    if not compresses:
        return replace(config, yarn=None)
    return replace(config, rope_base=config.compression.rope_base)


class KnownAngles:
    """Angles of positions from 0 on, of all layers that compress or of all others, as far as they were asked for."""

    def __init__(self, config: ModelConfig, compresses: bool, device: torch.device):
        self.config, self.device = turning(config, compresses), device
        self.known = angles(self.config, torch.arange(0, device=device))

    def upto(self, n: int) -> Angles:
        """Of at least n positions."""
        if n > len(self.known.cos):
            self.known = angles(self.config, torch.arange(2 * n, device=self.device))
        return self.known


def angles(config: ModelConfig, positions: torch.Tensor) -> Angles:
    """For integer positions of any shape [...]."""
    turns = positions.float().unsqueeze(-1) * frequencies(config).to(positions.device)
    return Angles(turns.cos(), turns.sin())
