"""Passes of recovery: text through a model layer by layer, going on where they stopped; how far two models diverge.

Ranks share the routed experts and compute all the rest each; rank 0 alone writes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit import ranks
from quantkit.calibration.spill import Spill
from quantkit.progress import Advance
from quantkit.runtime.experts.streamed import Turns
from quantkit.runtime.room import Room
from quantkit.runtime.stream import HEAD_ELEMENTS, Source, Step, head_logits, stream

SHARED = Turns(shared=True)


def compute(step: Step) -> torch.Tensor:
    """Of `forward`: nobody looks on."""
    return step.compute()


@torch.no_grad()
def forward(
    source: Source,
    tokens: torch.Tensor,
    room: Room,
    spill: Spill,
    keep: bool = False,
    visit: Callable[[Step], torch.Tensor] = compute,
    advance: Advance = lambda amount=1, at="", before=False: None,
) -> None:
    """Tokens int64 [n_chunk, t] through all layers; goes on where an earlier call stopped. What the last layer makes is
    left in the spill as `inputs(n_layer)`, with the inputs of all layers before if they are to be kept.

    visit: computes the layer, and returns what `Step.compute` did."""
    c, hidden = source.config, None
    first = ranks.agree(lambda: next((i for i in range(c.n_layer, -1, -1) if spill.has(inputs(i))), -1))
    begun, first = first >= 0, max(0, first)
    advance(first, before=True)
    if first == c.n_layer:
        return
    if begun:
        hidden = torch.empty((*tokens.shape, c.d), dtype=room.hidden)
        spill.read(inputs(first), hidden)
    for step in stream(source, tokens, hidden=hidden, start=first, room=room, turns=SHARED):
        hidden = None
        if keep and step.layer == 0:
            spill.put(inputs(0), step.hidden)
        made = visit(step)
        spill.put(inputs(step.layer + 1), made)
        if not keep:
            spill.drop(inputs(step.layer))
        advance(1)
    ranks.barrier()  # all read what rank 0 has put


@dataclass(frozen=True)
class Target:
    """The original's hidden states after its last layer, for all chunks of the text, [n_chunk, t, d]: a mapped file."""

    original: Source
    hidden: torch.Tensor

    @classmethod
    def load(cls, original: Source, shape: torch.Size, dtype: torch.dtype, spill: Spill) -> "Target":
        """From where `forward` left it, for tokens of this shape."""
        c = original.config
        return cls(original, spill.mapped(inputs(c.n_layer), torch.Size((*shape, c.d)), dtype))

    def of(self, chunks: torch.Tensor) -> "Divergence":
        """chunks: numbers of some chunks, in an order."""
        return Divergence(self, chunks)


class Divergence:
    """KL(original || student) of the next token, over all positions of some chunks; `total` adds up what was asked."""

    def __init__(self, target: Target, chunks: torch.Tensor):
        self.original, self.head = target.original, target.original.head()
        t = target.hidden.shape[1]
        self.hidden, self.chunks, self.t = target.hidden, chunks, t
        self.n, self.total = len(chunks) * t, 0.0

    def _log_p(self, rows: slice) -> torch.Tensor:
        number = torch.arange(rows.start, rows.stop)
        hidden = self.hidden[self.chunks[number // self.t], number % self.t].to(self.original.device, torch.float32)
        return head_logits(self.original, self.head, hidden).log_softmax(-1)

    @torch.no_grad()
    def of(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """KLD of each row, float32 [m]."""
        log_p, log_q = self._log_p(rows), logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

    @torch.no_grad()
    def gradient(self, rows: slice, logits: torch.Tensor) -> torch.Tensor:
        """As `backward.Loss`, of the mean over positions: (q - p) / n."""
        log_p, log_q = self._log_p(rows), logits.log_softmax(-1)
        p = log_p.exp()
        self.total += float((p * (log_p - log_q)).sum())
        return (log_q.exp_() - p) / self.n


@torch.no_grad()
def measure(source: Source, tokens: torch.Tensor, target: Target, chunks: torch.Tensor, room: Room) -> float:
    """Mean KLD over the second halves of these chunks, tokens int64 [n_chunk, t]."""
    hidden = torch.empty(0)
    for step in stream(source, tokens, room=room, turns=SHARED):
        hidden = step.compute()
    return ranks.agree(lambda: _divergence(source, hidden, target, chunks))


def _divergence(source: Source, hidden: torch.Tensor, target: Target, chunks: torch.Tensor) -> float:
    """hidden [n_chunk, t, d]: the source's, after its last layer."""
    head, loss, flat = source.head(), target.of(chunks), hidden.flatten(0, 1)
    rows, found = max(1, HEAD_ELEMENTS // source.config.n_vocab), []
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows].to(source.device, torch.float32)
        found.append(loss.of(slice(start, start + len(part)), head_logits(source, head, part)).cpu())
    half = hidden.shape[1] // 2
    return float(torch.cat(found).view(hidden.shape[:2])[:, half:].double().mean())


def inputs(layer: int) -> str:
    """Name in a spill: hidden states before a layer, or after the last."""
    return f"inputs-{layer:03}"
