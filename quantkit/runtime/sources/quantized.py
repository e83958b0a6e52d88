"""Matrices of a GGUF multiplied from their quantized bytes, by ggml on the CPU: how a person runs the file."""

import numpy as np
import torch

from quantkit.ggml import graph
from quantkit.runtime.experts.cpu import EXPERT_ROWS, cpu_experts
from quantkit.runtime.experts.streamed import ALONE, Turns
from quantkit.runtime.layers import LayerExperts, Linear, unwatched
from quantkit.runtime.sources.gguf import GGUFWeights

BATCH = 512  # rows per product: bounds ggml's buffers


class Quantized:
    """`gguf.Products` on the CPU: nothing is dequantized but norms, routers and k_b, v_b. ggml rounds the rows to 8
    bits."""

    def __init__(self, weights: GGUFWeights):
        self.weights, self.device, self.dtype = weights, torch.device("cpu"), torch.float32

    def vector(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.weights.dense(name)

    def matrix(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.weights.dense(name)

    def linear(self, name: str) -> Linear:
        """As `Products`, at most BATCH rows at a time."""
        return self._product(name, self.weights.file.data(name))

    def grouped(self, name: str, n: int) -> Linear:
        """As `Products`, group by group."""
        products = [self._product(name, rows) for rows in np.split(self.weights.file.data(name), n)]
        return lambda x: torch.cat([own(x[:, i]) for i, own in enumerate(products)], dim=1)

    def _product(self, name: str, rows: np.ndarray) -> Linear:
        """By rows of a tensor."""
        tensor, n_out = self.weights.file.tensors[name], len(rows)
        product = graph.Linear(tensor.qtype, rows, tensor.shape[-1], n_out, self.weights.workers.n)

        def batched(x: torch.Tensor) -> torch.Tensor:
            return product(x) if len(x) <= BATCH else torch.cat([product(part) for part in x.split(BATCH)])

        return batched

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`."""
        weights, c = self.weights, self.weights.config
        rows = weights.at_once(EXPERT_ROWS, c.n_used)
        return unwatched(cpu_experts(weights.expert_stacks(layer), c, weights.workers.n, rows, weights.needs(layer)))
