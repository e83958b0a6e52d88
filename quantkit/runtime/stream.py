"""Layer-synchronous execution: all tokens pass through layer 0, then 1, ...; each layer's weights are read once.

Besides the hidden states only one layer's attention and shared weights (and the next one's, being read) and two routed
experts are in memory, whatever the number of layers.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Protocol

import torch
from tokenizers import Tokenizer

from quantkit.models.config import ModelConfig
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.experts.streamed import ALONE, Turns
from quantkit.runtime.freed import return_freed
from quantkit.runtime.indexer import Selection
from quantkit.runtime.layers import FeedForward, LayerWeights, Linear, attention, feed_forward, rms_norm, token_weight
from quantkit.runtime.mtp import Entrance
from quantkit.runtime.room import Room
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import Angles
from quantkit.runtime.watch import Watcher

ATTENTION_TOKENS = 2048  # tokens whose attention is computed together
HEAD_ELEMENTS = 1 << 25  # logits held at once: 128 MB as float32


class StreamsLayer(FeedForward, Protocol):
    """A layer between several residual streams: `compressed.CompressedLayer`."""

    def attend(self, hidden: torch.Tensor, config: ModelConfig, n_chunks: int, watcher: Watcher | None) -> None:
        """The attention half, in place on hidden [n_chunk, t, width], so many chunks at a time."""

    def ffn_inputs(self, hidden: torch.Tensor, config: ModelConfig, out: torch.Tensor, n_tokens: int) -> None:
        """Normed inputs of the feed-forward into out [m, d], of hidden [m, width], so many tokens at a time."""

    def take_up(self, hidden: torch.Tensor, y: torch.Tensor, config: ModelConfig, n_tokens: int) -> None:
        """The feed-forward's output y [m, d] into hidden [m, width], in place."""


Layer = LayerWeights | StreamsLayer
"""The weights of one layer of any family."""


class Source(Protocol):
    """A model whose layers can be loaded one at a time."""

    name: str
    config: ModelConfig
    device: torch.device
    dtype: torch.dtype

    def tokenizer(self) -> Tokenizer:
        """The model's own."""

    def fingerprint(self) -> str:
        """Identity of the weights."""

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32)."""

    def layer(self, layer: int, turns: Turns = ALONE) -> Layer:
        """Its weights, read now but for routed experts. turns: how ranks share those that are streamed."""

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm, output matrix."""

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the output norm is taken of, [..., d], of hidden states [..., width]: the same, but for a model with
        several residual streams."""

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, d] in the compute dtype."""

    def layer_bytes(self) -> list[int]:
        """What is read of each layer."""


class Pass:
    """What the layers of a pass share: the model, the positions, what indexers chose for chunks whose attention is
    computed together, and arrays made once in the pass's room: hidden [n_chunk, t, width], and inputs and sums of the
    feed-forward [n_chunk t, d]. tokens int64 [n_chunk t]."""

    def __init__(self, source: Source, tokens: torch.Tensor, room: Room):
        n_chunk, t = tokens.shape
        self.source, self.tokens, d = source, tokens.flatten(), source.config.d
        self.angles = angles(source.config, torch.arange(t, device=source.device))
        self.chosen = [Selection() for _ in range(0, n_chunk, _chunks(t))]
        self.hidden = room.empty((n_chunk, t, source.config.width), room.hidden)
        self.inputs = room.empty((n_chunk * t, d), source.dtype)
        # A float32 sum for float32 hidden states; bfloat16 ones (large jobs) are summed as R1's own inference does.
        self.sums = room.empty((n_chunk * t, d), room.hidden)

    def behind(self, entrance: Entrance, watcher: Watcher | None) -> "Pass":
        """Of the MTP layer: hidden states become its inputs, in the same arrays. A chunk's last token has none after
        it, so chunks are one token shorter."""
        source, made, (n_chunk, t, d) = self.source, copy(self), self.hidden.shape
        made.angles = Angles(self.angles.cos[: t - 1], self.angles.sin[: t - 1])
        made.chosen = [Selection() for _ in range(0, n_chunk, _chunks(t - 1))]
        made.hidden, following = (
            array.view(-1, d)[: n_chunk * (t - 1)].view(n_chunk, t - 1, d) for array in (self.hidden, self.sums)
        )
        made.inputs, made.sums = (array[: n_chunk * (t - 1)] for array in (self.inputs, self.sums))
        tokens = self.tokens.view(n_chunk, t)[:, 1:]
        made.tokens = tokens.flatten()
        source.embed(tokens, out=following)
        norm, eps = source.output_norm(), source.config.rms_eps
        for i in range(0, n_chunk, step := _chunks(t)):  # no row is overwritten before it was read
            seen = rms_norm(self.hidden[i : i + step, :-1].to(source.device, torch.float32), norm, eps)
            after = following[i : i + step].to(source.device, torch.float32)
            both = (rms_norm(after, entrance.enorm, eps), rms_norm(seen, entrance.hnorm, eps))
            x = torch.cat(both, dim=-1).flatten(0, 1).to(source.dtype)
            out = entrance.eh_proj(x)
            if watcher:
                watcher.observe("nextn.eh_proj", x, token_weight(out))
            made.hidden[i : i + step] = out.view(-1, t - 1, d).to(made.hidden.device, made.hidden.dtype)
        return made


@dataclass
class Step:
    """One layer of the stream, with its weights. hidden [n_chunk, t, width]: what goes into the layer, and after
    `compute` what comes out of it."""

    layer: int
    weights: Layer
    shared: Pass
    computed: bool = False

    @property
    def hidden(self) -> torch.Tensor:
        """Of all steps the same array."""
        return self.shared.hidden

    def compute(self, watcher: Watcher | None = None) -> torch.Tensor:
        """Attention, then feed-forward, in place; returns hidden. watcher: is told of all inputs on the way."""
        if not isinstance(self.weights, LayerWeights):
            return self._compute_streams(self.weights, watcher)
        if self.weights.mtp:
            self.shared = self.shared.behind(self.weights.mtp, watcher)
        shared, hidden = self.shared, self.shared.hidden
        source = shared.source
        apply_attention(hidden, self.weights, source.config, shared.angles, watcher, shared.chosen)
        return_freed()
        x = ffn_input(hidden, self.weights, source, shared.inputs)
        weight = torch.cat([token_weight(part.to(source.device)) for part in hidden.split(1)]) if watcher else None
        flat = hidden.view(-1, hidden.shape[-1])
        flat += feed_forward(x, self.weights, source.config, shared.sums, watcher, weight)
        return_freed()
        self.computed = True
        return hidden

    def _compute_streams(self, layer: StreamsLayer, watcher: Watcher | None) -> torch.Tensor:
        shared, hidden = self.shared, self.shared.hidden
        source, flat = shared.source, hidden.view(-1, hidden.shape[-1])
        layer.attend(hidden, source.config, _chunks(hidden.shape[1]), watcher)
        layer.ffn_inputs(flat, source.config, shared.inputs, ATTENTION_TOKENS)
        weight = torch.cat([token_weight(part.to(source.device)) for part in hidden.split(1)]) if watcher else None
        y = feed_forward(shared.inputs, layer, source.config, shared.sums, watcher, weight, shared.tokens)
        layer.take_up(flat, y, source.config, ATTENTION_TOKENS)
        self.computed = True
        return hidden


def stream(
    source: Source,
    tokens: torch.Tensor,
    *,
    hidden: torch.Tensor | None = None,
    start: int = 0,
    room: Room | None = None,
    turns: Turns = ALONE,
    mtp: bool = False,
) -> Iterator[Step]:
    """Tokens int64 [n_chunk, t] (independent chunks) through the layers: a step for each, in order, to be computed
    before the next one is taken. The next layer's weights are read meanwhile.

    hidden, start: resume with these states before layer `start`. room: where hidden states live (default: float32 on
    the source's device). turns: how ranks share routed experts. mtp: also through the layer behind the last, if the
    model has one, whose hidden states are [n_chunk, t - 1, d].
    """
    shared = Pass(source, tokens, room or Room("device", source.device))
    if hidden is None:
        embedded(source, tokens, shared.hidden, shared.inputs)
    elif start <= source.config.n_layer:  # else all is computed
        shared.hidden.copy_(hidden)
    layers = range(start, source.config.n_block if mtp else source.config.n_layer)
    for layer, weights in zip(layers, read_ahead(partial(source.layer, turns=turns), layers), strict=True):
        step = Step(layer, weights, shared)
        yield step
        if not step.computed:
            raise RuntimeError(f"layer {layer} was not computed")


def embedded(
    source: Source, tokens: torch.Tensor, out: torch.Tensor | None = None, spare: torch.Tensor | None = None
) -> torch.Tensor:
    """Hidden states before the first layer, [n_chunk, t, width] in `out` (default: new, float32), of tokens int64
    [n_chunk, t]: each stream begins as the embedding. spare [n_chunk t, d]: where that may be made."""
    if source.config.streams is None:
        return source.embed(tokens, out=out)
    found = source.embed(tokens, out=None if spare is None else spare.view(*tokens.shape, -1))
    if out is None:
        return found.repeat(1, 1, source.config.streams.n)
    for to, chunk in zip(out, found, strict=True):
        to.copy_(chunk.repeat(1, source.config.streams.n))
    return out


def job_of(source: Source, tokens: torch.Tensor) -> str:
    """Identity of a pass, for what it saves: weights, tokens int64 [n_chunk, t] and arithmetic (sha256, hex)."""
    facts = f"{source.fingerprint()} {source.dtype} {source.device.type} {tuple(tokens.shape)} "
    return hashlib.sha256(facts.encode() + tokens.numpy().tobytes()).hexdigest()


def apply_attention(
    hidden: torch.Tensor,
    weights: LayerWeights,
    config: ModelConfig,
    angles: Angles,
    watcher: Watcher | None = None,
    chosen: Sequence[Selection] | None = None,
) -> None:
    """The attention half of a layer, in place on hidden [n_chunk, t, d], a few chunks at a time. chosen: for each few,
    what the layers' indexers leave to others."""
    parts = hidden.split(_chunks(hidden.shape[1]))
    for part, own in zip(parts, chosen or repeat(None, len(parts)), strict=True):
        h = part.to(angles.cos.device)
        part += attention(h, weights, config, angles, watcher=watcher, chosen=own).to(part.device)


def _chunks(t: int) -> int:
    """Chunks of t tokens whose attention is computed together."""
    return max(1, ATTENTION_TOKENS // t)


def ffn_input(
    hidden: torch.Tensor, weights: LayerWeights, source: Source, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Normed input of the feed-forward for all tokens, [n, d] in the compute dtype, where `hidden` is."""
    if out is None:
        shape = (hidden.shape[0] * hidden.shape[1], hidden.shape[2])
        out = torch.empty(shape, dtype=source.dtype, device=hidden.device)
    for to, part in zip(out.split(ATTENTION_TOKENS), hidden.view_as(out).split(ATTENTION_TOKENS), strict=True):
        to.copy_(rms_norm(part.to(source.device), weights.ffn_norm, source.config.rms_eps))
    return out


def final_hidden(
    source: Source, tokens: torch.Tensor, progress: Callable[[int], None] | None = None, room: Room | None = None
) -> torch.Tensor:
    """Hidden states after the last layer, [n_chunk, t, width], before the output norm. progress: told of each layer."""
    hidden = None
    for step in stream(source, tokens, room=room):
        hidden = step.compute()
        if progress:
            progress(step.layer)
    assert hidden is not None
    return hidden


def head_tiles(source: Source, head: tuple[torch.Tensor, Linear], hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 logits of hidden [n, width] in tiles of rows; nothing of size tokens x vocabulary is ever held. head: the
    source's, loaded: (output norm, output matrix)."""
    step = max(1, HEAD_ELEMENTS // source.config.n_vocab)
    for part in hidden.split(step):
        yield head_logits(source, head, part)


def head_logits(source: Source, head: tuple[torch.Tensor, Linear], hidden: torch.Tensor) -> torch.Tensor:
    """float32 logits [..., n_vocab] of hidden [..., width], all at once."""
    norm, output = head
    return output(rms_norm(source.merge(hidden), norm, source.config.rms_eps).to(source.dtype)).float()
