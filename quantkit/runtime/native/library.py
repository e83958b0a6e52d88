"""The compiled products through ctypes: loaded once, compared with ggml's.

Everything here may be called from several threads; ctypes drops the GIL in each call. Linux only: threads sleep on a
futex.
"""

import ctypes
import os
import sys
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.codecs.codebooks import ggml_grid
from quantkit.ggml.library import CpuTraits, library, type_id
from quantkit.ggml.quants import dequantize, row_size
from quantkit.progress import say
from quantkit.runtime.native.compiler import Compiled, Unavailable, compiled

SUPERBLOCK = 256
SWITCH = "QUANTKIT_NATIVE"  # an environment variable; off: ggml computes
CODEBOOKS = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ1_S", "IQ1_M")  # by AVX2 too
TYPES = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", *CODEBOOKS)
TOLERANCE = 1e-6  # of the sum of magnitudes: sums in another order
HALVES = {  # bytes with the exponent of a block's d and dmin
    "Q2_K": (81, 83),
    "Q3_K": (109,),
    "Q4_K": (1, 3),
    "Q5_K": (1, 3),
    "Q6_K": (209,),
    "IQ1_M": (55,),
    **dict.fromkeys(CODEBOOKS[:-1], (1,)),
}


class Matrix(Structure):
    """`matrix` of step.h: a stack of packed matrices [n_expert, n_out, row_bytes]."""

    _fields_ = (
        ("data", c_void_p),
        ("n_in", c_int64),
        ("n_out", c_int64),
        ("row_bytes", c_int64),
        ("type", c_int32),
        ("foreign", c_int32),
        ("from_float", c_void_p),
        ("vec_dot", c_void_p),
        ("act_block", c_int64),
    )


class Layer(Structure):
    """`layer` of step.h: the three stacks of a layer's routed experts."""

    _fields_ = (
        ("gate", Matrix),
        ("up", Matrix),
        ("down", Matrix),
        ("n_expert", c_int64),
        ("n_used", c_int64),
        ("limit", c_float),
    )


class Exchange(Structure):
    """`exchange` of pool.h: a step's rows from a GPU, and where it looks for their answer. rows: whose memory that is,
    which lives as long."""

    rows: object
    _fields_ = (
        ("n", c_int64),
        ("m", c_int64),
        ("x", c_void_p),
        ("ids", c_void_p),
        ("weight", c_void_p),
        ("out", c_void_p),
        ("kept", c_void_p),
        ("arrived", c_void_p),
        ("answered", c_void_p),
        ("patience_ns", c_int64),
    )


_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qk_kernels": (c_char_p, []),
    "qk_has": (c_int, [c_int]),
    "qk_codebook": (None, [c_int, c_void_p]),
    "qk_act_bytes": (c_int64, [c_int64]),
    "qk_quantize": (None, [c_void_p, c_void_p, c_int64]),
    "qk_product": (None, [c_int, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int, c_void_p]),
    "qk_pool": (c_void_p, [c_int, c_int64, POINTER(c_int32), c_int]),
    "qk_wake": (None, [c_void_p]),
    "qk_experts": (c_int, [c_void_p, POINTER(Layer), c_int64, c_void_p, c_void_p, c_void_p, c_void_p, c_int]),
    "qk_exchange": (c_int, [c_void_p, POINTER(Layer), POINTER(Exchange), c_int32]),
    "qk_busy_ns": (c_int64, [c_void_p]),
    "qk_node": (c_void_p, [POINTER(Layer), POINTER(c_int32)]),
    "qk_drop_node": (None, [c_void_p]),
}


class Native:
    """The functions of _SIGNATURES as attributes. types: whose products are ours; those of others are ggml's.
    compute_node: address of a ggml_custom3_op_t."""

    def __init__(self, built: Compiled):
        """OSError if it cannot be loaded."""
        self.by, lib = built.by, ctypes.CDLL(str(built.path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.compute_node = ctypes.cast(lib.qk_compute_node, c_void_p).value
        for kind, table in enumerate(_tables()):
            self.qk_codebook(kind, table.ctypes.data)
        self.types = {qtype for qtype in TYPES if self.qk_has(type_id(qtype)) and self._agrees(qtype)}

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Callable[..., Any]: ...

    def __str__(self) -> str:
        return f"{self.qk_kernels().decode()}, compiled by {self.by}"

    def product(self, qtype: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
        """By one thread, of a type of `types`: packed rows uint8 [n, row_bytes] times x float32 [m, n_in], m at most
        16 -> float32 [n, m]."""
        m, n_in = x.shape
        size = self.qk_act_bytes(n_in)
        acts, out = aligned(m * size), np.empty((len(rows), m), np.float32)
        for i, row in enumerate(x):
            self.qk_quantize(row.ctypes.data, acts.ctypes.data + i * size, n_in)
        shape = (rows.shape[1], len(rows), n_in)
        self.qk_product(type_id(qtype), rows.ctypes.data, *shape, acts.ctypes.data, m, out.ctypes.data)
        return out

    def _agrees(self, qtype: str) -> bool:
        """Whether random blocks give what ggml gives; said if not."""
        generator, n_in = np.random.default_rng(0), 4 * SUPERBLOCK
        rows = generator.integers(0, 256, (8, row_size(qtype, n_in)), np.uint8)
        for byte in HALVES[qtype]:  # of ordinary size, so that none hides the others
            blocks = rows.reshape(-1, row_size(qtype, SUPERBLOCK))
            blocks[:, byte] = blocks[:, byte] & 3 | 0x28
        x = generator.standard_normal((3, n_in), np.float32)
        magnitudes = np.abs(dequantize(qtype, rows, n_in)) @ np.abs(x).T
        if (np.abs(self.product(qtype, rows, x) - ggml_product(qtype, rows, x)) <= TOLERANCE * magnitudes).all():
            return True
        say(f"compiled products of {qtype} are not ggml's: ggml computes them")
        return False


def traits(qtype: str) -> tuple[CpuTraits, CpuTraits]:
    """How ggml multiplies by this type, and encodes what it multiplies."""
    own = library().ggml_get_type_traits_cpu(type_id(qtype)).contents
    return own, library().ggml_get_type_traits_cpu(own.vec_dot_type).contents


def act_block(qtype: str) -> int:
    """Bytes of 256 numbers as ggml multiplies this type by them."""
    return library().ggml_row_size(traits(qtype)[0].vec_dot_type, SUPERBLOCK)


def ggml_product(qtype: str, rows: np.ndarray, x: np.ndarray) -> np.ndarray:
    """As `Native.product`, by ggml's function for one row and one column."""
    (own, other), (m, n_in) = traits(qtype), x.shape
    acts = aligned(act_block(qtype) * n_in // SUPERBLOCK)
    out = np.empty((m, len(rows)), np.float32)
    for i, column in enumerate(x):
        other.from_float(column.ctypes.data, acts.ctypes.data, n_in)
        for j, row in enumerate(rows):
            place = out.ctypes.data + out.itemsize * (i * len(rows) + j)
            own.vec_dot(n_in, place, 0, row.ctypes.data, 0, acts.ctypes.data, 0, 1)
    return out.T


def aligned(n_bytes: int) -> np.ndarray:
    """uint8 [n_bytes] that begin on a line of the cache."""
    raw = np.empty(n_bytes + 64, np.uint8)
    begin = -raw.ctypes.data % 64
    return raw[begin : begin + n_bytes]


def _tables() -> list[np.ndarray]:
    """The grids as codebooks.h takes them."""
    grids = [ggml_grid("IQ1_S") + 1, *(ggml_grid(qtype) for qtype in ("IQ2_XXS", "IQ2_XS", "IQ2_S"))]
    return [np.ascontiguousarray(grid).astype(np.uint8) for grid in grids]


_loading = threading.Lock()  # tables are written then, which all products of the process read


def native() -> Native | None:
    """The compiled products, or None where ggml computes: which, and why, is said once."""
    with _loading:
        return _native()


@cache
def _native() -> Native | None:
    try:
        if os.environ.get(SWITCH) == "off":
            raise Unavailable(f"{SWITCH} is off")
        if sys.platform != "linux":
            raise Unavailable("its rival here is for Linux")
        found = Native(compiled())
    except (Unavailable, OSError) as error:
        say(f"routed experts on the CPU by ggml: {error}")
        return None
    say(f"routed experts on the CPU by {found}")
    return found
