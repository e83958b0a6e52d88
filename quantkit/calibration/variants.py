"""A model with one tensor in another type: which types to try, how a layer gets the tensor, and what it costs."""

from dataclasses import dataclass, replace

import torch

from quantkit.codecs import types as qtypes
from quantkit.formats.sensitivity import Entry
from quantkit.runtime.layers import Feed, LayerWeights, Linear
from quantkit.runtime.stream import Source, head_tiles
from quantkit.tensors import TensorSpec


@dataclass(frozen=True)
class Candidates:
    """Types to try on stacks of routed experts, and on all other tensors."""

    routed: tuple[str, ...] = ("IQ1_S", "IQ2_XXS", "Q2_K", "Q3_K", "Q4_K")
    others: tuple[str, ...] = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")

    def of(self, spec: TensorSpec) -> list[str]:
        """Those whose blocks fit the tensor's rows. Fixed tensors have none, embeddings no importance."""
        if spec.fixed:
            return []
        wanted = self.routed if spec.is_routed else self.others
        blind = spec.role == "token_embd"
        fit = [name for name in wanted if qtypes.fits(name, spec.n_in)]
        return [name for name in fit if not (blind and qtypes.needs_importance(name))]


DEFAULT = Candidates()
FINE = ("Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS", "IQ4_NL", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
EVERY = Candidates(
    ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", *(name for name in FINE if name not in ("IQ4_NL", "Q8_0"))), FINE
)
"""All that a plan chooses among: to a type that was not tried the planner would give ggml's error."""


def linear_of(weight: torch.Tensor) -> Linear:
    """Multiplies by its transpose."""
    return lambda x: x @ weight.T


def replaced(weights: LayerWeights, role: str, weight: torch.Tensor) -> LayerWeights:
    """The layer with another matrix of attention."""
    if role == "attn_k_b":
        return replace(weights, k_b=weight)
    if role == "attn_v_b":
        return replace(weights, v_b=weight)
    linear = linear_of(weight)
    if role in ("attn_q_a", "attn_q_b"):
        assert isinstance(weights.q, tuple)
        q_a, norm, q_b = weights.q
        return replace(weights, q=(linear, norm, q_b) if role == "attn_q_a" else (q_a, norm, linear))
    if role == "attn_q":
        return replace(weights, q=linear)
    return replace(weights, kv_a=linear) if role == "attn_kv_a_mqa" else replace(weights, output=linear)


def replaced_feed(feed: Feed, role: str, weight: torch.Tensor) -> Feed:
    """The dense or shared feed-forward with another matrix."""
    return replace(feed, **{role.removeprefix("ffn_").removesuffix("_shexp"): linear_of(weight)})


def entry(spec: TensorSpec, qtype: str, kld: float, error: float) -> Entry:
    """Of a tensor and a type."""
    return Entry(spec.name, spec.role, spec.layer, qtype, spec.n_rows * qtypes.row_bytes(qtype, spec.n_in), kld, error)


Output = tuple[tuple[torch.Tensor, Linear], torch.Tensor]
"""Output norm and matrix, and the last layer's output [n_chunk, t, d]."""


def divergence(source: Source, clean: Output, other: Output, first: int | None = None) -> tuple[float, float]:
    """Of the other's next-token distribution from the clean one's: nats a token, and its standard error. first:
    position in each chunk from which on (default: its second half)."""
    parts, begin = [], clean[1].shape[1] // 2 if first is None else first
    tiles = [
        head_tiles(source, head, hidden[:, begin:-1].reshape(-1, source.config.d).to(source.device))
        for head, hidden in (clean, other)
    ]
    for p, q in zip(*tiles, strict=True):
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    kld = torch.cat(parts).double()
    return float(kld.mean()), float(kld.std() / max(1, len(kld)) ** 0.5)
