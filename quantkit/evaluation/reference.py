"""The original's side of `verify`, a layer at a time beside another pass: each weight is read (or downloaded) once."""

from pathlib import Path

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.calibration.state import PassState
from quantkit.errors import QuantkitError
from quantkit.evaluation.divergence import scored
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import job_of, stream


class ReferencePass:
    """Evaluation text going through the original. Resumes at its layer, from `folder`.

    Memory: hidden states, float32 [n_chunk, t, d], and the weights of a layer as in any pass.
    """

    def __init__(self, source: CheckpointSource, chunks: Chunks, folder: Path) -> None:
        self.source, self.tokens = source, chunks.tokens
        self.state = PassState(folder, job_of(source, chunks.tokens))
        self.hidden, self.done = self._resume()
        self._steps = stream(source, self.tokens, hidden=self.hidden, start=self.done)

    def _resume(self) -> tuple[torch.Tensor | None, int]:
        try:
            return self.state.resume()
        except QuantkitError:  # of other text: this run's options decide
            self.state.remove()
            return None, 0

    @torch.inference_mode()
    def advance(self, n_layers: int) -> None:
        """Be through the first n_layers; those that predict the token after the next are no part of it."""
        while self.done < min(n_layers, self.source.config.n_layer):
            step = next(self._steps)
            self.hidden, self.done = step.compute(), step.layer + 1
            self.state.save(step.layer, self.hidden, {})

    def scored(self) -> torch.Tensor:
        """Final hidden states whose next token is scored, float32 [n, d]; does what is left of the pass."""
        self.advance(self.source.config.n_layer)
        assert self.hidden is not None
        return scored(self.hidden)
