"""What moves of a file, and what it is now.

The embedding stays the file's. Norms and routers (F32 in the file) move from the file's values; matrices of FINE_BITS
and more outside of the routed experts move from the original's, which are read again from the checkpoint, and are
encoded once more in the end. Of coarser matrices and of routed experts the superblocks' scales move: their codes stay,
for their rounding is larger than any move of a weight.
"""

from collections.abc import Mapping
from typing import Literal, Protocol

import numpy as np
import torch

from quantkit.codecs import types as qtypes
from quantkit.codecs.format import SUPERBLOCK
from quantkit.codecs.registry import FORMATS
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml import quants
from quantkit.job.recovery.values import ByLayer, Values
from quantkit.models import family
from quantkit.models.config import ModelConfig, mla_of
from quantkit.planning.plan import PlannedTensor
from quantkit.runtime.layers import LayerWeights, Linear
from quantkit.runtime.stream import Source
from quantkit.tensors import TensorSpec

FINE_BITS = 4.0
Tensors = Mapping[str, GGUFTensor | PlannedTensor]
"""By name: of a file, or of a plan for one."""

Moves = Literal["experts", "matrices", "vectors"]
"""`vectors`: norms and routers move; `matrices`: fine matrices and scales of coarse ones too; `experts`: and the scales
of routed experts."""


def is_norm(spec: TensorSpec) -> bool:
    """Whether it moves in its logarithm."""
    return spec.role.endswith("_norm")


def is_fine(spec: TensorSpec, qtype: str) -> bool:
    """Whether it moves from the original's weights, to be encoded again."""
    if len(spec.shape) == 1 or spec.fixed or spec.is_routed or spec.role == "token_embd":
        return False
    return qtypes.stored(qtype).block_size > 1 and qtypes.get(qtype).bpw >= FINE_BITS


def is_scaled(spec: TensorSpec, qtype: str) -> bool:
    """Whether the scales of its superblocks move, in their logarithms."""
    matrix = len(spec.shape) > 1 and not (spec.fixed or spec.role == "token_embd")
    return matrix and qtype in FORMATS and not is_fine(spec, qtype)


def scaled(specs: ByLayer, tensors: Tensors) -> frozenset[str]:
    """Names of those among these."""
    return frozenset(s.name for some in specs.values() for s in some if is_scaled(s, tensors[s.name].qtype))


def moving(config: ModelConfig, tensors: Tensors, moves: Moves) -> dict[int, list[TensorSpec]]:
    """What moves of a file with these tensors, by layer, as `values.ByLayer`."""
    found: dict[int, list[TensorSpec]] = {}
    for spec in family.specs(config, mla_of(tensors)):
        if spec.name not in tensors or (spec.layer or 0) >= config.n_layer:
            continue  # tied output; an MTP layer, which no step of it reaches
        qtype = tensors[spec.name].qtype
        asked = moves == "experts" if spec.is_routed else moves != "vectors"
        matrix = asked and (is_fine(spec, qtype) or is_scaled(spec, qtype))
        if matrix or is_norm(spec) or spec.role == "ffn_gate_inp":
            found.setdefault(config.n_layer if spec.layer is None else spec.layer, []).append(spec)
    return found


class Tuned:
    """The tensors that move, as they are now."""

    def __init__(self, file: GGUFFile, checkpoint: Checkpoint, values: Values, device: torch.device):
        self.file, self.checkpoint, self.values, self.device = file, checkpoint, values, device
        self.config = family.from_gguf(file.metadata)
        self.specs = {spec.name: spec for some in values.specs.values() for spec in some}
        self._units: dict[str, float] = {}

    def at(self, values: Values) -> "Tuned":
        """The same tensors with other values."""
        return Tuned(self.file, self.checkpoint, values, self.device)

    def make(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        """On the device, in its own shape: so many rows at a time are read, moved and rounded."""
        spec = self.specs[name]
        out = torch.empty((spec.n_rows, spec.n_in), dtype=dtype, device=self.device)
        for start, stop in family.slices(spec):
            out[start:stop] = self.rows(spec, start, stop)
        return out.view(spec.shape)

    def rows(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_in] on the device, of one of `family.slices`."""
        rows, delta = self._base(spec, start, stop), self.values.delta(spec, start, stop)
        if delta is None:
            return rows
        by = delta.to(self.device, torch.float32)
        if spec.name in self.values.scales:
            return (rows.unflatten(-1, (-1, SUPERBLOCK)) * by.exp()[..., None]).flatten(-2)
        return rows * by.exp() if is_norm(spec) else rows + by * self.unit(spec)

    def rescale(self, name: str, expert: int, matrix: torch.Tensor) -> torch.Tensor:
        """A routed expert's matrix [n_out, n_in], as the file has it, under the scales that it has now: in place."""
        if name in self.values.scales:
            spec, n_out = self.specs[name], len(matrix)
            delta = self.values.delta(spec, expert * n_out, (expert + 1) * n_out)
            if delta is not None:
                matrix.view(n_out, -1, SUPERBLOCK).mul_(delta.to(matrix.device, torch.float32).exp()[..., None])
        return matrix

    def to_delta(self, name: str, gradient: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
        """Gradient with respect to what was made of a tensor, float32 -> with respect to its delta, but for a positive
        factor."""
        if name in self.values.scales:
            return (gradient * made).unflatten(-1, (-1, SUPERBLOCK)).sum(-1)
        return gradient * made if is_norm(self.specs[name]) else gradient

    def unit(self, spec: TensorSpec) -> float:
        """Standard deviation of what a tensor moves from."""
        if spec.name not in self._units:
            total = squares = 0.0
            for start, stop in family.slices(spec):
                rows = self._base(spec, start, stop)
                total += float(rows.sum(dtype=torch.float64))
                squares += float(rows.square().sum(dtype=torch.float64))
            mean = total / spec.n_weights
            self._units[spec.name] = max(0.0, squares / spec.n_weights - mean * mean) ** 0.5
        return self._units[spec.name]

    def _base(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """Rows that it moves from, float32 [stop - start, n_in]."""
        if spec.fixed:
            values = self.file.data(spec.name).view(np.float32).reshape(spec.n_rows, spec.n_in)
            return torch.from_numpy(values[start:stop].copy()).to(self.device)
        if spec.name in self.values.scales:
            packed = self.file.data(spec.name).reshape(spec.n_rows, -1)[start:stop]
            qtype = self.file.tensors[spec.name].qtype
            return torch.from_numpy(quants.dequantize(qtype, packed, spec.n_in)).to(self.device)
        return family.read(self.checkpoint, self.config, spec, start, stop, str(self.device))


class TunedSource(Source, Protocol):
    """A model with these tensors in it."""

    tuned: Tuned

    def opened(self, layer: int) -> tuple[LayerWeights, dict[str, torch.Tensor]]:
        """A layer's weights, and what moves of them, by name: to derive with respect to."""

    def opened_head(self) -> tuple[tuple[torch.Tensor, Linear], dict[str, torch.Tensor]]:
        """As `opened`, of output norm and output matrix."""
