"""Routed experts on the CPU by this package's compiled products: few tokens, near the speed of memory."""

import ctypes
import math
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.ggml.graph import Graph
from quantkit.ggml.library import TensorP, type_id
from quantkit.models.config import ModelConfig
from quantkit.progress import say_once
from quantkit.runtime.native.library import SUPERBLOCK, Exchange, Layer, Matrix, Native, act_block, native, traits
from quantkit.runtime.pauses import pause, wanted

SPIN_NS = 1_000_000  # that idle threads look for work before they sleep: more than a GPU takes for the rest of a layer

PATIENCE_NS = 50_000_000  # that rows from a GPU are waited for, between two looks whether it is still at work

SHORT_EXPERTS = 32  # at once while others wait: of R1 and 128 tokens 0.25 s of one core

NO_MEMORY = "not enough memory for the activations: lower --context or --parallel"

Stacks = Sequence[tuple[str, np.ndarray]]
"""Of gate, up and down: qtype, uint8 [n_expert, n_out, row_bytes]."""


class Rows(NamedTuple):
    """What a GPU hands over in a step, in memory that both see: x float32 [m, d], ids int32 and weights float32 [m,
    n_used]. arrived: int32 [m or more], of each row the number of the step once it is there. out: float32 [m, d], where
    the GPU looks once `answered`, int32 [1 or more], is that number. kept: int32 [n, n_used], gets the ids before. Of m
    rows those beyond n repeat the last."""

    n: int
    m: int
    x: torch.Tensor
    ids: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor
    kept: torch.Tensor
    arrived: torch.Tensor
    answered: torch.Tensor


class Threads:
    """n threads that compute experts together, the caller among them; one call at a time, others wait."""

    def __init__(self, lib: Native, n: int):
        self.lib, cores = lib, machine.cores_for(n)
        self.pool = lib.qk_pool(n, SPIN_NS, (ctypes.c_int32 * len(cores))(*cores), len(cores))
        if not self.pool:
            raise QuantkitError(f"{n} threads cannot be started: allow more processes (ulimit -u), or use --threads")

    def wake(self) -> None:
        """There will be work in less than SPIN_NS: let nobody sleep then."""
        self.lib.qk_wake(self.pool)

    def busy(self) -> float:
        """Seconds that they have computed."""
        return self.lib.qk_busy_ns(self.pool) / 1e9


@cache
def _threads(n: int, process: int) -> Threads:
    lib = native()
    assert lib
    return Threads(lib, n)


_starting = threading.Lock()


def threads(n: int) -> Threads:
    """The n threads of this process; a child has none of its parent's."""
    with _starting:
        return _threads(n, os.getpid())


class NativeLayer:
    """The stacks of a layer as the compiled functions see them."""

    def __init__(self, lib: Native, stacks: Stacks, config: ModelConfig):
        self.lib, self.stacks, c = lib, stacks, config  # whose memory is read
        sizes = [(c.d, c.n_ff_exp), (c.d, c.n_ff_exp), (c.n_ff_exp, c.d)]
        matrices = [self._matrix(*stack, *size) for stack, size in zip(stacks, sizes, strict=True)]
        self.struct = Layer(*matrices, c.n_expert, c.n_used, math.inf if c.limit is None else c.limit)

    def _matrix(self, qtype: str, data: np.ndarray, n_in: int, n_out: int) -> Matrix:
        if not data.flags.c_contiguous or data.shape[-2] != n_out:
            raise ValueError(f"{qtype} {data.shape} for matrices of {n_out} rows")
        own, other = traits(qtype)
        functions = [ctypes.cast(function, ctypes.c_void_p) for function in (other.from_float, own.vec_dot)]
        foreign = qtype not in self.lib.types
        row_bytes = data.shape[-1]
        return Matrix(data.ctypes.data, n_in, n_out, row_bytes, type_id(qtype), foreign, *functions, act_block(qtype))


def suits(stacks: Stacks, config: ModelConfig) -> Native | None:
    """The compiled products if they can multiply these stacks: rows are whole superblocks, and of types that ggml
    multiplies by 8-bit activations; matrices follow each other, else a line says that ggml multiplies them."""
    lib = native()
    if not all(data.flags.c_contiguous for _, data in stacks):
        say_once("gate and up of each expert lie together: ggml multiplies them, slower than quantkit does")
        return None
    sizes = (config.d, config.n_ff_exp)
    known = all(traits(qtype)[1].from_float and traits(qtype)[0].vec_dot for qtype, _ in stacks)
    return lib if lib and known and not any(size % SUPERBLOCK for size in sizes) else None


class NativeExperts:
    """`layers.Experts` of one layer with tensors on the CPU, by `threads`."""

    def __init__(
        self,
        layer: NativeLayer,
        config: ModelConfig,
        n_threads: int,
        rows: int,
        need: Callable[[Iterable[int]], None] | None,
    ):
        """As `cpu.GgmlExperts`."""
        self.layer, self.config, self.threads, self.rows, self.need = layer, config, threads(n_threads), rows, need

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`; experts below 0 are left out."""
        if len(x) > self.rows:
            parts = zip(*(value.split(self.rows) for value in (x, expert, weight)), strict=True)
            return torch.cat([self(*part) for part in parts])
        x, weight = x.float().contiguous(), weight.float().contiguous()
        ids, out = expert.int().contiguous(), torch.empty(x.shape)
        if not wanted():
            self._compute(x, ids, weight, out)
            return out
        # Some experts after the others, in the order that sums have anyway: each one's bytes are read once for all of
        # these tokens, and the result has the same bits.
        for i, some in enumerate(ids[ids >= 0].unique().split(SHORT_EXPERTS)):
            self._compute(x, ids.where(torch.isin(ids, some), -1), weight, out, adds=i > 0)
            pause(what="experts on the CPU")
        return out

    def _compute(
        self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, adds: bool = False
    ) -> None:
        """Into out, or added to it."""
        if self.need:
            self.need(e for e in ids.flatten().tolist() if e >= 0)
        pool, addresses = self.threads.pool, [t.data_ptr() for t in (x, ids, weight, out)]
        if self.layer.lib.qk_experts(pool, self.layer.struct, len(x), *addresses, adds):
            raise QuantkitError(NO_MEMORY)

    def wake(self) -> None:
        """There will be a call soon."""
        self.threads.wake()

    def exchange(self, rows: Rows) -> Callable[[int], bool] | None:
        """Waiting for a step's rows and answering them as one call, so that nothing of Python lies between GPU and CPU:
        given the number of the step, whether they came within PATIENCE_NS; QuantkitError as a call of these experts.
        None where each call has to prepare something."""
        if self.need or rows.n > self.rows:
            return None
        call, pool, layer = self.layer.lib.qk_exchange, self.threads.pool, self.layer
        given = Exchange(rows.n, rows.m, *(t.data_ptr() for t in rows[2:]), PATIENCE_NS)
        given.rows = rows

        def exchanged(step: int) -> bool:
            if (found := call(pool, layer.struct, given, step)) < 0:
                raise QuantkitError(NO_MEMORY)
            return not found

        return exchanged


def node(graph: Graph, layer: NativeLayer, x: TensorP, ids: TensorP, weight: TensorP) -> TensorP:
    """Outputs [d, n] of a layer's experts as a node of a graph, by ggml's threads: x [d, n], ids int32 [n_used, n],
    weight [1, n_used, n]."""
    lib = layer.lib
    own = lib.qk_node(layer.struct, graph.failed)
    if not own:
        raise QuantkitError("not enough memory for the activations of routed experts")
    graph.keep.append(layer)
    graph.at_end.append(lambda: lib.qk_drop_node(own))
    return graph.op("map_custom3", x, ids, weight, lib.compute_node, -1, own)
