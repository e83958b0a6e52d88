"""One step of recovery: text forward through the student, its divergence from the original backward, what moves moved.

The layers' inputs are spilled on the way up. On the way down a layer is moved as soon as its gradient is known: its new
values are written beside the old ones, then the gradient at its input, which says that they hold. So a step goes on, to
the same bytes, wherever it was stopped, by any number of ranks, and no more than a layer is in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit import ranks
from quantkit.calibration.spill import Spill
from quantkit.codecs.format import SUPERBLOCK
from quantkit.errors import QuantkitError
from quantkit.job.recovery.passes import Target, forward, inputs
from quantkit.job.recovery.tuned import TunedSource
from quantkit.job.recovery.values import Update, Values
from quantkit.progress import Advance
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.backward import Backward, ExpertGradients, Leaves, Silent
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.room import Room


@dataclass(frozen=True)
class TrainingStep:
    """tokens int64 [n_chunk, t]: the step's chunks, whose numbers in the target are `chunks`. spill: of this step."""

    student: TunedSource
    tokens: torch.Tensor
    chunks: torch.Tensor
    target: Target
    room: Room
    spill: Spill

    def run(self, how: Update, advance: Advance) -> float | None:
        """The student's values after the step are those of `tuned.values`. The mean KLD before it, if this call has
        seen it; advance: is told of layers, each twice."""
        n_layer, spill, values = self.student.config.n_layer, self.spill, self.student.tuned.values
        layers = range(n_layer + 1)
        done = ranks.agree(lambda: next((layer for layer in layers if spill.has(gradient(layer))), None))
        ranks.agree(lambda: values.settle(n_layer + 1 if done is None else done))
        if done is None:
            forward(self.student, self.tokens, self.room, spill, keep=True, advance=advance)
        else:
            advance(n_layer, before=True)
        shape = self.tokens.shape[0], self.tokens.shape[1]
        back, found = Backward(self.student, shape, 1, self.room.another()), None
        if done is None:
            found = self._head(back, how)
            done = n_layer
        else:
            advance(n_layer - done, before=True)
            if done:
                spill.read(gradient(done), back.gradient)
        layers = range(done - 1, -1, -1)
        for layer, (weights, tensors) in zip(layers, read_ahead(self.student.opened, layers), strict=True):
            spill.read(inputs(layer), back.hidden)
            scales = ExpertScales(values, layer, back.gradient, self.student.device)
            back.layer(weights, scales, leaves := Leaves(tensors))
            self._move(layer, self._deltas(leaves) | scales.found(), back, how)
            spill.drop(gradient(layer + 1))
            advance(1)
        return found

    def _head(self, back: Backward, how: Update) -> float:
        n_layer, loss = self.student.config.n_layer, self.target.of(self.chunks)
        self.spill.read(inputs(n_layer), back.hidden)
        head, tensors = self.student.opened_head()
        leaves = Leaves(tensors)
        back.head_by(head, loss.gradient, leaves)
        self._move(n_layer, self._deltas(leaves), back, how)
        return loss.total / loss.n

    def _deltas(self, leaves: Leaves) -> dict[str, torch.Tensor]:
        """Gradients as `Values.update` takes them."""
        found, to_delta = leaves.gradients, self.student.tuned.to_delta
        for name, leaf in zip(leaves.names, leaves.tensors, strict=True):
            found[name] = to_delta(name, found[name], leaf.detach())
        return found

    def _move(self, layer: int, found: dict[str, torch.Tensor], back: Backward, how: Update) -> None:
        """What moves of a layer, then the gradient at its input, which makes that hold."""
        values = self.student.tuned.values
        if not all(bool(g.isfinite().all()) for g in (back.gradient, *found.values())):
            raise QuantkitError(f"recovery: the gradient of layer {layer} is not finite")
        values.update(layer, found, how)
        self.spill.put(gradient(layer), back.gradient if layer else back.gradient[:, :1])
        ranks.agree(lambda: values.commit(layer))  # when all have read what was there before


class ExpertScales(Silent):
    """Adds up the gradient by the logarithm of each superblock's scale, Σ ∂ℓ/∂w · w over its weights: of those matrices
    of one layer whose scales move. at_output: gradient of the layer's output, float32 [1, n, d]. An expert's matrix is
    the largest array that is made on the way; what is kept is a 256th of the layer."""

    def __init__(self, values: Values, layer: int, at_output: torch.Tensor, device: torch.device):
        self.at_output, self.names = at_output, expert_names(layer)
        specs = {spec.name: spec for spec in values.specs.get(layer, ()) if spec.is_routed}
        self.sums = {
            name: torch.zeros(*spec.shape[:2], spec.n_in // SUPERBLOCK, device=device) for name, spec in specs.items()
        }
        self.used: list[int] = []

    def routed(self, counts: Sequence[int]) -> None:
        """As `Receiver`."""
        self.used = [e for e, count in enumerate(counts) if count]

    def expert(self, found: ExpertGradients) -> None:
        """As `Receiver`."""
        if not self.sums:
            return
        at_gate, at_up = found.inner[0].chunk(2, -1)
        at_down = self.at_output[0, found.tokens.to(self.at_output.device)].to(found.weight) * found.weight[:, None]
        outputs, inputs = (at_gate, at_up, at_down), (found.x, found.x, found.hidden)
        for name, at, x, matrix in zip(self.names, outputs, inputs, found.matrices, strict=True):
            if name in self.sums:
                by_weight = (at.to(matrix.dtype).T @ x.to(matrix.dtype)).float()
                self.sums[name][found.expert] += by_weight.mul_(matrix).unflatten(-1, (-1, SUPERBLOCK)).sum(-1)

    def found(self) -> dict[str, torch.Tensor]:
        """By name, [n_expert, n_out, n_in / 256]: on every rank what one alone would have found. After the layer."""
        for turn, e in enumerate(self.used):  # ranks derive the experts in turn
            for t in self.sums.values():
                ranks.spread(t[e], turn % ranks.count())
        return self.sums


def gradient(layer: int) -> str:
    """Name in a spill: gradient there."""
    return f"gradient-{layer:03}"
