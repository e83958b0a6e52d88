"""One step of recovery: text forward through the student, its divergence from the original backward, what moves moved.

The layers' inputs are spilled on the way up. On the way down a layer is moved as soon as its gradient is known: its new
values are written beside the old ones, then the gradient at its input, which says that they hold. So a step goes on, to
the same bytes, wherever it was stopped, and no more than a layer is in memory.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.calibration.spill import Spill
from quantkit.errors import QuantkitError
from quantkit.job.recovery.student import Student, is_norm
from quantkit.progress import Advance
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.backward import Backward, Leaves, Silent
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import HEAD_ELEMENTS, Source, Step, head_logits, stream


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
    advance: Advance = lambda amount=1: None,
) -> None:
    """Tokens int64 [n_chunk, t] through all layers; goes on where an earlier call stopped. What the last layer makes is
    left in the spill as `inputs(n_layer)`, with the inputs of all layers before if they are to be kept.

    visit: computes the layer, and returns what `Step.compute` did."""
    c, hidden = source.config, None
    first = next((i for i in range(c.n_layer, -1, -1) if spill.has(inputs(i))), 0)
    advance(first)
    if first == c.n_layer:
        return
    if spill.has(inputs(first)):
        hidden = torch.empty((*tokens.shape, c.d), dtype=room.hidden)
        spill.read(inputs(first), hidden)
    for step in stream(source, tokens, hidden=hidden, start=first, room=room):
        hidden = None
        if keep and step.layer == 0:
            spill.put(inputs(0), step.hidden)
        made = visit(step)
        spill.put(inputs(step.layer + 1), made)
        if not keep:
            spill.drop(inputs(step.layer))
        advance(1)


@dataclass(frozen=True)
class Target:
    """The original's hidden states after its last layer, for all chunks of the text, [n_chunk, t, d]: a mapped file."""

    original: CheckpointSource
    hidden: torch.Tensor

    @classmethod
    def load(cls, original: CheckpointSource, shape: torch.Size, dtype: torch.dtype, path: Path) -> "Target":
        """From where `forward` left it, for tokens of this shape."""
        whole = (*shape, original.config.d)
        flat = torch.from_file(str(path), shared=False, size=shape.numel() * original.config.d, dtype=dtype)
        return cls(original, flat.view(whole))

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
def divergence(source: Source, hidden: torch.Tensor, target: Target, chunks: torch.Tensor) -> float:
    """Mean KLD over the second halves of these chunks. hidden [n_chunk, t, d]: the source's, after its last layer."""
    head, loss, flat = source.head(), target.of(chunks), hidden.flatten(0, 1)
    rows, found = max(1, HEAD_ELEMENTS // source.config.n_vocab), []
    for start in range(0, len(flat), rows):
        part = flat[start : start + rows].to(source.device, torch.float32)
        found.append(loss.of(slice(start, start + len(part)), head_logits(source, head, part)).cpu())
    half = hidden.shape[1] // 2
    return float(torch.cat(found).view(hidden.shape[:2])[:, half:].double().mean())


@dataclass(frozen=True)
class Update:
    """rate: in units of what moves. betas: of Lion."""

    rate: float
    betas: tuple[float, float]


@dataclass(frozen=True)
class TrainingStep:
    """tokens int64 [n_chunk, t]: the step's chunks, whose numbers in the target are `chunks`. spill: of this step."""

    student: Student
    tokens: torch.Tensor
    chunks: torch.Tensor
    target: Target
    room: Room
    spill: Spill

    def run(self, how: Update, advance: Advance) -> float | None:
        """The student's values after the step are those of `tuned.values`. The mean KLD before it, if this call has
        seen it; advance: is told of layers, each twice."""
        n_layer, spill, values = self.student.config.n_layer, self.spill, self.student.tuned.values
        done = next((layer for layer in range(n_layer + 1) if spill.has(gradient(layer))), None)
        values.settle(n_layer + 1 if done is None else done)
        if done is None:
            forward(self.student, self.tokens, self.room, spill, keep=True, advance=advance)
        else:
            advance(n_layer)
        shape = self.tokens.shape[0], self.tokens.shape[1]
        back, found = Backward(self.student, shape, 1, self.room.another()), None
        if done is None:
            found = self._head(back, how)
            done = n_layer
        else:
            advance(n_layer - done)
            if done:
                spill.read(gradient(done), back.gradient)
        layers = range(done - 1, -1, -1)
        for layer, (weights, leaves) in zip(layers, read_ahead(self.student.opened, layers), strict=True):
            spill.read(inputs(layer), back.hidden)
            back.layer(weights, Silent(), leaves)
            self._move(layer, leaves, back, how)
            spill.drop(gradient(layer + 1))
            advance(1)
        return found

    def _head(self, back: Backward, how: Update) -> float:
        n_layer, loss = self.student.config.n_layer, self.target.of(self.chunks)
        self.spill.read(inputs(n_layer), back.hidden)
        head, leaves = self.student.opened_head()
        back.head_by(head, loss.gradient, leaves)
        self._move(n_layer, leaves, back, how)
        return loss.total / loss.n

    def _move(self, layer: int, leaves: Leaves, back: Backward, how: Update) -> None:
        """What moves of a layer, then the gradient at its input, which makes that hold."""
        values, found = self.student.tuned.values, leaves.gradients
        if not all(bool(g.isfinite().all()) for g in (back.gradient, *found.values())):
            raise QuantkitError(f"recovery: the gradient of layer {layer} is not finite")
        for name, leaf in zip(leaves.names, leaves.tensors, strict=True):
            if is_norm(self.student.tuned.specs[name]):
                found[name] *= leaf.detach()  # of its logarithm
        values.update(layer, found, how.rate, how.betas)
        self.spill.put(gradient(layer), back.gradient if layer else back.gradient[:, :1])
        values.commit(layer)


def inputs(layer: int) -> str:
    """Name in a spill: hidden states before a layer, or after the last."""
    return f"inputs-{layer:03}"


def gradient(layer: int) -> str:
    """Name in a spill: gradient there."""
    return f"gradient-{layer:03}"
