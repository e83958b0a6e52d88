"""Routed experts on the CPU for an engine that computes the rest elsewhere.

The interface is `layers.Experts` with tensors on the CPU: x float32 [n, d], expert int [n, n_used], weight float32
[n, n_used] -> the weighted sum float32 [n, d], valid until the next call.
"""

import torch

from quantkit.ggml.graph import Experts as GgmlProducts
from quantkit.ggml.graph import Graph
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import Experts
from quantkit.runtime.sources import GGUFSource

ROWS = 128  # tokens computed at once: bounds the activations


def open_experts(source: GGUFSource, layer: int) -> Experts:
    """The engine for one layer's experts on this machine's CPU: ggml as one graph, or what was chosen instead."""
    if source.make_experts is GgmlProducts:
        return GgmlExperts(source, layer)
    return source.cpu_experts(layer)


class GgmlExperts:
    """ggml's mul_mat_id on the file's bytes, weighted and summed in the same graph."""

    def __init__(self, source: GGUFSource, layer: int):
        self.source, self.names, self.need = source, expert_names(layer), source.needs(layer)
        self.rows = min(ROWS, source.at_once(source.config.n_used))
        self.graphs: dict[int, tuple[Graph, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _graph(self, n: int) -> tuple[Graph, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        c, file = self.source.config, self.source.file
        graph = Graph(self.source.n_threads, 64 + 2 * c.n_used)
        op = graph.op
        x, x_data = graph.input((n, 1, c.d))
        ids, ids_data = graph.input((n, c.n_used), torch.int32)
        weight, weight_data = graph.input((n, c.n_used, 1))
        gate, up, down = (
            graph.weights(file.tensors[name].qtype, self.source.data(name), *reversed(file.tensors[name].shape))
            for name in self.names
        )
        hidden = op("swiglu_split", op("mul_mat_id", gate, x, ids), op("mul_mat_id", up, x, ids))
        y = op("mul", op("mul_mat_id", down, hidden, ids), weight)  # [d, n_used, n]
        row = 4 * c.d
        views = [
            op("view_4d", y, c.d, n, 1, 1, row * c.n_used, row * c.n_used * n, row * c.n_used * n, row * i)
            for i in range(c.n_used)
        ]
        out = op("cont", views[0])
        for view in views[1:]:
            out = op("add", out, view)
        result = graph.result(out, (n, c.d))
        return graph.finish(out, allocate=True), x_data, ids_data, weight_data, result

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if len(x) > self.rows:
            parts = zip(*(value.split(self.rows) for value in (x, expert, weight)), strict=True)
            return torch.cat([self(*part).clone() for part in parts])
        n = len(x)
        if n not in self.graphs:
            if n > 1:  # decoding and the newest other number of tokens
                self.graphs = {k: v for k, v in self.graphs.items() if k == 1}
            self.graphs[n] = self._graph(n)
        graph, x_data, ids_data, weight_data, result = self.graphs[n]
        x_data[:, 0] = x
        ids_data.copy_(expert)
        weight_data[:, :, 0] = weight
        self.need(expert.flatten().tolist())
        graph.run()
        return result
