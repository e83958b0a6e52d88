"""The engine of models with compressed attention between several residual streams (DeepSeek-V4), in torch.

A sequence goes on from what its caches hold. Taken back to an earlier token, it is computed again from the last whole
block of all compressors before that, for only of the newest block are the parts kept; or, if that is so far back that
keys of the window before it are not kept any more, from its beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from quantkit.errors import QuantkitError
from quantkit.progress import say
from quantkit.runtime.compressed import CompressedLayer, attention
from quantkit.runtime.compressed_cache import OVERLAPPING, CompressedCache
from quantkit.runtime.generate import PROMPT_TOKENS, ROWS_TOLD, Each
from quantkit.runtime.layers import feed_forward, rms_norm
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import KnownAngles
from quantkit.runtime.stream import Source, embedded, head_logits
from quantkit.runtime.streams import mix, taken_up


@dataclass
class _Kept:
    """What a slot holds: tokens, and caches of every layer. whole: these are of all of the tokens, not taken back nor
    left in the middle of a step."""

    caches: list[CompressedCache]
    tokens: list[int] = field(default_factory=list)
    whole: bool = True


class StreamsEngine:
    """`generate.Engine` of a source with compressed attention, all of whose layers are loaded."""

    piece = PROMPT_TOKENS

    def __init__(self, source: Source, n_slots: int, capacity: int):
        c = source.config
        assert c.compression
        self.source, self.config, self.n_slots, self.capacity = source, c, n_slots, capacity
        self.layers: list[CompressedLayer] = []
        for i in range(c.n_layer):
            layer = source.layer(i)
            assert isinstance(layer, CompressedLayer)
            self.layers.append(layer)
        self.head = source.head()
        self.angles = [KnownAngles(c, compresses, source.device) for compresses in (False, True)]
        self.block = max(1, *c.compression.ratios)
        self.slots = [self._empty() for _ in range(n_slots)]  # now: a context beyond memory is refused at the start

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """As `Engine`."""
        kept = self.slots[slot]
        before = self._back(kept, begin)
        h = self._hidden([kept], [before + tokens])[len(before) :]
        if each:
            for rows in h.split(ROWS_TOLD):
                each(head_logits(self.source, self.head, rows))
                pause(h.device, "logits")
        return head_logits(self.source, self.head, h[-1:])[0]

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`. Attention is computed sequence by sequence, everything else for all together."""
        kept = [self.slots[slot] for slot in slots]
        for one in kept:
            if again := self._back(one, len(one.tokens)):
                self._hidden([one], [again])
        return head_logits(self.source, self.head, self._hidden(kept, [[token] for token in tokens]))

    def _empty(self) -> _Kept:
        c, like = self.config, torch.empty(0, device=self.source.device, dtype=self.source.dtype)
        assert c.compression
        upto = [self.angles[ratio > 0].upto for ratio in c.compression.ratios]
        return _Kept([CompressedCache.empty(c, i, self.capacity, upto[i], like) for i in range(c.n_layer)])

    def _back(self, kept: _Kept, n: int) -> list[int]:
        """Take a sequence back to its first n tokens; those of them that must be computed again, in front of others."""
        if kept.whole and len(kept.tokens) == n:
            return []
        kept.tokens, kept.whole = kept.tokens[:n], False
        block = n - n % self.block
        start = max(0, block - OVERLAPPING)
        if not all(cache.reaches(block, start) for cache in kept.caches):
            say(f"taken back to its token {n:,}, further than keys are kept: all before is computed again")
            block = start = 0
        for cache in kept.caches:
            cache.back(block, start)
        whole, again = kept.tokens, kept.tokens[start:]
        while len(again) > self.piece:
            self._hidden([kept], [again[: self.piece]])
            again = again[self.piece :]
            kept.tokens, kept.whole = whole, False  # so that it begins again if this is stopped in between
        return again

    def _hidden(self, kept: Sequence[_Kept], tokens: Sequence[list[int]]) -> torch.Tensor:
        """Streams [m, n d] after the last layer, of the next tokens of several sequences, as many of each."""
        texts = [one.tokens[: one.caches[0].length] + own for one, own in zip(kept, tokens, strict=True)]
        if (n := max(map(len, texts))) > self.capacity:
            raise QuantkitError(f"{n} tokens do not fit a context of {self.capacity}")
        for one in kept:
            one.whole = False
        ids = torch.tensor(tokens, device=self.source.device)
        h = embedded(self.source, ids).flatten(0, 1)
        for i, layer in enumerate(self.layers):
            h = self._layer(h, layer, [one.caches[i] for one in kept], ids.flatten())
            pause(h.device, "a layer")
        for one, text in zip(kept, texts, strict=True):
            one.tokens, one.whole = text, True
        return h

    def _layer(
        self, h: torch.Tensor, layer: CompressedLayer, caches: Sequence[CompressedCache], tokens: torch.Tensor
    ) -> torch.Tensor:
        """Streams h [m, n d] through a layer."""
        c, n_seq = self.config, len(caches)
        mixed = mix(h, layer.attn_mixing, c)
        parts = mixed.x.view(n_seq, -1, c.d).split(1)
        y = torch.cat([attention(x, layer, c, cache=cache) for x, cache in zip(parts, caches, strict=True)])
        h = taken_up(h, y.flatten(0, 1), mixed)
        pause(h.device, "attention")
        mixed = mix(h, layer.ffn_mixing, c)
        x = rms_norm(mixed.x, layer.ffn_norm, c.rms_eps).to(self.source.dtype)
        return taken_up(h, feed_forward(x, layer, c, tokens=tokens), mixed)
