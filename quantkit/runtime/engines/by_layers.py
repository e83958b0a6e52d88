"""Long pieces of prompts on the CPU: a layer at a time and a matrix at a time, dequantized and multiplied by torch.

That is faster than quantized products as soon as an expert sees enough tokens to pay for its decoding.
"""

from dataclasses import replace
from typing import Protocol

import torch

from quantkit.models.config import ModelConfig
from quantkit.runtime.generate import ROWS_TOLD, Each
from quantkit.runtime.layers import (
    Feed,
    FeedForward,
    KVCache,
    LayerExperts,
    Linear,
    Router,
    attention,
    feed_forward,
    rms_norm,
    with_mla,
)
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import angles

EMBEDDED = 256  # tokens at once: 4,096 of R1 take 0.4 s and more of a core


class Layers(Protocol):
    """What is asked of a `GGUFSource`."""

    config: ModelConfig
    dtype: torch.dtype

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> float32 [..., d]."""

    def layer(self, layer: int) -> FeedForward:
        """A layer's weights."""

    def feed_forward(self, layer: int) -> tuple[Feed | None, Router | None, LayerExperts | None]:
        """The second half of a layer."""

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm and output matrix."""


class ByLayers:
    """tiled: the layers that all tokens go through. quantized: the same file, for all that only the last token of a
    piece goes through."""

    def __init__(self, tiled: Layers, quantized: Layers):
        self.tiled, self.config = tiled, tiled.config
        self.norm, self.head = quantized.head()
        self.last = quantized.feed_forward(self.config.n_layer - 1)

    @torch.inference_mode()
    def prefill(self, tokens: torch.Tensor, cache: torch.Tensor, begin: int, each: Each | None = None) -> torch.Tensor:
        """tokens int64 [1, t], put at positions begin, ... of a cache [n_layer, 1, rows, kv_lora + qk_rope] -> float32
        logits [n_vocab] of the last one. each: as `Engine.prefill`."""
        c, source = self.config, self.tiled
        h = torch.empty(*tokens.shape, c.d)
        for to, part in zip(h.split(EMBEDDED, dim=1), tokens.split(EMBEDDED, dim=1), strict=True):
            source.embed(part, to[0])
            pause(what="embedding")
        turns = angles(c, torch.arange(begin, begin + tokens.shape[1]))
        for i in range(c.n_layer):
            layer, dtype = with_mla(source.layer(i)), source.dtype
            latent, key = cache[i].split([c.kv_lora, c.qk_rope], dim=-1)
            h = h + attention(h, layer, c, turns, KVCache(latent, key, begin))
            pause(what="attention")
            if i == c.n_layer - 1:  # only the last token goes on: from the quantized bytes
                if each:
                    x = rms_norm(h, layer.ffn_norm, c.rms_eps).view(-1, c.d).to(dtype)
                    for rows in (h + feed_forward(x, layer, c).view_as(h))[0].split(ROWS_TOLD):
                        each(self.head(rms_norm(rows, self.norm, c.rms_eps)))
                        pause(what="logits")
                feed, router, experts = self.last
                layer, dtype = replace(layer, feed=feed, router=router, experts=experts), torch.float32
                h = h[:, -1:]
            x = rms_norm(h, layer.ffn_norm, c.rms_eps).view(-1, c.d).to(dtype)
            h = h + feed_forward(x, layer, c).view_as(h)
            pause(what="feed-forward")
        return self.head(rms_norm(h[0, -1:], self.norm, c.rms_eps))[0]
