"""What goes into a layer that predicts the token after the next (multi-token prediction, arXiv 2412.19437, 2.2), as
llama.cpp's `graph_mtp` has it: the next token's embedding beside what the model's head sees of this one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass
class Entrance:
    """enorm, hnorm float32 [d]: norms of the embedding and of the hidden state. eh_proj: [n, 2 d] -> [n, d]. head_norm
    float32 [d]: in the place of the output norm, behind the layer."""

    enorm: torch.Tensor
    hnorm: torch.Tensor
    eh_proj: Callable[[torch.Tensor], torch.Tensor]
    head_norm: torch.Tensor
