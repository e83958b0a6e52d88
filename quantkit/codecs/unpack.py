"""Quantized rows to float32 or bfloat16, without a detour over float32 in memory; by compiled code for types that ggml
decodes slowly.

The formulas are those of ggml's dequantize_row_* (ggml-quants.c), products rounded as there: float32 values are ggml's
bit for bit, bfloat16 ones theirs rounded to nearest (ties to even, in compiled code away from zero).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch

from quantkit.codecs.registry import codec, numba_twin
from quantkit.codecs.types import stored
from quantkit.ggml.quants import dequantize

CACHED = 1 << 16  # weights that are converted from float32 while in the cache
SPAN_ROWS = 64  # rows below which a thread is not worth starting


@torch.inference_mode()  # of each thread its own, and `out` may have been made in it
def _span(qtype: str, data: np.ndarray, n_in: int, out: torch.Tensor, twin: Callable[..., None] | None) -> None:
    single = out.dtype == torch.float32
    if twin is not None:
        blocks = np.ascontiguousarray(data).reshape(-1, codec(qtype).block.itemsize)
        if single:
            twin(blocks, out.view(-1).numpy(), None)
        else:
            twin(blocks, None, out.view(-1).view(torch.uint16).numpy())
    elif single:
        dequantize(qtype, data, n_in, out.numpy())
    else:
        n_rows = max(1, CACHED // n_in)
        buffer = np.empty((n_rows, n_in), np.float32)
        for start in range(0, len(data), n_rows):
            rows = data[start : start + n_rows]
            values = dequantize(qtype, rows, n_in, buffer[: len(rows)])
            out[start : start + n_rows].copy_(torch.from_numpy(values))


def unpack(qtype: str, data: np.ndarray, out: torch.Tensor, pool: ThreadPoolExecutor, workers: int) -> torch.Tensor:
    """Packed rows into `out`, contiguous float32 or bfloat16 [n, n_in] on the CPU, by up to `workers` threads of the
    pool. Returns it."""
    n_in = out.shape[-1]
    rows, flat = data.reshape(-1, stored(qtype).row_bytes(n_in)), out.view(-1, n_in)
    twin = numba_twin(qtype, out.dtype)
    n_parts = max(1, min(workers, len(rows) // SPAN_ROWS))
    if n_parts == 1:
        _span(qtype, rows, n_in, flat, twin)
        return out
    bounds = [i * len(rows) // n_parts for i in range(n_parts + 1)]
    spans = [slice(*span) for span in pairwise(bounds)]
    others = [pool.submit(_span, qtype, rows[span], n_in, flat[span], twin) for span in spans[1:]]
    # This thread has its share too: it need not wait to be woken.
    _span(qtype, rows[spans[0]], n_in, flat[spans[0]], twin)
    for other in others:
        other.result()
    return out
