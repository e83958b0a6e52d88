"""Layer-synchronous execution: all tokens pass through layer 0, then 1, ...; each layer's weights are loaded once."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from quantkit.runtime.layers import Block, Observer, attention, feed_forward, rms_norm
from quantkit.runtime.rope import angles
from quantkit.runtime.sources import Source

ATTENTION_TOKENS = 2048  # tokens whose attention is computed together
HEAD_ELEMENTS = 1 << 25  # logits held at once: 128 MB as float32


@dataclass
class Layer:
    """One step of the stream: the block that was applied to hidden [n_chunk, t, d] in place."""

    index: int
    block: Block
    hidden: torch.Tensor


def stream(source: Source, tokens: torch.Tensor,
           before: Callable[[int, Block], Observer | None] | None = None) -> Iterator[Layer]:  # fmt: skip
    """Run tokens int64 [n_chunk, t] (independent chunks) through all layers, yielding after each.

    before: called with a freshly loaded block; may attach observers to it and returns the observer of its inputs.
    """
    hidden = source.embed(tokens.to(source.device))
    cos, sin = angles(source.config, torch.arange(tokens.shape[1], device=source.device))
    for index in range(source.config.n_layer):
        block = source.block(index)
        observe = before(index, block) if before else None
        apply_block(hidden, block, source, cos, sin, observe)
        yield Layer(index, block, hidden)


def apply_block(hidden: torch.Tensor, block: Block, source: Source, cos: torch.Tensor, sin: torch.Tensor,
                observe: Observer | None = None) -> None:  # fmt: skip
    """One layer, in place, on hidden [n_chunk, t, d]: attention a few chunks at a time, the experts once for all."""
    n_chunk, t, d = hidden.shape
    step = max(1, ATTENTION_TOKENS // t)
    for begin in range(0, n_chunk, step):
        part = hidden[begin : begin + step]
        part += attention(part, block, source.config, cos, sin, observe=observe)
    flat = hidden.view(-1, d)
    x = rms_norm(flat, block.ffn_norm, source.config.rms_eps)
    flat += feed_forward(x, block, source.config, observe)


def final_hidden(source: Source, tokens: torch.Tensor, progress: Callable[[int], None] | None = None) -> torch.Tensor:
    """Hidden states after the last layer, [n_chunk, t, d], before the output norm."""
    hidden = None
    for layer in stream(source, tokens):
        hidden = layer.hidden
        if progress:
            progress(layer.index)
    assert hidden is not None
    return hidden


def logit_tiles(source: Source, hidden: torch.Tensor) -> Iterator[torch.Tensor]:
    """float32 logits of hidden [n, d] in tiles of rows; nothing of size tokens x vocabulary is ever held."""
    norm, output = source.head()
    step = max(1, HEAD_ELEMENTS // source.config.n_vocab)
    for part in hidden.split(step):
        yield output(rms_norm(part, norm, source.config.rms_eps)).float()
