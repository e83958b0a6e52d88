"""Second moments of what a matrix multiplies, added up while text streams through: what error feedback needs."""

import torch

from quantkit.encoding.hessian import Hessian, gram

# Experts encoded together on a GPU: share of its memory, and their moments and factors and copies of them.
GROUP_SHARE, FACTOR_COPIES = 0.35, 6
SAME_INPUT = {  # roles that multiply the same rows share one moment
    "attn_kv_a_mqa": "attn_q_a",
    "attn_kv": "attn_q_a",
    "attn_compressor_kv": "attn_q_a",
    "attn_compressor_gate": "attn_q_a",
    "indexer_compressor_kv": "attn_q_a",
    "indexer_compressor_gate": "attn_q_a",
    "attn_q": "attn_q_a",
    "ffn_up": "ffn_gate",
    "ffn_up_shexp": "ffn_gate_shexp",
}


class Moments:
    """Running weighted second moments of one input: float32 [n_in, n_in], or [n_head, n_in, n_in]."""

    def __init__(self) -> None:
        self.matrix: torch.Tensor | None = None
        self.total = self.squares = 0.0

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """x [n, n_in] or [n, n_head, n_in], weight float32 [n]."""
        scaled = x.float() * weight.sqrt().view(-1, *[1] * (x.ndim - 1))
        product = gram(scaled)
        self.matrix = product if self.matrix is None else self.matrix.add_(product)
        self.total += float(weight.sum())
        self.squares += float(weight.double().square().sum())

    def hessians(self) -> list[Hessian]:
        """One per matrix."""
        if self.matrix is None or not self.total > 0:
            return [Hessian()]
        mean = self.matrix / self.total
        tokens = self.total**2 / self.squares
        each = mean if mean.ndim == 3 else mean[None]
        return [Hessian(matrix, matrix.diagonal().clone(), tokens) for matrix in each]
