"""Token by token: a loaded model with its compressed KV caches, and sampling."""

from dataclasses import dataclass

import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.layers import KVCache, LayerWeights, attention, feed_forward, rms_norm
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import Angles
from quantkit.runtime.stream import Source

HEAD = 1024  # most probable tokens that are sorted at first


class Model:
    """All layers of a source, loaded. With a GGUF on the CPU that costs little: matrices stay in the mapped file."""

    def __init__(self, source: Source):
        self.source, self.config = source, source.config
        self.layers: list[LayerWeights] = [source.layer(layer) for layer in range(source.config.n_layer)]
        self.norm, self.output = source.head()

    def caches(self, capacity: int, n_seq: int = 1) -> list[KVCache]:
        device, dtype = self.source.device, self.source.dtype
        return [KVCache.empty(self.config, n_seq, capacity, device, dtype) for _ in self.layers]

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, caches: list[KVCache], all_logits: bool = False) -> torch.Tensor:
        """tokens int64 [n_seq, t] after what the caches hold -> float32 logits [n_seq, 1, v], or all: [n_seq, t, v]."""
        begin = caches[0].length
        if begin + tokens.shape[1] > caches[0].latent.shape[1]:
            raise QuantkitError(f"{begin + tokens.shape[1]} tokens do not fit a context of {caches[0].latent.shape[1]}")
        h = self.source.embed(tokens.to(self.source.device))
        turns = angles(self.config, torch.arange(begin, begin + tokens.shape[1], device=h.device))
        for weights, cache in zip(self.layers, caches, strict=True):
            h = self._feed(h + attention(h, weights, self.config, turns, cache), weights)
        return self._logits(h if all_logits else h[:, -1:])

    @torch.inference_mode()
    def step(self, tokens: torch.Tensor, caches: list[list[KVCache]]) -> torch.Tensor:
        """One more token of each of several sequences: tokens int64 [n], their caches -> float32 logits [n, v].

        Attention is computed sequence by sequence over each one's own cache, everything else for all together.
        """
        h = self.source.embed(tokens.to(self.source.device))[:, None]
        cos, sin = angles(self.config, torch.tensor([[own[0].length] for own in caches], device=h.device))
        for layer, weights in enumerate(self.layers):
            mixed = [
                attention(h[i : i + 1], weights, self.config, Angles(cos[i], sin[i]), own[layer])
                for i, own in enumerate(caches)
            ]
            h = self._feed(h + torch.cat(mixed), weights)
        return self._logits(h)[:, 0]

    def _feed(self, h: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        x = rms_norm(h, weights.ffn_norm, self.config.rms_eps).view(-1, self.config.d).to(self.source.dtype)
        return h + feed_forward(x, weights, self.config).view_as(h)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        flat = rms_norm(h, self.norm, self.config.rms_eps).reshape(-1, self.config.d).to(self.source.dtype)
        return self.output(flat).float().view(*h.shape[:2], -1)


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy. top_k: that many tokens (0: all); top_p: smallest set of tokens with that much
    probability; min_p: tokens at least that probable in relation to the most probable one. All apply together."""

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0


def sample(logits: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """One token from float32 logits [n_vocab]."""
    if how.temperature <= 0:
        return int(logits.argmax())
    p = (logits.cpu() / how.temperature).softmax(-1)
    best, order = p.topk(min(how.top_k or HEAD, len(p)))
    if not how.top_k and len(best) < len(p) and best.sum() < how.top_p:  # flat: only then is everything sorted
        best, order = p.sort(descending=True)
    share = best / best.sum() if how.top_k else best  # top_p counts what top_k left, as in llama.cpp
    kept = (share.cumsum(-1) - share < how.top_p) & (best >= how.min_p * best[0])
    kept[0] = True
    return int(order[torch.multinomial(best * kept, 1, generator=generator)])
