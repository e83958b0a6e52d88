"""One transformer layer: absorbed multi-head latent attention, routing, dense and routed feed-forward.

The same functions serve the original checkpoint (torch matrices) and the quantized file (ggml on its bytes): a layer's
weights are only a bag of callables. Attention works on the compressed cache (kv_lora + qk_rope numbers a token) in
every mode.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.runtime.forms import absorbed, expanded
from quantkit.runtime.indexer import IndexerWeights, Selection, choose, index_keys, take_over
from quantkit.runtime.mtp import Entrance
from quantkit.runtime.rotation import Angles, rotate
from quantkit.runtime.swiglu import swiglu
from quantkit.runtime.watch import Watcher

Linear = Callable[[torch.Tensor], torch.Tensor]
See = Callable[[str, torch.Tensor], None]
"""`Watcher.observe` for tokens whose weight is known."""

FFN_TOKENS = 8192  # tokens per tile of routing, shared and dense feed-forward


class FeedForward(Protocol):
    """The half of a layer's weights that `feed_forward` computes."""

    ffn_norm: torch.Tensor
    feed: "Feed | None"
    router: "Router | None"
    experts: "LayerExperts | None"


class Experts(Protocol):
    """The routed experts of a layer."""

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [n, d], expert int64 [n, n_used], weight float32 [n, n_used] -> weighted sum float32 [n, d]."""


class LayerExperts(Protocol):
    """The routed experts of `LayerWeights`: what `Experts` is to an engine, and what a stream asks for besides."""

    def __call__(
        self,
        x: torch.Tensor,
        expert: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
        watcher: Watcher | None = None,
    ) -> torch.Tensor:
        """As `Experts`. out [n, d]: where the sum may be made. watcher: is told of each expert."""


def unwatched(experts: Experts) -> LayerExperts:
    """Those of an engine, which make their own sum and tell nobody: for layers that are not calibrated on."""

    def compute(
        x: torch.Tensor,
        expert: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
        watcher: Watcher | None = None,
    ) -> torch.Tensor:
        return experts(x, expert, weight)

    return compute


@dataclass
class Feed:
    """gate, up and down of a SwiGLU feed-forward (dense layer or shared expert)."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor, see: See | None = None) -> torch.Tensor:
        if see:
            see("ffn_gate", x)
            see("ffn_up", x)
        hidden = self.activated(self.gate(x), self.up(x))
        if see:
            see("ffn_down", hidden)
        return self.down(hidden)

    def activated(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What down multiplies."""
        return swiglu(gate, up, None)


@dataclass
class Router:
    """weight float32 [n_expert, d]; bias float32 [n_expert], added for the selection only; table int32 [n_vocab,
    n_used], of layers where the token selects."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    table: torch.Tensor | None = None


@dataclass
class LayerWeights:
    """The weights of one layer, as callables and small tensors.

    q is (q_a, q_a_norm, q_b) or a single projection; k_b [n_head, kv_lora, qk_nope], v_b [n_head, v_head, kv_lora].
    A dense layer has only `feed`; a MoE layer has router and experts, and `feed` is its shared expert (or None).
    indexer: of layers that choose what they attend to. mtp: of those that predict the token after the next.
    """

    attn_norm: torch.Tensor
    q: tuple[Linear, torch.Tensor, Linear] | Linear
    kv_a: Linear
    kv_a_norm: torch.Tensor
    k_b: torch.Tensor
    v_b: torch.Tensor
    output: Linear
    ffn_norm: torch.Tensor
    feed: Feed | None
    router: Router | None = None
    experts: LayerExperts | None = None
    indexer: IndexerWeights | None = None
    mtp: Entrance | None = None


def with_mla(layer: FeedForward) -> LayerWeights:
    """The layer of a model for which `only_forward` did not refuse what its attention is needed for."""
    assert isinstance(layer, LayerWeights)
    return layer


def only_forward(config: ModelConfig, what: str) -> None:
    """QuantkitError if the model's layers are only computed forward, and `what` is more than that."""
    if config.compression is not None:
        raise QuantkitError(
            f"{what}: not with {config.architecture}, whose compressed attention and residual streams are computed "
            "here forward only"
        )


@dataclass
class KVCache:
    """Compressed cache of one layer: latent [n_seq, capacity, kv_lora], rope [n_seq, capacity, qk_rope], index
    [n_seq, capacity, width of the indexer] or None, where no context is so long that something is chosen."""

    latent: torch.Tensor
    rope: torch.Tensor
    length: int = 0
    index: torch.Tensor | None = None

    @classmethod
    def empty(
        cls, config: ModelConfig, layer: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype
    ) -> "KVCache":
        """Of a layer, for so many sequences of up to so many tokens: shape."""
        indexer = config.indexer if config.has_indexer(layer) else None
        widths = (config.kv_lora, config.qk_rope)
        latent, rope = (torch.zeros((*shape, width), device=device, dtype=dtype) for width in widths)
        if indexer is None or shape[1] <= indexer.top_k:
            return cls(latent, rope)
        return cls(latent, rope, index=torch.zeros((*shape, indexer.width), device=device, dtype=dtype))

    def append(self, latent: torch.Tensor, rope: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the next tokens; latent and rope of all so far."""
        end = self.length + latent.shape[1]
        self.latent[:, self.length : end] = latent
        self.rope[:, self.length : end] = rope
        self.length = end
        return self.latent[:, :end], self.rope[:, :end]

    def append_index(self, keys: torch.Tensor) -> torch.Tensor:
        """Put the indexer's keys of the tokens that were appended last; those of all so far. QuantkitError if the cache
        has no place for them, and they count."""
        if self.index is not None:
            self.index[:, self.length - keys.shape[1] : self.length] = keys
            return self.index[:, : self.length]
        if self.length > keys.shape[1]:
            raise QuantkitError("this cache keeps no keys of an indexer, so its contexts must not exceed the top-k")
        return keys


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x [..., n] over its root mean square, times weight [n]; computed in float32, in the dtype of x."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def attention(
    h: torch.Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    angles: Angles,
    cache: KVCache | None = None,
    watcher: Watcher | None = None,
    chosen: Selection | None = None,
) -> torch.Tensor:
    """Causal attention output (residual not added) for h [n_seq, t, d], computed in the dtype of the weights.

    angles: [t, qk_rope / 2] of these positions. With a cache, its earlier tokens are attended to as well. chosen: where
    layers with an indexer leave what they chose, for those without.
    """
    n_seq, t, d = h.shape
    cos, sin = angles
    see = None if watcher is None else partial(_see, watcher, token_weight(h))
    x = rms_norm(h, weights.attn_norm, config.rms_eps).reshape(-1, d).to(weights.k_b.dtype)
    q, low = _query(x, weights, config, see)
    q = q.view(n_seq, t, config.n_head, config.qk_head)
    q_nope, q_rope = q.split([config.qk_nope, config.qk_rope], dim=-1)
    q_rope = rotate(q_rope, cos[:, None], sin[:, None])
    if see:
        see("attn_kv_a_mqa", x)
        if weights.indexer:
            see("indexer.attn_k", x)
    latent, k_rope = weights.kv_a(x).view(n_seq, t, -1).split([config.kv_lora, config.qk_rope], dim=-1)
    latent = rms_norm(latent, weights.kv_a_norm, config.rms_eps)
    k_rope = rotate(k_rope, cos, sin)
    if see:
        see("attn_kv_b", latent.reshape(-1, config.kv_lora))
        see("attn_k_b", q_nope.reshape(-1, config.n_head, config.qk_nope))
    first = cache is None or (cache.length == 0 and t > 1)  # nothing earlier to attend to
    if cache is not None:
        cached = cache.append(latent, k_rope)
        latent, k_rope = (latent, k_rope) if first else cached
    mask = _selected(x.view(n_seq, t, d), low, latent.shape[1], weights, config, angles, (cache, chosen))
    if first and see is None and mask is None:
        query, kv_b = torch.cat((q_nope, q_rope), dim=-1), (weights.k_b, weights.v_b)
        values = expanded(query, latent, k_rope, kv_b, config.softmax_scale)
    else:
        q_latent = torch.einsum("sthn,hcn->sthc", q_nope.to(weights.k_b.dtype), weights.k_b)
        mixed = absorbed(q_latent, q_rope, latent, k_rope, config.softmax_scale, mask)
        if see:
            see("attn_v_b", mixed.reshape(-1, config.n_head, config.kv_lora))
        values = torch.einsum("sthc,hvc->sthv", mixed.to(weights.v_b.dtype), weights.v_b)
    values = values.reshape(n_seq * t, -1)
    if see:
        see("attn_output", values)
    return weights.output(values).view(n_seq, t, d)


def _query(
    x: torch.Tensor, weights: LayerWeights, config: ModelConfig, see: See | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries, and what they were made from."""
    if not isinstance(weights.q, tuple):
        if see:
            see("attn_q", x)
        return weights.q(x), x
    q_a, norm, q_b = weights.q
    if see:
        see("attn_q_a", x)
    low = rms_norm(q_a(x), norm, config.rms_eps)
    if see:
        see("attn_q_b", low)
        if weights.indexer:
            see("indexer.attn_q_b", low)
    return q_b(low), low


def _selected(
    x: torch.Tensor,
    low: torch.Tensor,
    n: int,
    weights: LayerWeights,
    config: ModelConfig,
    angles: Angles,
    kept: tuple[KVCache | None, Selection | None],
) -> torch.Tensor | None:
    """Which of n positions the tokens x [n_seq, t, d] attend to, bool [n_seq, t, n], or None for all. kept: the layer's
    cache, and where layers leave to others what they chose."""
    cache, chosen = kept
    indexer = config.indexer
    if indexer is None:
        return None
    if weights.indexer is None:
        return take_over(chosen, indexer.top_k, n)
    if n <= indexer.top_k and (cache is None or cache.index is None):
        return None
    keys = index_keys(x, weights.indexer, angles)
    keys = keys if cache is None else cache.append_index(keys)
    mask = choose(x, low, keys, weights.indexer, angles)
    if chosen is not None and indexer.shares:
        chosen.mask, chosen.known = mask, True
    return mask


def route(
    x: torch.Tensor, router: Router, config: ModelConfig, tokens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts of each token: (expert int64 [n, n_used], weight float32 [n, n_used]) for normed x [n, d].

    DeepSeek-V3's noaux_tc (arXiv 2412.19437, 2.1.2) or V2's softmax top-k: the bias chooses, the plain score weighs.
    tokens int64 [n]: what a router with a table chooses by.
    """
    scores = router_scores(x, router, config)
    if router.table is not None:
        if tokens is None:
            raise QuantkitError("this layer's experts follow from the tokens, which were not given")
        expert = router.table[tokens.to(router.table.device)].long()
        return expert, routing_weights(scores, expert, config)
    choice = scores if router.bias is None else scores + router.bias
    if config.n_group > 1:
        grouped = choice.view(len(x), config.n_group, -1)
        per_group = grouped.topk(2, dim=-1).values.sum(-1) if config.group_score == "top2" else grouped.amax(-1)
        kept = torch.zeros_like(per_group, dtype=torch.bool)
        kept.scatter_(1, per_group.topk(config.n_group_used, dim=-1).indices, True)
        choice = grouped.masked_fill(~kept.unsqueeze(-1), float("-inf")).view(len(x), -1)
    expert = choice.topk(config.n_used, dim=-1).indices
    return expert, routing_weights(scores, expert, config)


def router_scores(x: torch.Tensor, router: Router, config: ModelConfig) -> torch.Tensor:
    """float32 [n, n_expert] of normed x [n, d], without the bias."""
    logits = x.float() @ router.weight.T
    if config.scoring == "sqrtsoftplus":
        return F.softplus(logits).sqrt()
    return logits.sigmoid() if config.scoring == "sigmoid" else logits.softmax(-1)


def routing_weights(scores: torch.Tensor, expert: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """How much of each chosen expert's output a token takes, float32 [n, n_used]: expert int64 [n, n_used]."""
    weight = scores.gather(1, expert)
    if config.norm_weights:
        weight = weight / (weight.sum(-1, keepdim=True) + 1e-20)
    return weight * config.weights_scale


def feed_forward(
    x: torch.Tensor,
    weights: FeedForward,
    config: ModelConfig,
    sums: torch.Tensor | None = None,
    watcher: Watcher | None = None,
    weight_of_token: torch.Tensor | None = None,
    tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Feed-forward output (residual not added) of normed x [n, d]. weight_of_token [n]: what a watcher is told.
    tokens [n]: what they are, for routers with a table.

    Experts see all tokens at once; all else runs in tiles of FFN_TOKENS, which bounds its temporaries. x and sums
    [n, d] (where streamed experts add up, and outputs of a dense layer lie) may live elsewhere than the weights.
    """
    device = weights.ffn_norm.device

    def see(begin: int, suffix: str = "") -> See | None:
        if watcher is None or weight_of_token is None:
            return None
        weight = weight_of_token[begin : begin + FFN_TOKENS]
        return lambda role, value: watcher.observe(role + suffix, value, weight)

    tiles = list(enumerate(x.split(FFN_TOKENS)))
    if weights.router is None or weights.experts is None:
        feed = weights.feed
        assert feed is not None
        outputs = (feed(part.to(device), see(i * FFN_TOKENS)).to(x.device) for i, part in tiles)
        if sums is None or sums.dtype != torch.float32:  # which would round them
            return torch.cat(list(outputs))
        for to, part in zip(sums.split(FFN_TOKENS), outputs, strict=True):
            to.copy_(part)
        return sums
    routes = []
    for i, part in tiles:
        part = part.to(device)
        own = None if tokens is None else tokens[i * FFN_TOKENS : (i + 1) * FFN_TOKENS]
        routes.append(route(part, weights.router, config, own))
        if tell := see(i * FFN_TOKENS):
            tell("ffn_gate_inp", part)
    expert, weight = (torch.cat(parts) for parts in zip(*routes, strict=True))
    out = weights.experts(x, expert, weight, sums, watcher)
    if weights.feed is not None:
        for i, part in tiles:
            shared = weights.feed(part.to(device), see(i * FFN_TOKENS, "_shexp"))
            out[i * FFN_TOKENS : (i + 1) * FFN_TOKENS] += shared.to(out.device)
    return out


def token_weight(h: torch.Tensor) -> torch.Tensor:
    """1 / mean square of the residual stream h [..., d] -> float32 [n]."""
    return 1 / h.float().square().mean(-1).flatten().clamp_min(1e-20)


def _see(watcher: Watcher, weight: torch.Tensor, role: str, x: torch.Tensor) -> None:
    watcher.observe(role, x, weight)
