"""Quantized rows to float32 or bfloat16, without a detour over float32 in memory; by compiled code for types that ggml
decodes slowly.

The formulas are those of ggml's dequantize_row_* (ggml-quants.c), products rounded as there: float32 values are ggml's
bit for bit, bfloat16 ones theirs rounded to nearest (ties to even, in compiled code away from zero).
"""

from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from types import ModuleType

import gguf
import numpy as np
import torch

from quantkit.ggml import library as ggml

CACHED = 1 << 16  # weights that are converted from float32 while in the cache
SPAN_ROWS = 64  # rows below which a thread is not worth starting
COMPILED = frozenset({"Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ2_XXS"})  # types with a kernel of our own
FASTER_SINGLE = frozenset({"Q6_K", "IQ1_S", "IQ2_XXS"})  # faster than ggml's as float32 too


@cache
def compiled() -> ModuleType | None:
    """Our kernels, loaded on first use (numba takes half a second); None where numba is not installed."""
    try:
        from quantkit.codecs import numba_decode as block_kernels
    except ModuleNotFoundError:
        return None
    return block_kernels


@cache
def _halves() -> np.ndarray:
    """What each float16 is, by its bits: float32 [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def _entries(values: np.ndarray) -> np.ndarray:
    """float32 [n, 8], exact as bfloat16, -> its bits, uint64 [2 n]."""
    return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint64)


@cache
def _tables(qtype: str) -> tuple[np.ndarray, ...]:
    """IQ1_S: its grid shifted up, then down. IQ2_XXS: its grid, and the sign bits of 128 patterns, of which the eighth
    makes their product +1."""
    if qtype == "IQ1_S":
        gguf.quants.IQ1_S.init_grid()
        grid, delta = gguf.quants.IQ1_S.grid.reshape(-1, 8), gguf.quants.IQ1_S.delta
        return (_entries(np.concatenate([grid + delta, grid - delta])),)
    if qtype == "IQ2_XXS":
        gguf.quants.IQ2_XXS.init_grid()
        bits = (np.arange(128)[:, None] >> np.arange(7)) & 1
        signs = np.concatenate([bits, bits.sum(1, keepdims=True) % 2], axis=1).astype(np.uint16) << 15
        return _entries(gguf.quants.IQ2_XXS.grid.reshape(-1, 8)), signs.reshape(-1).view(np.uint64)
    return ()


@torch.inference_mode()  # of each thread its own, and `out` may have been made in it
def _span(qtype: str, data: np.ndarray, n_in: int, out: torch.Tensor) -> None:
    single = out.dtype == torch.float32
    kernels = compiled() if qtype in (FASTER_SINGLE if single else COMPILED) else None
    if kernels is None:
        if single:
            ggml.dequantize(qtype, data, n_in, out.numpy())
            return
        n_rows = max(1, CACHED // n_in)
        buffer = np.empty((n_rows, n_in), np.float32)
        for start in range(0, len(data), n_rows):
            rows = data[start : start + n_rows]
            values = ggml.dequantize(qtype, rows, n_in, buffer[: len(rows)])
            out[start : start + n_rows].copy_(torch.from_numpy(values))
        return
    blocks = np.ascontiguousarray(data).reshape(-1, ggml.row_bytes(qtype, kernels.SUPERBLOCK))
    numbers = (out.view(-1) if single else out.view(-1).view(torch.uint16)).numpy()
    outputs = (numbers, None) if single else (None, numbers)
    kernels.KERNELS[qtype](blocks, *outputs, _halves(), _tables(qtype), kernels.WIDTH)


def unpack(qtype: str, data: np.ndarray, out: torch.Tensor, pool: ThreadPoolExecutor, workers: int) -> torch.Tensor:
    """Packed rows into `out`, contiguous float32 or bfloat16 [n, n_in] on the CPU, by up to `workers` threads of the
    pool. Returns it."""
    n_in = out.shape[-1]
    rows, flat = data.reshape(-1, ggml.row_bytes(qtype, n_in)), out.view(-1, n_in)
    n_parts = max(1, min(workers, len(rows) // SPAN_ROWS))
    if n_parts == 1:
        _span(qtype, rows, n_in, flat)
        return out
    bounds = [i * len(rows) // n_parts for i in range(n_parts + 1)]
    spans = [slice(*span) for span in pairwise(bounds)]
    others = [pool.submit(_span, qtype, rows[span], n_in, flat[span]) for span in spans[1:]]
    _span(qtype, rows[spans[0]], n_in, flat[spans[0]])  # this thread has its share too: it need not wait to be woken
    for other in others:
        other.result()
    return out
