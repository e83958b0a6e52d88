"""Which positions a token attends to in a model with DeepSeek sparse attention (DeepSeek-V3.2, arXiv 2512.02556, 2.1).

A scorer beside the attention, small and with keys of its own, ranks all earlier positions; attention sees the best
top_k. As long as there are no more than that, nothing is chosen and the attention is the dense one, bit for bit.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from quantkit.errors import QuantkitError
from quantkit.runtime.rotation import Angles, rotate, rotate_halves

NORM_EPS = 1e-6  # of the keys' LayerNorm, in every model that there is; no config or GGUF says it
SCORES = 1 << 26  # scores held at once: 256 MB as float32


@dataclass
class IndexerWeights:
    """The scorer of a layer. q_b: [n, q_lora] -> [n, n_head width]; k: [n, d] -> [n, width]; proj float32 [n_head, d],
    the weights of the heads; k_norm, k_norm_b float32 [width], of a LayerNorm. top_k positions are chosen. The first
    `turning` numbers of a head turn: neighbours (interleaved), or halves."""

    q_b: Callable[[torch.Tensor], torch.Tensor]
    k: Callable[[torch.Tensor], torch.Tensor]
    proj: torch.Tensor
    k_norm: torch.Tensor
    k_norm_b: torch.Tensor
    top_k: int
    turning: int
    interleaved: bool

    def turned(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Queries or keys [..., width] at their positions."""
        turning, rest = x.split([self.turning, x.shape[-1] - self.turning], dim=-1)
        return torch.cat(((rotate if self.interleaved else rotate_halves)(turning, cos, sin), rest), dim=-1)


@dataclass
class Selection:
    """What the last layer with an indexer chose for the tokens that are being computed, for the layers after it that
    have none: bool [n_seq, t, n], or None for all."""

    mask: torch.Tensor | None = None
    known: bool = False


def index_keys(x: torch.Tensor, weights: IndexerWeights, angles: Angles) -> torch.Tensor:
    """Of normed inputs x [n_seq, t, d]: [n_seq, t, width], turned."""
    keys = weights.k(x.flatten(0, 1)).float()
    keys = F.layer_norm(keys, keys.shape[-1:], weights.k_norm, weights.k_norm_b, NORM_EPS)
    return weights.turned(keys.view(*x.shape[:2], -1), angles.cos, angles.sin)


@torch.no_grad()
def choose(
    x: torch.Tensor, low: torch.Tensor, keys: torch.Tensor, weights: IndexerWeights, angles: Angles
) -> torch.Tensor | None:
    """Positions that each token attends to, bool [n_seq, t, n]; None if that is all before it.

    x [n_seq, t, d]: normed inputs; low [n_seq t, q_lora]: what queries come from. keys [n_seq, n, width]: of all
    positions, of which the t tokens are the last.
    """
    (n_seq, t, d), (_, n, width), n_head = x.shape, keys.shape, len(weights.proj)
    if n <= weights.top_k:
        return None
    query = weights.q_b(low).float().view(n_seq, t, n_head, width)
    query = weights.turned(query, angles.cos[:, None], angles.sin[:, None])
    share = (x.reshape(-1, d).float() @ weights.proj.T).view(n_seq, t, 1, n_head)
    share = share * (n_head * width) ** -0.5
    mask = torch.zeros(n_seq, t, n, dtype=torch.bool, device=x.device)
    column, by_key = torch.arange(n, device=x.device), keys.float().transpose(1, 2)
    step = max(1, SCORES // (n_seq * n_head * n))
    for begin in range(0, t, step):
        end = min(begin + step, t)
        scores = (query[:, begin:end].flatten(1, 2) @ by_key).relu_().view(n_seq, end - begin, -1, n)
        scores = (share[:, begin:end] @ scores)[:, :, 0]
        later = column > torch.arange(n - t + begin, n - t + end, device=x.device)[:, None]
        best = scores.masked_fill_(later, float("-inf")).topk(weights.top_k, dim=-1).indices
        mask[:, begin:end].scatter_(-1, best, True).logical_and_(~later)
    return mask


def take_over(chosen: Selection | None, top_k: int, n: int) -> torch.Tensor | None:
    """What a layer without an indexer attends to among n positions: as `choose`. QuantkitError if nobody kept what the
    layers before it chose."""
    if n <= top_k:
        return None
    if chosen is None or not chosen.known:
        raise QuantkitError(
            f"this layer attends to what the indexer of a layer before it chose, which was not kept; with at most "
            f"{top_k:,} tokens in a context nothing is chosen"
        )
    return chosen.mask
