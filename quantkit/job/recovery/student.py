"""The student of recovery: a quantized file, read layer by layer, in which some tensors are what tuning has made."""

import torch

from quantkit.job.recovery.tuned import Tuned
from quantkit.runtime.layers import LayerWeights, Linear
from quantkit.runtime.sources.gguf import Dequantized, GGUFSource, GGUFWeights


class TunedProducts(Dequantized):
    """Products with the tensors as they are now. leaves: if given, is filled with those that move, by name, to derive
    with respect to."""

    def __init__(
        self, weights: GGUFWeights, tuned: Tuned, dtype: torch.dtype, leaves: dict[str, torch.Tensor] | None = None
    ):
        super().__init__(weights, tuned.device, dtype)
        self.tuned, self.leaves = tuned, leaves

    def vector(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self._made(name, torch.float32) if name in self.tuned.specs else super().vector(name)

    def matrix(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self._made(name, self.dtype) if name in self.tuned.specs else super().matrix(name)

    def _made(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        made = self.tuned.make(name, dtype)
        if self.leaves is not None:
            self.leaves[name] = made.requires_grad_()
        return made


class Student(GGUFSource):
    """`TunedSource` of the file as tuning has made it so far."""

    def __init__(self, weights: GGUFWeights, tuned: Tuned, dtype: torch.dtype):
        super().__init__(weights, TunedProducts(weights, tuned, dtype))
        self.tuned = tuned

    def opened(self, layer: int) -> tuple[LayerWeights, dict[str, torch.Tensor]]:
        """As `TunedSource`."""
        source, leaves = self._leaving()
        return source.layer(layer), leaves

    def opened_head(self) -> tuple[tuple[torch.Tensor, Linear], dict[str, torch.Tensor]]:
        """As `TunedSource`."""
        source, leaves = self._leaving()
        return source.head(), leaves

    def _leaving(self) -> tuple[GGUFSource, dict[str, torch.Tensor]]:
        leaves: dict[str, torch.Tensor] = {}
        return GGUFSource(self.weights, TunedProducts(self.weights, self.tuned, self.dtype, leaves)), leaves
