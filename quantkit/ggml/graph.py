"""Products with quantized matrices on the CPU, as ggml graphs over memory that we own."""

import ctypes
import math
import threading
from collections.abc import Callable, Sequence
from ctypes import byref, c_int32
from functools import cache
from typing import TypeVar

import gguf
import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.ggml.library import CUSTOM, Cplan, InitParams, TensorP, library, repacking, type_id


@cache
def threadpool(n_threads: int) -> int:
    """A persistent ggml thread pool: without one every product would start and join its own threads."""
    params = library().ggml_threadpool_params_default(n_threads)
    pool = library().ggml_threadpool_new(byref(params))
    if not pool:
        raise QuantkitError(f"ggml could not start {n_threads} threads")
    return pool


_TORCH_TYPES = {
    torch.float32: int(gguf.GGMLQuantizationType.F32),
    torch.float16: int(gguf.GGMLQuantizationType.F16),
    torch.int32: int(gguf.GGMLQuantizationType.I32),
    torch.int64: int(gguf.GGMLQuantizationType.I64),
}
Key = TypeVar("Key")
Made = TypeVar("Made")
_compute_lock = threading.Lock()  # one graph at a time may use the pool
KEPT_ROWS = 16  # of a product whose graph is kept: of 512, those of all matrices of V4-Flash hold 14 GB


class Graph:
    """A ggml graph, built once for one batch size and run many times. Inputs, weights and results are memory that we
    own; so is every intermediate node, unless `finish` is told to allocate those."""

    def __init__(self, n_threads: int, max_tensors: int = 32):
        self.lib = library()
        self.n_threads = n_threads
        size = self.lib.ggml_tensor_overhead() * max_tensors + 4096
        size += self.lib.ggml_graph_overhead_custom(max_tensors, False)
        self.arena = ctypes.create_string_buffer(size)
        self.context = self.lib.ggml_init(InitParams(size, ctypes.addressof(self.arena), True))
        self.graph = self.lib.ggml_new_graph_custom(self.context, max_tensors, False)
        self.keep: list[object] = [self.arena]
        self.buffers: list[int] = []
        self.copied = 0  # bytes of weights in those buffers
        self.failure: BaseException | None = None
        self.failed = c_int32()  # set to 1 by nodes of our own that could not be computed
        self.at_end: list[Callable[[], None]] = []
        self.plan: Cplan | None = None
        self.allocator: int | None = None

    def op(self, name: str, *arguments: object) -> TensorP:
        """A node: ggml_<name> with these arguments."""
        return getattr(self.lib, f"ggml_{name}")(self.context, *arguments)

    def swiglu(self, gate: TensorP, up: TensorP, limit: float | None) -> TensorP:
        """silu(gate) * up. limit: gate is at most this, up between it and its negative; None: neither."""
        if limit is not None:
            gate, up = self.op("clamp", gate, -math.inf, limit), self.op("clamp", up, -limit, limit)
        return self.op("swiglu_split", gate, up)

    def watch(self, ids: TensorP, visitor: Callable[[list[int]], None]) -> TensorP:
        """Call visitor with the int32 values of a node of at most two dimensions as soon as they are computed, and
        before anything that is computed from what is returned here: the same node. What it raises, `run` raises."""

        @CUSTOM
        def call(_: TensorP, node: TensorP, thread: int, n_threads: int, data: int | None) -> None:
            if thread == 0 and self.failure is None:
                width, rows, stride = node.contents.ne[0], node.contents.ne[1], node.contents.nb[1]
                starts = range(node.contents.data, node.contents.data + rows * stride, stride)
                try:
                    visitor([i for start in starts for i in (c_int32 * width).from_address(start)])
                except BaseException as error:  # ctypes would print it and go on; `run` raises it
                    self.failure = error

        self.keep.append(call)
        return self.op("map_custom1_inplace", ids, call, 1, None)

    def expand(self, node: TensorP) -> None:
        """Nodes run in the order in which they are expanded: a write must come before the reads that depend on it."""
        self.lib.ggml_build_forward_expand(self.graph, node)

    def weights(
        self, qtype: str, data: np.ndarray, n_in: int, n_out: int, n_matrices: int = 1, repack: bool = False
    ) -> TensorP:
        """A quantized matrix (or a stack of them, between which other bytes may lie) over existing bytes, usually a
        memory map of the file. repack: if ggml has faster products for this type with rows interleaved, then over a
        copy of that form."""
        tensor = self.lib.ggml_new_tensor_3d(self.context, type_id(qtype), n_in, n_out, n_matrices)
        apart = n_matrices > 1 and data.ndim == 3 and not data.flags.c_contiguous
        whole = data[0].flags.c_contiguous if apart else data.flags.c_contiguous
        if data.nbytes != self.lib.ggml_nbytes(tensor) or not whole:
            raise ValueError(f"{data.nbytes} bytes for {n_matrices}x{n_out}x{n_in} {qtype}")
        if apart:
            tensor.contents.nb[2], tensor.contents.nb[3] = data.strides[0], n_matrices * data.strides[0]
        if not (repack and self._repacked(tensor, data)):
            tensor.contents.data = data.ctypes.data
            self.keep.append(data)
        return tensor

    def _repacked(self, tensor: TensorP, data: np.ndarray) -> bool:
        kind = repacking()
        buffer = kind and self.lib.ggml_backend_buft_alloc_buffer(kind, data.nbytes)
        if not buffer:
            return False
        self.lib.ggml_backend_tensor_alloc(buffer, tensor, self.lib.ggml_backend_buffer_get_base(buffer))
        if not tensor.contents.extra:  # ggml has no other form of this type, or not on this CPU
            tensor.contents.buffer = tensor.contents.data = None
            self.lib.ggml_backend_buffer_free(buffer)
            return False
        self.lib.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
        self.buffers.append(buffer)
        self.copied += data.nbytes
        return True

    def input(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[TensorP, torch.Tensor]:
        """An input and the torch tensor (numpy order) that shares its memory: fill it before `run`."""
        storage = torch.zeros(shape, dtype=dtype)
        return self.over(storage), storage

    def over(self, storage: torch.Tensor) -> TensorP:
        """A tensor over a contiguous torch tensor's memory, at most four-dimensional."""
        ne = list(reversed(storage.shape)) + [1] * (4 - storage.dim())
        tensor = self.lib.ggml_new_tensor_4d(self.context, _TORCH_TYPES[storage.dtype], *ne)
        tensor.contents.data = storage.data_ptr()
        self.keep.append(storage)
        return tensor

    def result(self, tensor: TensorP, shape: tuple[int, ...]) -> torch.Tensor:
        """Give an intermediate or final float32 node its memory; returns the torch view of it."""
        storage = torch.empty(shape, dtype=torch.float32)
        if storage.nbytes != self.lib.ggml_nbytes(tensor):
            raise ValueError(f"result of {self.lib.ggml_nbytes(tensor)} bytes is not {shape}")
        tensor.contents.data = storage.data_ptr()
        self.keep.append(storage)
        return storage

    def finish(self, *outputs: TensorP, allocate: bool = False, reference: bool = False) -> "Graph":
        """Plan the computation of these nodes; returns the graph. allocate: give nodes without memory their place in
        one buffer, reused as they die. reference: ggml's plain kernels, whose result for a sequence does not depend on
        how many others there are."""
        for output in outputs:
            self.expand(output)
        if allocate:
            self.allocator = self.lib.ggml_gallocr_new(self.lib.ggml_backend_cpu_buffer_type())
            if not self.lib.ggml_gallocr_alloc_graph(self.allocator, self.graph):
                raise QuantkitError("not enough memory for the activations: lower --context or --parallel")
        self.plan = self.lib.ggml_graph_plan(self.graph, self.n_threads, threadpool(self.n_threads))
        self.work = torch.empty(self.plan.work_size, dtype=torch.uint8)
        self.plan.work_data = self.work.data_ptr()
        self.plan.use_ref = reference
        return self

    def run(self) -> None:
        """Compute a finished graph; QuantkitError if ggml cannot, or what a visitor raised."""
        if self.plan is None:
            raise ValueError("a graph runs once it is finished")
        self.failure = None
        with _compute_lock:
            status = self.lib.ggml_graph_compute(self.graph, byref(self.plan))
        if self.failure is not None:
            raise self.failure
        if status:
            raise QuantkitError(f"ggml graph failed with status {status}")
        if self.failed.value:
            self.failed.value = 0
            raise QuantkitError("not enough memory for the activations: lower --context or --parallel")

    def __del__(self) -> None:
        for end in getattr(self, "at_end", ()):
            end()
        for buffer in getattr(self, "buffers", ()):
            self.lib.ggml_backend_buffer_free(buffer)
        if getattr(self, "allocator", None):
            self.lib.ggml_gallocr_free(self.allocator)
        if getattr(self, "context", None):
            self.lib.ggml_free(self.context)


def keep(kept: dict[Key, Made], key: Key, made: Made, rows: Callable[[Key], int]) -> None:
    """Keep a graph with what it needs: that of decoding, of one row, and the newest of more, up to KEPT_ROWS."""
    if rows(key) > KEPT_ROWS:
        return
    for other in [k for k in kept if rows(k) > 1] if rows(key) > 1 else ():
        del kept[other]
    kept[key] = made


class Linear:
    """y = x Wᵀ with W in quantized bytes. x float32 [n, n_in] -> float32 [n, n_out]."""

    def __init__(self, qtype: str, data: np.ndarray, n_in: int, n_out: int, n_threads: int):
        self.qtype, self.data, self.n_in, self.n_out, self.n_threads = qtype, data, n_in, n_out, n_threads
        self.graphs: dict[int, tuple[Graph, torch.Tensor, torch.Tensor]] = {}

    def _graph(self, n: int) -> tuple[Graph, torch.Tensor, torch.Tensor]:
        graph = Graph(self.n_threads)
        x, x_data = graph.input((n, self.n_in))
        y = graph.lib.ggml_mul_mat(graph.context, graph.weights(self.qtype, self.data, self.n_in, self.n_out), x)
        y_data = graph.result(y, (n, self.n_out))
        return graph.finish(y), x_data, y_data

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[0]
        graph, x_data, y_data = made = self.graphs.get(n) or self._graph(n)
        keep(self.graphs, n, made, int)
        x_data.copy_(x)
        graph.run()
        return y_data.clone() if n <= KEPT_ROWS else y_data


Quantized = tuple[str, np.ndarray]
"""One matrix of every expert: qtype, uint8 [n_expert, n_out, row_bytes]."""


class Experts:
    """Routed experts of one layer, computed from their quantized bytes by ggml's mul_mat_id.

    stacks: gate and up, n_ff rows of d weights for each expert, and down, d rows of n_ff. limit: gate is at most
    this, up between it and its negative; None: neither.
    """

    def __init__(
        self,
        stacks: Sequence[Quantized],
        d: int,
        n_ff: int,
        n_expert: int,
        n_used: int,
        n_threads: int,
        limit: float | None = None,
    ):
        self.stacks = stacks
        self.d, self.n_ff, self.n_expert, self.n_used = d, n_ff, n_expert, n_used
        self.n_threads, self.limit = n_threads, limit
        self.graphs: dict[int, tuple[Graph, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _graph(self, n: int) -> tuple[Graph, torch.Tensor, torch.Tensor, torch.Tensor]:
        graph, lib = Graph(self.n_threads), library()
        gate, up, down = self.stacks
        x, x_data = graph.input((n, 1, self.d))
        ids, ids_data = graph.input((n, self.n_used), torch.int32)

        def product(stack: Quantized, n_in: int, n_out: int, inputs: TensorP) -> tuple[TensorP, torch.Tensor]:
            weights = graph.weights(stack[0], stack[1], n_in, n_out, self.n_expert)
            node = lib.ggml_mul_mat_id(graph.context, weights, inputs, ids)
            return node, graph.result(node, (n, self.n_used, n_out))

        g, _ = product(gate, self.d, self.n_ff, x)
        u, _ = product(up, self.d, self.n_ff, x)
        hidden = graph.swiglu(g, u, self.limit)
        graph.result(hidden, (n, self.n_used, self.n_ff))
        y, y_data = product(down, self.n_ff, self.d, hidden)
        return graph.finish(y), x_data, ids_data, y_data

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x float32 [n, d], expert int [n, n_used], weight float32 [n, n_used] -> float32 [n, d]."""
        n = x.shape[0]
        if n not in self.graphs:
            if n > 1:
                self.graphs = {k: v for k, v in self.graphs.items() if k == 1}
            self.graphs[n] = self._graph(n)
        graph, x_data, ids_data, y_data = self.graphs[n]
        x_data.copy_(x.unsqueeze(1))
        ids_data.copy_(expert)
        graph.run()
        return torch.einsum("nkd,nk->nd", y_data, weight)
