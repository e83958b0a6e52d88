"""ggml's reference encoders and decoders, one type at a time. Sizes are those that ggml itself states."""

import threading

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.ggml.library import library, type_id

_tables_lock = threading.Lock()
_tables_ready: set[str] = set()


def prepare(qtype: str) -> None:
    """Build a type's search tables once per process (IQ1_S: over ten seconds; ggml's own lock is not enough)."""
    if qtype in _tables_ready:
        return
    with _tables_lock:
        if qtype not in _tables_ready:
            library().ggml_quantize_init(type_id(qtype))
            _tables_ready.add(qtype)


def requires_importance(qtype: str) -> bool:
    """Whether ggml refuses to encode this type without an imatrix."""
    return bool(library().ggml_quantize_requires_imatrix(type_id(qtype)))


def row_size(qtype: str, n_in: int) -> int:
    """Bytes of a row: ggml's own answer, which would abort the process for one that is not whole blocks. QuantkitError
    for such a row."""
    block = library().ggml_blck_size(type_id(qtype))
    if n_in % block:
        raise QuantkitError(f"{qtype} packs {block} weights a block; a row of {n_in} is not a multiple of that")
    return library().ggml_row_size(type_id(qtype), n_in)


def quantize(qtype: str, rows: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """Encode with ggml's reference encoder.

    rows: float32 [n, n_in], finite. importance: float32 [n_in] mean square of the inputs, or None.
    Returns uint8 [n, row_bytes], byte for byte what llama-quantize writes for these numbers.
    """
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    n_rows, n_in = rows.shape
    width = row_size(qtype, n_in)
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
    """Decode packed rows: uint8 [n, row_bytes] -> float32 [n, n_in], into `out` if it is given (contiguous).

    QuantkitError for a type that ggml cannot decode (Q8_K, integers).
    """
    data = np.ascontiguousarray(data)
    n_rows = data.size // row_size(qtype, n_in)
    if out is None:
        out = np.empty((n_rows, n_in), dtype=np.float32)
    if qtype == "F32":
        out[:] = data.view(np.float32).reshape(-1, n_in)
        return out
    traits = library().ggml_get_type_traits(type_id(qtype)).contents
    if not traits.to_float:
        raise QuantkitError(f"ggml has no decoder for {qtype}")
    traits.to_float(data.ctypes.data, out.ctypes.data, out.size)
    return out
