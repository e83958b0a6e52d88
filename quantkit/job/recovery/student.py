"""The student of recovery: a quantized file, read layer by layer, in which some tensors are what tuning has made."""

from dataclasses import replace

import torch

from quantkit.codecs.registry import in_groups
from quantkit.job.recovery.passes import SHARED
from quantkit.job.recovery.tuned import Tuned
from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns, expert_names
from quantkit.runtime.layers import LayerExperts, LayerWeights, Linear, with_mla
from quantkit.runtime.packed import Packed, use_kernels
from quantkit.runtime.sources.gguf import Dequantized, GGUFSource, GGUFWeights
from quantkit.runtime.watch import Projections


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

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`. On a GPU they travel as they are packed, and are decoded there: a step decodes them twice."""
        file, names = self.weights.file, expert_names(layer)
        packed = use_kernels(self.device.type) and all(in_groups(file.tensors[name].qtype) for name in names)

        def one(name: str, e: int) -> torch.Tensor:
            made = self.packed_expert(name, e) if packed else self._expert(name, file.matrix(name, e))
            return self.tuned.rescale(name, e, made)

        def read(e: int) -> Projections:
            gate, up, down = (one(name, e) for name in names)
            return gate, up, down

        return StreamedExperts(read, self.weights.config.n_expert, replace(turns, ahead=2) if packed else turns)

    def packed_expert(self, name: str, e: int) -> torch.Tensor:
        """One matrix of a stack, read into memory that a GPU can take it from, decoded on the device."""
        tensor = self.weights.file.tensors[name]
        shape, pinned = (tensor.shape[1], tensor.row_bytes), self.device.type == "cuda"
        data = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        self.weights.file.read_into(name, e, data.numpy(), keep=True)
        return Packed(tensor.qtype, data.to(self.device)[None], tensor.shape[-1], self.dtype).dense()[0]

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
        return with_mla(source.layer(layer, SHARED)), leaves

    def opened_head(self) -> tuple[tuple[torch.Tensor, Linear], dict[str, torch.Tensor]]:
        """As `TunedSource`."""
        source, leaves = self._leaving()
        return source.head(), leaves

    def _leaving(self) -> tuple[GGUFSource, dict[str, torch.Tensor]]:
        leaves: dict[str, torch.Tensor] = {}
        return GGUFSource(self.weights, TunedProducts(self.weights, self.tuned, self.dtype, leaves)), leaves
