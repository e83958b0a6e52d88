"""kv_b of multi-head latent attention in its two forms: one matrix, as the original has it, or absorbed into two."""

import torch

from quantkit.models.config import ModelConfig


def split_kv_b(kv_b: torch.Tensor, c: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """[n_head (qk_nope + v_head), kv_lora] -> k_b [n_head, kv_lora, qk_nope], v_b [n_head, v_head, kv_lora]."""
    k, v = kv_b.view(c.n_head, c.qk_nope + c.v_head, c.kv_lora).split([c.qk_nope, c.v_head], dim=1)
    return k.transpose(1, 2).contiguous(), v.contiguous()
