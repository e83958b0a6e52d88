"""The student of recovery: a GGUF held decoded, with free parameters through which gradients flow.

Free are the superblock scales of every matrix (their codes stay), the norms and routers (F32 in the file), and the
weights of the matrices that are to be encoded once more.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from quantkit.codecs.format import SUPERBLOCK
from quantkit.codecs.registry import FORMATS
from quantkit.runtime.experts.streamed import ALONE, Turns, expert_names
from quantkit.runtime.layers import LayerExperts, attention, feed_forward, rms_norm, unwatched
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import Angles
from quantkit.runtime.sources.gguf import Dequantized, GGUFSource, GGUFWeights, open_gguf
from quantkit.runtime.stream import head_logits
from quantkit.tensors import TensorSpec


class Student(GGUFSource):
    """A GGUF held decoded on its device, with free parameters by name: `factor` (logarithms, one a superblock, or one
    an element of a norm) and `moved` (in standard deviations of the matrix)."""

    def __init__(self, path: Path, device: str, dtype: torch.dtype):
        weights = open_gguf(path)
        super().__init__(weights, FreeProducts(weights, self.part, torch.device(device), dtype))
        self.base = {
            name: weights.dense(name).to(self.device, dtype if len(t.shape) > 1 else torch.float32)
            for name, t in self.file.tensors.items()
        }
        self.packed: dict[str, np.ndarray] = {}  # matrices that were encoded again
        self.factor: dict[str, torch.Tensor] = {}
        self.moved: dict[str, torch.Tensor] = {}
        self.unit: dict[str, torch.Tensor] = {}

    def free(self, specs: list[TensorSpec], moved: dict[str, torch.Tensor]) -> None:
        """Open the parameters. moved: originals of the matrices whose weights are free instead of their scales."""
        for spec in specs:
            if spec.name not in self.base:
                continue  # tied output
            base, qtype = self.base[spec.name], self.file.tensors[spec.name].qtype
            if spec.name in moved or spec.role == "ffn_gate_inp":
                self.base[spec.name] = moved.get(spec.name, base)
                self.unit[spec.name] = self.base[spec.name].float().std()
                self.moved[spec.name] = torch.zeros(base.shape, device=self.device, requires_grad=True)
            elif qtype in FORMATS or spec.role.endswith("_norm"):
                shape = (*base.shape[:-1], base.shape[-1] // SUPERBLOCK) if qtype in FORMATS else base.shape
                self.factor[spec.name] = torch.zeros(shape, device=self.device, requires_grad=True)

    def part(self, name: str, index: int | None = None) -> torch.Tensor:
        """A tensor, or one matrix of a stack, as its free parameters make it."""

        def of(t: torch.Tensor) -> torch.Tensor:
            return t if index is None else t[index]

        base = of(self.base[name])
        if name in self.moved:
            return (base.float() + of(self.moved[name]) * self.unit[name]).to(base.dtype)
        if name not in self.factor:
            return base
        by = of(self.factor[name]).exp()
        if by.shape == base.shape:
            return base * by
        return (base.float().unflatten(-1, (-1, SUPERBLOCK)) * by[..., None]).flatten(-2).to(base.dtype)

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        # Not by indexing, whose gradient adds up repeated tokens in the order in which threads come.
        rows = F.embedding(tokens.to(self.device), self.part("token_embd.weight")).float()
        return rows if out is None else out.copy_(rows)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n_chunk, t, n_vocab], differentiable; a layer's intermediates are computed anew for its gradient."""
        turns = angles(self.config, torch.arange(tokens.shape[1], device=self.device))
        h = self.embed(tokens)
        for layer in range(self.config.n_layer):
            h = checkpoint(self._layer, layer, h, turns, use_reentrant=False)
        return head_logits(self, self.head(), h)

    def _layer(self, layer: int, h: torch.Tensor, turns: Angles) -> torch.Tensor:
        weights = self.layer(layer)
        h = h + attention(h, weights, self.config, turns)
        x = rms_norm(h, weights.ffn_norm, self.config.rms_eps).flatten(0, 1).to(self.dtype)
        return h + feed_forward(x, weights, self.config).view_as(h)


class FreeProducts(Dequantized):
    """Products with tensors as the student's parameters make them. part: `Student.part`."""

    def __init__(
        self, weights: GGUFWeights, part: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype
    ):
        super().__init__(weights, device, dtype)
        self.part = part

    def vector(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.part(name)

    def matrix(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.part(name).to(self.device, self.dtype)

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`."""
        return unwatched(HeldExperts(self.part, expert_names(layer), self.weights.config.n_expert))


class HeldExperts:
    """Routed experts whose matrices are all at hand: no reading ahead, and gradients for them."""

    def __init__(self, part: Callable[..., torch.Tensor], names: list[str], n_expert: int):
        self.part, self.names, self.n_expert = part, names, n_expert

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(x.shape, device=x.device)
        for e in range(self.n_expert):
            tokens, slots = (expert == e).nonzero(as_tuple=True)
            if len(tokens):
                gate, up, down = (self.part(name, e) for name in self.names)
                rows = x[tokens]
                value = (F.silu(rows @ gate.T) * (rows @ up.T)) @ down.T
                out.index_add_(0, tokens, value.float() * weight[tokens, slots, None])
        return out
