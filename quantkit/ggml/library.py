"""ggml through ctypes: its structures, the signatures of its functions, and the loaded library.

The library is the one in the `libggml-python` wheel, or the directory named by QUANTKIT_GGML_LIB (a native build of
the same version runs faster). Everything here is safe to call from several threads; ctypes drops the GIL in each call.
"""

import ctypes
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_char, c_float, c_int, c_int32, c_int64, c_size_t, c_uint32, c_void_p
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf

from quantkit.errors import QuantkitError


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


if TYPE_CHECKING:
    TensorP = ctypes._Pointer[Tensor]
else:
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


class InitParams(ctypes.Structure):
    """struct ggml_init_params: the memory of a context."""

    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class Cplan(ctypes.Structure):
    """struct ggml_cplan: how a graph is computed."""

    _fields_ = (
        ("work_size", c_size_t),
        ("work_data", c_void_p),
        ("n_threads", c_int),
        ("threadpool", c_void_p),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        ("use_ref", c_bool),
    )


class ThreadpoolParams(ctypes.Structure):
    """struct ggml_threadpool_params."""

    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class TypeTraits(ctypes.Structure):
    """struct ggml_type_traits: sizes and decoder of a type."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", c_int64),
        ("blck_size_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


FROM_FLOAT = ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)
VEC_DOT = ctypes.CFUNCTYPE(None, c_int, c_void_p, c_size_t, c_void_p, c_size_t, c_void_p, c_size_t, c_int)


class CpuTraits(ctypes.Structure):
    """struct ggml_type_traits_cpu: encoder of a type, its product with rows of vec_dot_type."""

    _fields_ = (("from_float", FROM_FLOAT), ("vec_dot", VEC_DOT), ("vec_dot_type", c_int), ("nrows", c_int64))


FEATURES = ("avx2", "avx512", "avx512_vnni", "neon", "dotprod", "sve")  # that builds differ in
X86: Mapping[str, str] = {  # what a build may use without asking, and Linux's name of it
    **{name: name for name in ("ssse3", "avx", "avx_vnni", "avx2", "bmi2", "f16c", "fma", "amx_int8")},
    **{name: name for name in ("avx512_vbmi", "avx512_vnni", "avx512_bf16")},
    "sse3": "pni",
    "avx512": "avx512f",
}
_SIGNATURES: Mapping[str, Mapping[str, tuple[Any, list[Any]]]] = {
    "base": {
        "ggml_quantize_init": (None, [c_int]),
        "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p]),
        "ggml_quantize_requires_imatrix": (c_bool, [c_int]),
        "ggml_blck_size": (c_int64, [c_int]),
        "ggml_row_size": (c_size_t, [c_int, c_int64]),
        "ggml_get_type_traits": (POINTER(TypeTraits), [c_int]),
        "ggml_tensor_overhead": (c_size_t, []),
        "ggml_version": (ctypes.c_char_p, []),
        "ggml_init": (c_void_p, [InitParams]),
        "ggml_free": (None, [c_void_p]),
        "ggml_new_tensor_3d": (TensorP, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "ggml_new_tensor_4d": (TensorP, [c_void_p, c_int, c_int64, c_int64, c_int64, c_int64]),
        "ggml_mul_mat": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_mul_mat_id": (TensorP, [c_void_p, TensorP, TensorP, TensorP]),
        "ggml_swiglu_split": (TensorP, [c_void_p, TensorP, TensorP]),
        "ggml_clamp": (TensorP, [c_void_p, TensorP, c_float, c_float]),
        "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
        "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
        "ggml_backend_cpu_buffer_type": (c_void_p, []),
        "ggml_gallocr_new": (c_void_p, [c_void_p]),
        "ggml_gallocr_alloc_graph": (c_bool, [c_void_p, c_void_p]),
        "ggml_gallocr_free": (None, [c_void_p]),
        "ggml_map_custom1_inplace": (TensorP, [c_void_p, TensorP, CUSTOM, c_int, c_void_p]),
        "ggml_map_custom3": (TensorP, [c_void_p, *[TensorP] * 3, c_void_p, c_int, c_void_p]),
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
        "ggml_threadpool_params_default": (ThreadpoolParams, [c_int]),
    },
    "cpu": {
        "ggml_cpu_init": (None, []),
        "ggml_backend_cpu_reg": (c_void_p, []),
        **{f"ggml_cpu_has_{feature}": (c_int, []) for feature in (*FEATURES, *X86)},
        "ggml_get_type_traits_cpu": (POINTER(CpuTraits), [c_int]),
        "ggml_graph_plan": (Cplan, [c_void_p, c_int, c_void_p]),
        "ggml_graph_compute": (c_int, [c_void_p, POINTER(Cplan)]),
        "ggml_threadpool_new": (c_void_p, [POINTER(ThreadpoolParams)]),
    },
}

GRAPH_OBJECT_BYTES = 32  # sizeof(struct ggml_object), stored before every tensor in a context


class Library:
    """The two shared objects, with the functions of _SIGNATURES as attributes."""

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
        self._check_processor()
        # A context charges sizeof(ggml_object) + sizeof(ggml_tensor) a tensor: another layout would corrupt memory.
        if self.ggml_tensor_overhead() != ctypes.sizeof(Tensor) + GRAPH_OBJECT_BYTES:
            raise QuantkitError(f"{folder} holds another ggml than 0.20: install libggml-python==0.20.2.post1")
        self.ggml_log_set(_log, None)
        self.ggml_cpu_init()

    def _check_processor(self) -> None:
        """Before ggml computes anything: an instruction that a processor lacks ends the process without a word."""
        flags = processor_flags()
        lacking = [name for name, flag in X86.items() if getattr(self, f"ggml_cpu_has_{name}")() and flag not in flags]
        if flags and lacking:
            raise QuantkitError(
                f"the ggml in {self.folder} is built for {' '.join(lacking)}, which this processor lacks: build ggml "
                "0.20.2 on this machine and name its folder in QUANTKIT_GGML_LIB"
            )

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def __str__(self) -> str:
        features = [name for name in FEATURES if getattr(self, f"ggml_cpu_has_{name}")()]
        return f"ggml {self.ggml_version().decode()} ({' '.join(features) or 'plain'}) of {self.folder}"


def processor_flags() -> frozenset[str]:
    """What Linux says that an x86 processor can do; empty on others."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    return frozenset(next((line.split()[2:] for line in text.splitlines() if line.startswith("flags\t")), ()))


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
    """enum ggml_type by its name; QuantkitError for a name that is none."""
    try:
        return int(gguf.GGMLQuantizationType[qtype])
    except KeyError:
        raise QuantkitError(f"unknown ggml type {qtype}") from None
