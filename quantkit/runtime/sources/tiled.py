"""Matrices of a GGUF multiplied in dequantized tiles, for long pieces of prompts on the CPU.

A tile is dequantized anew for each product, so that no more memory is needed than one tile for each thread. That pays
as soon as there are enough rows; routed experts with fewer are multiplied by ggml.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from math import prod

import numpy as np
import torch

from quantkit.codecs.types import TABLE
from quantkit.ggml import graph
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.experts.streamed import ALONE, Turns, expert_names
from quantkit.runtime.layers import LayerExperts, Linear, unwatched
from quantkit.runtime.pauses import pause, wanted
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.runtime.swiglu import swiglu

EXACT = {"F32", TABLE.name}
DECODED_ROWS = 32  # rows from which on dequantizing an expert costs less than it saves
CODEBOOK_ROWS = 6  # the same if its types are slow to multiply, and the CPU multiplies bfloat16
EXPERTS_AT_ONCE = 64  # whose inputs and results are held: 120 MB in R1 at even routing
BATCH = 512  # rows per product of ggml: bounds its buffers
TILE_WEIGHTS = 1 << 22  # dequantized at once by a thread: more need more memory, fewer more time between the products
THREAD_WEIGHTS = 1 << 18  # from which on another thread for a matrix is worth waking


def product_dtype(types: Iterable[str]) -> torch.dtype:
    """bfloat16 where the CPU multiplies it natively, else float32. types: of all tensors of a file; one that is F32
    throughout is asked for exact numbers."""
    if set(types) <= EXACT:
        return torch.float32
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if native else torch.float32


class Tiled:
    """`gguf.Products` on the CPU. dtype: of tiles, inputs and results (float32 or bfloat16)."""

    def __init__(self, weights: GGUFWeights, dtype: torch.dtype):
        self.weights, self.device, self.dtype = weights, torch.device("cpu"), dtype
        self.memory: dict[int, torch.Tensor] = {}

    def vector(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.weights.dense(name)

    def matrix(self, name: str) -> torch.Tensor:
        """As `Products`."""
        file = self.weights.file
        return self.weights.unpack(name, file.data(name), torch.empty(file.tensors[name].shape, dtype=self.dtype))

    def linear(self, name: str) -> Linear:
        """As `Products`."""
        return lambda x: self.product(x, name, self.weights.file.data(name))

    def grouped(self, name: str, n: int) -> Linear:
        """As `Products`, group by group."""
        groups = np.split(self.weights.file.data(name), n)
        return lambda x: torch.cat([self.product(x[:, i], name, rows) for i, rows in enumerate(groups)], dim=1)

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`."""
        return unwatched(PromptExperts(self, layer))

    def product(self, x: torch.Tensor, name: str, data: np.ndarray, worker: int | None = None) -> torch.Tensor:
        """x [n, n_in] times packed rows uint8 [n_out, row_bytes] of a tensor -> [n, n_out]: so many rows at a time are
        dequantized, multiplied and forgotten. worker: the caller is that thread of several; None: by all threads."""
        n_out, n_in = len(data), x.shape[-1]
        workers = 1 if worker is not None else max(1, min(self.weights.workers.n, n_out * n_in // THREAD_WEIGHTS))
        n_tiles = workers * -(-n_out * n_in // (TILE_WEIGHTS * workers))
        spans = list(pairwise(i * n_out // n_tiles for i in range(n_tiles + 1)))
        out = x.new_empty(n_out, len(x))  # weights come first in the product: there they need no packing

        def multiply(thread: int, span: tuple[int, int]) -> None:
            rows = data[slice(*span)]
            tile = self.weights.unpack(name, rows, self._tile(thread, len(rows), n_in), 1)
            torch.mm(tile, x.T, out=out[slice(*span)])

        if worker is None:
            self.weights.workers.share_out(multiply, spans, workers)
        else:
            for span in spans:
                multiply(worker, span)
        return out.T

    def _tile(self, worker: int, *shape: int) -> torch.Tensor:
        """Memory of a thread, contiguous, not initialized; what the thread took before is overwritten."""
        if (size := prod(shape)) > len(self.memory.get(worker, ())):
            self.memory[worker] = torch.empty(size, dtype=self.dtype)
        return self.memory[worker][:size].view(shape)


class PromptExperts:
    """Routed experts of a long piece: those with many rows are dequantized once, the others multiplied by ggml."""

    def __init__(self, tiled: Tiled, layer: int):
        weights = tiled.weights
        self.tiled, self.weights, self.config = tiled, weights, weights.config
        self.names, self.stacks = expert_names(layer), weights.expert_stacks(layer)
        self.need = weights.needs(layer) or (lambda _: None)
        short = tiled.dtype == torch.bfloat16 and all(qtype.startswith("IQ") for qtype, _ in self.stacks)
        self.many = CODEBOOK_ROWS if short else DECODED_ROWS
        most = weights.residency.most if weights.residency else 2 * EXPERTS_AT_ONCE
        self.at_once = min(EXPERTS_AT_ONCE, most // 2)  # the next ones need room too

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`."""
        out, chosen, share = torch.zeros(x.shape), expert.flatten(), weight.flatten()
        slot = torch.argsort(chosen, stable=True)  # tokens in order within an expert: sums are reproducible
        counts = torch.bincount(chosen, minlength=self.config.n_expert)
        bounds = [0, *counts.cumsum(0).tolist()]
        many = (counts >= self.many).nonzero().flatten().tolist()
        for group in self._in_turn(many):
            mine = [slot[bounds[e] : bounds[e + 1]] for e in group]
            rows = [slots // expert.shape[1] for slots in mine]
            results = self._decoded([(e, x[tokens]) for e, tokens in zip(group, rows, strict=True)])
            for tokens, slots, y in zip(rows, mine, results, strict=True):
                out.index_add_(0, tokens, y.float() * share[slots, None])
        few = slot[(counts < self.many)[chosen[slot]]]
        if len(few) == len(slot):
            return self._quantized(x, expert, weight)
        if len(few):
            tokens = few // expert.shape[1]
            out.index_add_(0, tokens, self._quantized(x[tokens], chosen[few, None], share[few, None]))
        return out

    def _in_turn(self, experts: list[int]) -> Iterator[list[int]]:
        """Groups of them, in memory as long as they are looked at; the next group is read meanwhile."""
        groups = [experts[i : i + self.at_once] for i in range(0, len(experts), self.at_once)]
        for group, _ in zip(groups, read_ahead(self.need, groups), strict=True):
            yield group

    def _quantized(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """By ggml, with as many experts a row as `expert` has."""
        c, n_used = self.config, expert.shape[1]
        products = graph.Experts(self.stacks, c.d, c.n_ff_exp, c.n_expert, n_used, self.weights.workers.n, c.limit)
        rows, parts = self.weights.at_once(BATCH, n_used), []
        for part in zip(*(v.split(rows) for v in (x.float(), expert, weight)), strict=True):
            self.need(part[1].flatten().tolist())
            parts.append(products(part[0], part[1].int(), part[2]))
        return torch.cat(parts)

    def _decoded(self, visits: list[tuple[int, torch.Tensor]]) -> list[torch.Tensor]:
        """Outputs of experts for their rows: an expert by each thread, or, if they are few, one after the other."""
        workers = self.weights.workers
        if len(visits) < workers.n:  # a matrix is then shared by all
            return [self._expert(None, visit) for visit in visits]
        if not wanted() or self.weights.residency:  # others would need room for experts that are looked at
            return workers.share_out(self._expert, visits)
        found = []
        for begin in range(0, len(visits), 2 * workers.n):
            found += workers.share_out(self._expert, visits[begin : begin + 2 * workers.n])
            pause()
        return found

    def _expert(self, worker: int | None, visit: tuple[int, torch.Tensor]) -> torch.Tensor:
        e, x = visit

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return self.tiled.product(x, name, self.weights.data(name)[e], worker)

        gate, up, down = self.names
        return product(down, swiglu(product(gate, x), product(up, x), self.config.limit))
