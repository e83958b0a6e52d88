"""The activation of every feed-forward."""

import torch
import torch.nn.functional as F


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float | None) -> torch.Tensor:
    """silu(gate) · up, of the same shape. limit: gate is at most this, up between it and its negative (DeepSeek-V4);
    None: nothing is cut off."""
    if limit is None:
        return F.silu(gate) * up
    return F.silu(gate.clamp(max=limit)) * up.clamp(min=-limit, max=limit)
