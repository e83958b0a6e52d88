"""The nouns that every stage shares: what one GGUF tensor is, and how much its input columns matter.

Shapes here are numpy's, slowest dimension first; ggml's `ne` is the reverse.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal, Protocol

import numpy as np
import torch

Assembly = Literal["copy", "stack", "k_b", "v_b"]
ROUTED_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
"""The stacks of routed experts: gate, up and down, in this order everywhere."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the output file, before any type is chosen and without data.

    name: the GGUF name, `blk.3.ffn_down_exps.weight`.
    shape: slowest first: `(n_expert, n_out, n_in)`, `(n_out, n_in)` or `(n,)`.
    role: the name without layer and suffix, `ffn_down_exps`; recipes speak of roles.
    layer: block number, None outside the blocks.
    sources: checkpoint tensors it is made from, in order (one per expert for a stack).
    assembly: how: `copy` one source, `stack` one matrix per source, `k_b`/`v_b` cut out of `kv_b_proj` per head.
    fixed: the only type the format allows (norms, biases and the router are F32), else None.
    exact: a type that says the numbers of a stored matrix as they are, where whoever plans knows of one.
    """

    name: str
    shape: tuple[int, ...]
    role: str
    layer: int | None
    sources: tuple[str, ...]
    assembly: Assembly = "copy"
    fixed: str | None = None
    exact: str | None = None

    @property
    def n_in(self) -> int:
        """Length of a row: the dimension that is summed over, and along which blocks of weights lie."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows of all matrices."""
        return prod(self.shape[:-1])

    @property
    def n_matrices(self) -> int:
        """Matrices stacked in a 3-D tensor (experts or heads), else 1."""
        return prod(self.shape[:-2]) if len(self.shape) > 2 else 1

    @property
    def n_weights(self) -> int:
        """Elements."""
        return prod(self.shape)

    @property
    def is_routed(self) -> bool:
        """Whether it is a stack of routed experts."""
        return self.role in ROUTED_ROLES


class Weights(Protocol):
    """Where the original weights are read from; a `Checkpoint` is one."""

    def read(self, name: str, start: int = 0, stop: int | None = None, device: str = "cpu") -> torch.Tensor:
        """Rows start:stop (default: all) of a tensor, dequantised to float32 on `device`."""
        ...


@dataclass(frozen=True)
class Importance:
    """Sum over calibration tokens of squared inputs to one weight (an entry of an imatrix).

    in_sum2: float32 [n_matrices, n_in].
    counts: float32 [n_matrices] or [1]: tokens that reached each matrix (experts see only what was routed to them).
    """

    in_sum2: np.ndarray
    counts: np.ndarray

    def mean(self, matrix: int) -> np.ndarray:
        """Mean square per input column, float32 [n_in]; ones if no token came here, as llama-quantize has it."""
        count = np.float32(self.counts[matrix if len(self.counts) > 1 else 0])
        return self.in_sum2[matrix] / count if count > 0 else np.ones_like(self.in_sum2[matrix])


Imatrix = Mapping[str, Importance]
"""GGUF tensor name -> Importance."""


def split_name(name: str) -> tuple[str, int | None]:
    """GGUF name -> role, layer: `blk.3.ffn_norm.weight` -> `ffn_norm`, 3; a norm's bias is `…_norm_b`."""
    stem = name.replace("_norm.bias", "_norm_b").removesuffix(".weight").removesuffix(".bias")
    parts = stem.split(".", 2)
    if len(parts) == 3 and parts[0] == "blk" and parts[1].isascii() and parts[1].isdigit() and len(parts[1]) < 6:
        return parts[2], int(parts[1])
    return stem, None


LAYER = re.compile(r"(?:^|\.)(?:layers|blk)\.(\d+)\.")  # in the name of a tensor, of safetensors or GGUF


def bytes_by_layer(tensors: Iterable[tuple[str, int]], n_layer: int) -> list[int]:
    """Names and bytes of tensors -> bytes of each of the layers; those behind the last (prediction of more tokens) and
    outside of layers are left out."""
    out = [0] * n_layer
    for name, n_bytes in tensors:
        if (found := LAYER.search(name)) and int(found[1]) < n_layer:
            out[int(found[1])] += n_bytes
    return out
