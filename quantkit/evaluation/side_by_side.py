"""Two models through the same tokens, a layer at a time in step: where the error comes from, and how it grows."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.room import Room
from quantkit.runtime.stream import Source, embedded, stream

PROBE_TOKENS = 4096  # tokens over which each layer's own error is measured
OUTLIER, OUTLIER_LEAST = 2.5, 0.05  # a layer stands out: so many times the median own error, and no less than this
MOST_OWN = 0.95  # an update that is as wrong as none at all


class NotFinite(QuantkitError):
    """A file whose numbers are none."""

    def __init__(self, name: str, where: str) -> None:
        super().__init__(f"{name}: {where} computes numbers that are not finite; `quantkit certify` names the tensor")


@dataclass(frozen=True)
class LayerError:
    """How far one layer is from the original's.

    error: of the hidden state after it, what earlier layers did wrong included: root mean square over tokens of
    |h_quantized - h| / |h|. own: what this layer alone does wrong, given the original's hidden states: the same of
    its update, over the probe chunks.
    """

    layer: int
    error: float
    own: float


class SideBySide:
    """Two models through the same tokens int64 [n_chunk, t], layer by layer in step; one read of both.

    The quantized stream carries the first chunks twice: the copies are reset to the original's states before every
    layer, so that each layer's own error is seen without what came before.
    After `run`: hidden states [n_chunk, t, d] of both sides after the last layer, and `errors` of all layers.
    """

    def __init__(
        self, reference: Source, source: Source, tokens: torch.Tensor, dtype: torch.dtype = torch.float32
    ) -> None:
        self.reference, self.source, self.tokens, self.dtype = reference, source, tokens, dtype
        self.n_probe = min(len(tokens), max(1, PROBE_TOKENS // tokens.shape[1]))
        self.errors: list[LayerError] = []

    def run(self, advance: Callable[[float], object]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [n_chunk, t, d] of the reference and of the source. NotFinite naming a layer that computes
        numbers that are none. advance: told thousands of tokens, of both, a layer."""
        n, k = len(self.tokens), self.n_probe
        theirs = embedded(self.reference, self.tokens).to(self.reference.device, self.dtype)
        ours = embedded(self.source, self.tokens).to(self.source.device, self.dtype)
        ours = torch.cat((ours, theirs[:k].to(ours.device)))
        before = theirs[:k].clone()
        doubled = torch.cat((self.tokens, self.tokens[:k]))
        streams = (
            stream(self.reference, self.tokens, hidden=theirs, room=room_of(self.reference, self.dtype)),
            stream(self.source, doubled, hidden=ours, room=room_of(self.source, self.dtype)),
        )
        for step, other in zip(*streams, strict=True):
            theirs, ours = step.compute(), other.compute()
            error = relative_error(theirs, ours[:n])
            own = relative_error(theirs[:k] - before, ours[n:].to(before.device) - before)
            if not (math.isfinite(error) and math.isfinite(own)):
                raise NotFinite(self.source.name, f"layer {step.layer}")
            self.errors.append(LayerError(step.layer, error, own))
            ours[n:] = theirs[:k]
            before.copy_(theirs[:k])
            advance(2 * self.tokens.numel() / 1e3)
        return theirs, ours[:n]


def room_of(source: Source, dtype: torch.dtype) -> Room:
    """For hidden states of this dtype where the source's weights are."""
    return Room("device", source.device, hidden=dtype)


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over tokens of |other - reference| / |reference|, for [n_chunk, t, d]; BOS is left out, whose
    state is hundreds of times larger than any other."""
    total, n = 0.0, 0
    for a, b in zip(reference, other, strict=True):
        a, b = a[1:].float(), b[1:].to(a.device).float()
        norm = a.square().sum(-1).clamp_min(1e-20)
        total += float(((b - a).square().sum(-1) / norm).double().sum())
        n += len(a)
    return math.sqrt(total / max(1, n))


def bad_layers(errors: Sequence[LayerError]) -> list[int]:
    """Layers whose own error stands out: several times the median layer's, or an update that is mostly wrong."""
    if not errors:
        return []
    middle = statistics.median(layer.own for layer in errors)
    return [layer.layer for layer in errors if layer.own > max(OUTLIER * middle, OUTLIER_LEAST) or layer.own > MOST_OWN]
