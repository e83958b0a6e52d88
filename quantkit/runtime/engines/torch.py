"""The engine that computes any source with MLA on any device: its layers one after the other, in torch."""

import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.generate import PROMPT_TOKENS, ROWS_TOLD, Each
from quantkit.runtime.indexer import Selection
from quantkit.runtime.layers import KVCache, LayerWeights, attention, feed_forward, rms_norm, with_mla
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import Angles
from quantkit.runtime.stream import Source


class TorchEngine:
    """`generate.Engine` of a source, all of whose layers are loaded. A file's cost little if they are multiplied from
    their quantized bytes, which stay in the mapped file."""

    piece = PROMPT_TOKENS

    def __init__(self, source: Source, n_slots: int, capacity: int):
        self.source, self.config, self.n_slots, self.capacity = source, source.config, n_slots, capacity
        self.layers: list[LayerWeights] = [with_mla(source.layer(layer)) for layer in range(source.config.n_layer)]
        self.norm, self.output = source.head()
        self.slots: list[list[KVCache] | None] = [None] * n_slots

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """As `Engine`."""
        caches = self._slot(slot)
        for cache in caches:
            cache.length = begin
        h = self._hidden(torch.tensor([tokens]), caches)
        if each:
            for rows in h.split(ROWS_TOLD, dim=1):
                each(self._logits(rows)[0])
                pause(h.device, "logits")
        return self._logits(h[:, -1:])[0, -1]

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`. Attention is computed sequence by sequence over each one's own cache, everything else for all
        together."""
        c, caches = self.config, [self._slot(slot) for slot in slots]
        h = self.source.embed(torch.tensor(tokens, device=self.source.device))[:, None]
        cos, sin = angles(c, torch.tensor([[own[0].length] for own in caches], device=h.device))
        turns = [Angles(*one) for one in zip(cos, sin, strict=True)]  # of each sequence
        chosen = [Selection() for _ in slots]
        for i, layer in enumerate(self.layers):
            mixed = [
                attention(h[s : s + 1], layer, c, turns[s], own[i], chosen=chosen[s]) for s, own in enumerate(caches)
            ]
            h = self._feed(h + torch.cat(mixed), layer)
        return self._logits(h)[:, 0]

    def caches(self, n_seq: int) -> list[KVCache]:
        """Empty ones, of every layer, for n_seq sequences of the same length."""
        device, dtype = self.source.device, self.source.dtype
        shape = (n_seq, self.capacity)
        return [KVCache.empty(self.config, layer, shape, device, dtype) for layer in range(self.config.n_layer)]

    @torch.inference_mode()
    def forward(self, tokens: torch.Tensor, caches: list[KVCache], all_logits: bool = False) -> torch.Tensor:
        """tokens int64 [n_seq, t] after what the caches hold -> float32 logits [n_seq, 1, v], or all: [n_seq, t, v].

        QuantkitError if they do not fit the capacity.
        """
        h = self._hidden(tokens, caches)
        return self._logits(h if all_logits else h[:, -1:])

    def _hidden(self, tokens: torch.Tensor, caches: list[KVCache]) -> torch.Tensor:
        begin = caches[0].length
        if begin + tokens.shape[1] > self.capacity:
            raise QuantkitError(f"{begin + tokens.shape[1]} tokens do not fit a context of {self.capacity}")
        h = self.source.embed(tokens.to(self.source.device))
        turns = angles(self.config, torch.arange(begin, begin + tokens.shape[1], device=h.device))
        chosen = Selection()
        for layer, cache in zip(self.layers, caches, strict=True):
            h = self._feed(h + attention(h, layer, self.config, turns, cache, chosen=chosen), layer)
            pause(h.device, "a layer")
        return h

    def _slot(self, slot: int) -> list[KVCache]:
        caches = self.slots[slot]
        if caches is None:
            caches = self.slots[slot] = self.caches(1)
        return caches

    def _feed(self, h: torch.Tensor, layer: LayerWeights) -> torch.Tensor:
        x = rms_norm(h, layer.ffn_norm, self.config.rms_eps).view(-1, self.config.d).to(self.source.dtype)
        return h + feed_forward(x, layer, self.config).view_as(h)

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        flat = rms_norm(h, self.norm, self.config.rms_eps).reshape(-1, self.config.d).to(self.source.dtype)
        return self.output(flat).float().view(*h.shape[:2], -1)
