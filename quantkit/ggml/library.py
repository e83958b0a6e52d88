"""ggml through ctypes: reference encoders, decoders and quantized matrix products on the CPU.

The library is the one in the `libggml-python` wheel, or the directory named by QUANTKIT_GGML_LIB (a native build of
the same version runs faster). Everything here is safe to call from several threads; ctypes drops the GIL in each call.
"""

import ctypes
import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from itertools import takewhile
from pathlib import Path

import gguf
import numpy as np
import torch

from quantkit.errors import QuantkitError

NO_TABLES = frozenset({"F32", "F16", "BF16"})


class Tensor(ctypes.Structure):
    """struct ggml_tensor of ggml 0.20 (ggml.h); its size is checked against ggml_tensor_overhead at load."""

    _fields_ = (
        ("type", c_int),
        ("buffer", c_void_p),
        ("ne", c_int64 * 4),
        ("nb", c_size_t * 4),
        ("op", c_int),
        ("op_params", c_int32 * 16),
        ("flags", c_int32),
        ("src", c_void_p * 10),
        ("view_src", c_void_p),
        ("view_offs", c_size_t),
        ("data", c_void_p),
        ("name", c_char * 64),
        ("extra", c_void_p),
        ("padding", c_char * 8),
    )


TensorP = POINTER(Tensor)


CUSTOM = ctypes.CFUNCTYPE(None, TensorP, TensorP, c_int, c_int, c_void_p)
LOG = ctypes.CFUNCTYPE(None, c_int, ctypes.c_char_p, c_void_p)
WARNING, ERROR = 3, 4  # enum ggml_log_level


@LOG
def _log(level: int, text: bytes, _: object) -> None:
    """Warnings and errors only: ggml reports every matrix that it repacks. Of the module, not of a `Library`: threads
    that load ggml at the same time make several, and ggml goes on calling what the last one gave it."""
    if level in (WARNING, ERROR):
        logging.getLogger(__name__).warning(text.decode(errors="replace").rstrip())


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _Cplan(ctypes.Structure):
    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class _ThreadpoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


FEATURES = ("avx2", "avx512", "avx512_vnni", "neon", "dotprod", "sve")  # that builds differ in
_SIGNATURES = {
    "base": {
        "ggml_quantize_init": (None, [c_int]),
        "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
        "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_version": (ctypes.c_char_p, []),
        "ggml_init": (c_void_p, [_InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_new_tensor_3d": (TensorP, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "ggml_new_tensor_4d": (TensorP, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
        "ggml_mul_mat": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_mul_mat_id": (TensorP, [c_void_p, TensorP, TensorP, TensorP]),
        "ggml_swiglu_split": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
        "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_gallocr_new": (c_void_p, [c_void_p]),
        "ggml_gallocr_alloc_graph": (c_bool, [c_void_p, c_void_p]),
        "ggml_gallocr_free": (None, [c_void_p]),
        "ggml_map_custom1_inplace": (TensorP, [c_void_p, TensorP, CUSTOM, c_int, c_void_p]),
        "ggml_add": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_mul": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_div": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_scale": (TensorP, [c_void_p, TensorP, c_float]),
        "ggml_fill": (TensorP, [c_void_p, TensorP, c_float]),
        "ggml_sigmoid": (TensorP, [c_void_p, TensorP]),
        "ggml_soft_max": (TensorP, [c_void_p, TensorP]),
        "ggml_sum_rows": (TensorP, [c_void_p, TensorP]),
        "ggml_rms_norm": (TensorP, [c_void_p, TensorP, c_float]),
        "ggml_get_rows": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_set_rows": (TensorP, [c_void_p, TensorP, TensorP, TensorP]),
        "ggml_argsort_top_k": (TensorP, [c_void_p, TensorP, c_int]),
        "ggml_concat": (TensorP, [c_void_p, TensorP, TensorP, c_int]),
        "ggml_cont": (TensorP, [c_void_p, TensorP]),
        "ggml_permute": (TensorP, [c_void_p, TensorP, c_int, c_int, c_int, c_int]),
        "ggml_reshape_4d": (TensorP, [c_void_p, TensorP, c_int64, c_int64, c_int64, c_int64]),
        "ggml_view_4d": (TensorP, [c_void_p, TensorP, *[c_int64] * 4, *[c_size_t] * 4]),
        "ggml_rope_ext": (TensorP, [c_void_p, *[TensorP] * 3, *[c_int] * 3, *[c_float] * 6]),
        "ggml_flash_attn_ext": (TensorP, [c_void_p, *[TensorP] * 4, *[c_float] * 3]),
        "ggml_build_forward_expand": (None, [c_void_p, TensorP]),
        "ggml_nbytes": (c_size_t, [TensorP]),
        "ggml_log_set": (None, [LOG, c_void_p]),
        "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, ctypes.c_char_p]),
        "ggml_backend_buft_name": (ctypes.c_char_p, [c_void_p]),
        "ggml_backend_buft_alloc_buffer": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_buffer_get_base": (c_void_p, [c_void_p]),
        "ggml_backend_buffer_free": (None, [c_void_p]),
        "ggml_backend_tensor_alloc": (c_int, [c_void_p, TensorP, c_void_p]),
        "ggml_backend_tensor_set": (None, [TensorP, c_void_p, c_size_t, c_size_t]),
        "ggml_threadpool_params_default": (_ThreadpoolParams, [c_int]),
    },
    "cpu": {
        "ggml_cpu_init": (None, []),
        "ggml_backend_cpu_reg": (c_void_p, []),
        **{f"ggml_cpu_has_{feature}": (c_int, []) for feature in FEATURES},
        "ggml_graph_plan": (_Cplan, [c_void_p, c_int, c_void_p]),
        "ggml_graph_compute": (c_int, [c_void_p, POINTER(_Cplan)]),
        "ggml_threadpool_new": (c_void_p, [POINTER(_ThreadpoolParams)]),
    },
}

GRAPH_OBJECT_BYTES = 32  # sizeof(struct ggml_object), stored before every tensor in a context


class Library:
    """The two shared objects with typed functions as attributes."""

    def __init__(self, folder: Path):
        self.folder = folder
        for part, functions in _SIGNATURES.items():
            try:
                lib = ctypes.CDLL(str(folder / f"libggml-{part}.so"), mode=ctypes.RTLD_GLOBAL)
            except OSError as error:
                raise QuantkitError(f"cannot load libggml-{part}.so from {folder}: {error}") from error
            for name, (result, arguments) in functions.items():
                function = getattr(lib, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name, function)
        # A context charges sizeof(ggml_object) + sizeof(ggml_tensor) a tensor: another layout would corrupt memory.
        if self.ggml_tensor_overhead() != ctypes.sizeof(Tensor) + GRAPH_OBJECT_BYTES:
            raise QuantkitError(f"{folder} holds another ggml than 0.20: install libggml-python==0.20.2.post1")
        self.ggml_log_set(_log, None)
        self.ggml_cpu_init()

    def __str__(self) -> str:
        features = [name for name in FEATURES if getattr(self, f"ggml_cpu_has_{name}")()]
        return f"ggml {self.ggml_version().decode()} ({' '.join(features) or 'plain'}) of {self.folder}"


@cache
def library() -> Library:
    """Load ggml once per process. Raises QuantkitError if it is missing or of another version."""
    if folder := os.environ.get("QUANTKIT_GGML_LIB"):
        return Library(Path(folder))
    spec = importlib.util.find_spec("libggml")
    if spec is None or not spec.submodule_search_locations:
        raise QuantkitError("ggml is missing: pip install libggml-python==0.20.2.post1")
    package = Path(spec.submodule_search_locations[0])
    return Library(next((package / name for name in ("lib64", "lib") if (package / name).is_dir()), package))


@cache
def repacking() -> int | None:
    """ggml's kind of memory in which the rows of a matrix are interleaved, for products with several rows at once; None
    if this build has none."""
    lib = library()
    registry = lib.ggml_backend_cpu_reg()
    address = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
    kinds = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(lib.ggml_backend_reg_dev_get(registry, 0))
    return next((kind for kind in takewhile(bool, kinds) if lib.ggml_backend_buft_name(kind) == b"CPU_REPACK"), None)


def type_id(qtype: str) -> int:
    try:
        return int(gguf.GGMLQuantizationType[qtype])
    except KeyError:
        raise QuantkitError(f"unknown ggml type {qtype}") from None


def block_size(qtype: str) -> int:
    """Weights in a block of the type."""
    return gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id(qtype))][0]


def row_bytes(qtype: str, n_in: int) -> int:
    """Bytes of a row of n_in weights; QuantkitError if rows of that length cannot take the type."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_id(qtype))]
    if n_in % block:
        raise QuantkitError(f"{qtype} packs {block} weights a block; a row of {n_in} is not a multiple of that")
    return n_in // block * size


_tables_lock = threading.Lock()
_tables_ready: set[str] = set()


def prepare(qtype: str) -> None:
    """Build a type's search tables once per process (IQ1_S: over ten seconds; ggml's own lock is not enough)."""
    if qtype in NO_TABLES or qtype in _tables_ready:
        return
    with _tables_lock:
        if qtype not in _tables_ready:
            library().ggml_quantize_init(type_id(qtype))
            _tables_ready.add(qtype)


def requires_importance(qtype: str) -> bool:
    return bool(library().ggml_quantize_requires_imatrix(type_id(qtype)))


def quantize(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode with ggml's reference encoder.

    rows: float32 [n, n_in], finite. importance: float32 [n_in] mean square of the inputs, or None.
    Returns uint8 [n, row_bytes], byte for byte what llama-quantize writes for these numbers.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_in = rows.shape
    width = row_bytes(qtype, n_in)
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        if importance.shape != (n_in,):
            raise ValueError(f"importance {importance.shape} for rows of {n_in}")
    prepare(qtype)
    out = np.empty((n_rows, width), dtype=np.uint8)
    weights = None if importance is None else importance.ctypes.data
    written = library().ggml_quantize_chunk(type_id(qtype), rows.ctypes.data, out.ctypes.data, 0, n_rows, n_in, weights)
    if written != out.nbytes:
        raise QuantkitError(f"ggml wrote {written} bytes of {qtype} where {out.nbytes} were expected")
    return out


def dequantize(qtype: str, data: np.ndarray, n_in: int, out: np.ndarray | None = None) -> np.ndarray:
    """Decode packed rows: uint8 [n, row_bytes] -> float32 [n, n_in], into `out` if it is given (contiguous)."""
    data = np.ascontiguousarray(data)
    n_rows = data.size // row_bytes(qtype, n_in)
    out = np.empty((n_rows, n_in), dtype=np.float32) if out is None else out
    if qtype == "F32":
        out[:] = data.view(np.float32).reshape(-1, n_in)
        return out
    traits = library().ggml_get_type_traits(type_id(qtype)).contents
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out


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
_compute_lock = threading.Lock()  # one graph at a time may use the pool


class Graph:
    """A ggml graph, built once for one batch size and run many times. Inputs, weights and results are memory that we
    own; so is every intermediate node, unless `finish` is told to allocate those."""

    def __init__(self, n_threads: int, max_tensors: int = 32):
        self.lib = library()
        self.n_threads = n_threads
        size = self.lib.ggml_tensor_overhead() * max_tensors + 4096
        size += self.lib.ggml_graph_overhead_custom(max_tensors, False)
        self.arena = ctypes.create_string_buffer(size)
        self.context = self.lib.ggml_init(_InitParams(size, ctypes.addressof(self.arena), True))
        self.graph = self.lib.ggml_new_graph_custom(self.context, max_tensors, False)
        self.keep: list[object] = [self.arena]
        self.buffers: list[int] = []
        self.copied = 0  # bytes of weights in those buffers
        self.failure: BaseException | None = None
        self.plan: _Cplan | None = None
        self.allocator = None

    def op(self, name: str, *arguments) -> "TensorP":
        """A node: ggml_<name> with these arguments."""
        return getattr(self.lib, f"ggml_{name}")(self.context, *arguments)

    def watch(self, ids: "TensorP", visitor: Callable[[list[int]], None]) -> "TensorP":
        """Call visitor with the int32 values of a node of at most two dimensions as soon as they are computed, and
        before anything that is computed from what is returned here: the same node. What it raises, `run` raises."""

        @CUSTOM
        def call(_, node, thread, n_threads, data):
            if thread == 0 and self.failure is None:
                width, rows, stride = node.contents.ne[0], node.contents.ne[1], node.contents.nb[1]
                starts = range(node.contents.data, node.contents.data + rows * stride, stride)
                try:
                    visitor([i for start in starts for i in (c_int32 * width).from_address(start)])
                except BaseException as error:  # ctypes would print it and go on; `run` raises it
                    self.failure = error

        self.keep.append(call)
        return self.op("map_custom1_inplace", ids, call, 1, None)

    def expand(self, node: "TensorP") -> None:
        """Nodes run in the order in which they are expanded: a write must come before the reads that depend on it."""
        self.lib.ggml_build_forward_expand(self.graph, node)

    def weights(
        self, qtype: str, data: np.ndarray, n_in: int, n_out: int, n_matrices: int = 1, repack: bool = False
    ) -> "TensorP":
        """A quantized matrix (or a stack of them) over existing bytes, usually a memory map of the file. repack:
        if ggml has faster products for this type with rows interleaved, then over a copy of that form."""
        tensor = self.lib.ggml_new_tensor_3d(self.context, type_id(qtype), n_in, n_out, n_matrices)
        if data.nbytes != self.lib.ggml_nbytes(tensor) or not data.flags.c_contiguous:
            raise ValueError(f"{data.nbytes} bytes for {n_matrices}x{n_out}x{n_in} {qtype}")
        if not (repack and self._repacked(tensor, data)):
            tensor.contents.data = data.ctypes.data
            self.keep.append(data)
        return tensor

    def _repacked(self, tensor: "TensorP", data: np.ndarray) -> bool:
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

    def input(self, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple["TensorP", torch.Tensor]:
        """An input and the torch tensor (numpy order) that shares its memory: fill it before `run`."""
        storage = torch.zeros(shape, dtype=dtype)
        return self.over(storage), storage

    def over(self, storage: torch.Tensor) -> "TensorP":
        """A tensor over a contiguous torch tensor's memory, at most four-dimensional."""
        ne = list(reversed(storage.shape)) + [1] * (4 - storage.dim())
        tensor = self.lib.ggml_new_tensor_4d(self.context, _TORCH_TYPES[storage.dtype], *ne)
        tensor.contents.data = storage.data_ptr()
        self.keep.append(storage)
        return tensor

    def result(self, tensor: "TensorP", shape: tuple[int, ...]) -> torch.Tensor:
        """Give an intermediate or final float32 node its memory; returns the torch view of it."""
        storage = torch.empty(shape, dtype=torch.float32)
        if storage.nbytes != self.lib.ggml_nbytes(tensor):
            raise ValueError(f"result of {self.lib.ggml_nbytes(tensor)} bytes is not {shape}")
        tensor.contents.data = storage.data_ptr()
        self.keep.append(storage)
        return storage

    def finish(self, *outputs: "TensorP", allocate: bool = False, reference: bool = False) -> "Graph":
        """allocate: give nodes without memory their place in one buffer, reused as they die. reference: ggml's plain
        kernels, whose result for a sequence does not depend on how many others there are."""
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
        self.failure = None
        with _compute_lock:
            status = self.lib.ggml_graph_compute(self.graph, byref(self.plan))
        if self.failure is not None:
            raise self.failure
        if status:
            raise QuantkitError(f"ggml graph failed with status {status}")

    def __del__(self):
        for buffer in getattr(self, "buffers", ()):
            self.lib.ggml_backend_buffer_free(buffer)
        if getattr(self, "allocator", None):
            self.lib.ggml_gallocr_free(self.allocator)
        if getattr(self, "context", None):
            self.lib.ggml_free(self.context)


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
        if n not in self.graphs:
            if n > 1:  # prompts come in every length: keep the decode graph and the newest other one
                self.graphs = {k: v for k, v in self.graphs.items() if k == 1}
            self.graphs[n] = self._graph(n)
        graph, x_data, y_data = self.graphs[n]
        x_data.copy_(x)
        graph.run()
        return y_data.clone()


class Experts:
    """Routed experts of one layer, computed from their quantized bytes by ggml's mul_mat_id.

    gate, up: (qtype, uint8 [n_expert, n_ff, row_bytes]); down: (qtype, uint8 [n_expert, d, row_bytes]).
    """

    def __init__(self, gate, up, down, d: int, n_ff: int, n_expert: int, n_used: int, n_threads: int):
        self.stacks, self.d, self.n_ff, self.n_expert, self.n_used = (gate, up, down), d, n_ff, n_expert, n_used
        self.n_threads = n_threads
        self.graphs: dict[int, tuple[Graph, torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def _graph(self, n: int):
        graph, lib = Graph(self.n_threads), library()
        gate, up, down = self.stacks
        x, x_data = graph.input((n, 1, self.d))
        ids, ids_data = graph.input((n, self.n_used), torch.int32)

        def product(stack, n_in, n_out, inputs):
            weights = graph.weights(stack[0], stack[1], n_in, n_out, self.n_expert)
            node = lib.ggml_mul_mat_id(graph.context, weights, inputs, ids)
            return node, graph.result(node, (n, self.n_used, n_out))

        g, _ = product(gate, self.d, self.n_ff, x)
        u, _ = product(up, self.d, self.n_ff, x)
        hidden = lib.ggml_swiglu_split(graph.context, g, u)
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
