"""Watching a layer being computed: whoever wants to know what its matrices multiply is passed along as an argument."""

from dataclasses import dataclass

import torch

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [n_ff, d], up [n_ff, d], down [d, n_ff] of one expert."""


@dataclass
class ExpertVisit:
    """What one expert saw: tokens int64 [m], x [m, d], hidden [m, n_ff] (input of down), routing weight float32 [m],
    and its matrices, which are gone after the visit."""

    expert: int
    tokens: torch.Tensor
    x: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    matrices: Projections


class Watcher:
    """Is told of every matrix of a layer what it multiplies, once a tile of tokens. This one looks at nothing."""

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """A matrix that is not routed. role: `attn_q_a`. x: its input [n, n_in] (or [n, n_head, n_in]). weight: of each
        token, float32 [n]: 1 / mean square of its residual stream, by which an error there is divided before it
        reaches the logits."""

    def observe_expert(self, visit: ExpertVisit) -> None:
        """An expert with all its tokens, after `observe` was told of the router's (`ffn_gate_inp`)."""
