"""Routed experts on the CPU, from their quantized bytes."""

from collections.abc import Callable, Iterable
from operator import itemgetter
from typing import NamedTuple

import torch

from quantkit.ggml.graph import Graph, keep
from quantkit.models.config import ModelConfig
from quantkit.runtime.experts.native import NativeExperts, NativeLayer, Rows, Stacks, suits
from quantkit.runtime.pauses import pause, wanted

EXPERT_ROWS = 128  # tokens computed at once: bounds the activations
SHORT_ROWS = 64  # by ggml while others wait


def cpu_experts(
    stacks: Stacks,
    config: ModelConfig,
    n_threads: int,
    rows: int = EXPERT_ROWS,
    need: Callable[[Iterable[int]], None] | None = None,
) -> "GgmlExperts | NativeExperts":
    """`layers.Experts` of one layer: by our own products if they are compiled and take such matrices, else ggml's.
    Arguments as of `GgmlExperts`."""
    if lib := suits(stacks, config):
        return NativeExperts(NativeLayer(lib, stacks, config), config, n_threads, rows, need)
    return GgmlExperts(stacks, config, n_threads, rows, need)


class Product(NamedTuple):
    """A graph for n tokens with k experts each, and the memory of its inputs x [n, 1, d], experts int32 [n, k], weights
    [n, k, 1], and of its result [n, d]."""

    graph: Graph
    x: torch.Tensor
    ids: torch.Tensor
    weight: torch.Tensor
    result: torch.Tensor


class GgmlExperts:
    """`layers.Experts` of one layer with tensors on the CPU: ggml's mul_mat_id on the file's bytes, weighted and summed
    in the same graph."""

    def __init__(
        self,
        stacks: Stacks,
        config: ModelConfig,
        n_threads: int,
        rows: int = EXPERT_ROWS,
        need: Callable[[Iterable[int]], None] | None = None,
    ):
        """stacks: qtype and bytes, uint8 [n_expert, n_out, row_bytes], of gate, up and down. rows: tokens computed at
        once. need: called with experts before they are multiplied."""
        self.stacks, self.config, self.n_threads, self.rows, self.need = stacks, config, n_threads, rows, need
        self.products: dict[tuple[int, int], Product] = {}

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`; experts below 0 are left out. The result is valid until the next call."""
        rows = min(self.rows, SHORT_ROWS) if wanted() else self.rows
        if len(x) > rows:
            parts = []
            for part in zip(*(value.split(rows) for value in (x, expert, weight)), strict=True):
                parts.append(self(*part).clone())
                pause(what="experts on the CPU")
            return torch.cat(parts)
        if expert.min() < 0:
            if not (expert >= 0).any():
                return torch.zeros(x.shape)
            expert, weight = _packed_left(expert, weight)
        n, k = expert.shape
        product = self.products.get((n, k)) or self._product(n, k)
        keep(self.products, (n, k), product, itemgetter(0))
        product.x[:, 0] = x
        product.ids.copy_(expert)
        product.weight[:, :, 0] = weight
        if self.need:
            self.need(expert.flatten().tolist())
        product.graph.run()
        return product.result

    def wake(self) -> None:
        """There will be a call soon: nothing to do, ggml starts its threads itself."""

    def exchange(self, rows: Rows) -> None:
        """As `NativeExperts`: never."""

    def _product(self, n: int, k: int) -> Product:
        c, graph = self.config, Graph(self.n_threads, 64 + 2 * self.config.n_used)
        op = graph.op
        x, x_data = graph.input((n, 1, c.d))
        ids, ids_data = graph.input((n, k), torch.int32)
        weight, weight_data = graph.input((n, k, 1))
        sizes = [(c.d, c.n_ff_exp), (c.d, c.n_ff_exp), (c.n_ff_exp, c.d)]
        gate, up, down = (
            graph.weights(qtype, data, n_in, n_out, c.n_expert)
            for (qtype, data), (n_in, n_out) in zip(self.stacks, sizes, strict=True)
        )
        hidden = graph.swiglu(op("mul_mat_id", gate, x, ids), op("mul_mat_id", up, x, ids), c.limit)
        y = op("mul", op("mul_mat_id", down, hidden, ids), weight)  # [d, n_used, n]
        row = 4 * c.d
        token = row * k
        views = [op("view_4d", y, c.d, n, 1, 1, token, token * n, token * n, row * i) for i in range(k)]
        out = op("cont", views[0])
        for view in views[1:]:
            out = op("add", out, view)
        result = graph.result(out, (n, c.d))
        return Product(graph.finish(out, allocate=True), x_data, ids_data, weight_data, result)


def _packed_left(expert: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without those below 0, of which at least one is not: as many columns as the longest row has left; shorter rows
    are filled with an expert that is computed anyway, of weight 0."""
    here = expert >= 0
    order = here.int().argsort(dim=1, descending=True, stable=True)[:, : int(here.sum(1).max())]
    expert, weight, here = (value.gather(1, order) for value in (expert, weight, here))
    return torch.where(here, expert, expert[here][0]), weight * here
