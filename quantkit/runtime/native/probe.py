"""How fast this machine's CPU multiplies packed weights: about a second of work, kept nowhere."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from quantkit.ggml.graph import Linear
from quantkit.ggml.quants import row_size
from quantkit.runtime.native.library import HALVES, SUPERBLOCK, native

N_IN, REPEAT = 4096, 3
THREAD_BYTES = 8 << 20  # of each thread's rows: beyond its own caches
BY_GGML = ("IQ3_XXS", "IQ4_XS", "Q8_0")


def rates(n_threads: int) -> dict[str, float]:
    """Packed weights/s of so many threads at once, by type, for one token: by our products where they are compiled, by
    ggml's else."""
    lib, generator, found = native(), np.random.default_rng(0), dict[str, float]()
    x = generator.standard_normal((1, N_IN), np.float32)
    with ThreadPoolExecutor(n_threads) as pool:
        for qtype in (*HALVES, *BY_GGML):
            rows = _rows(qtype, n_threads * THREAD_BYTES, generator)
            if lib and qtype in lib.types:
                ours = partial(lib.product, qtype, x=x)
                work: Callable[[], object] = partial(_all, pool, ours, np.array_split(rows, n_threads))
            else:
                work = partial(Linear(qtype, rows, N_IN, len(rows), n_threads), torch.from_numpy(x))
            found[qtype] = len(rows) * N_IN / min(_seconds(work) for _ in range(REPEAT))
    return found


def matrix() -> float:
    """How many times a prompt's products are as fast, see `presets.Cpu`, by the units for bfloat16."""
    if torch.cpu._is_amx_tile_supported():
        return 8.0
    return 4.0 if torch.cpu._is_avx512_bf16_supported() else 2.0


def _rows(qtype: str, n_bytes: int, generator: np.random.Generator) -> np.ndarray:
    """Random rows of N_IN weights, of ordinary size: uint8 [n, row_bytes]."""
    rows = generator.integers(0, 256, (max(1, n_bytes // row_size(qtype, N_IN)), row_size(qtype, N_IN)), np.uint8)
    if qtype not in HALVES:
        rows[:] = rows & 0x2F
        return rows
    blocks = rows.reshape(-1, row_size(qtype, SUPERBLOCK))
    for byte in HALVES[qtype]:
        blocks[:, byte] = blocks[:, byte] & 3 | 0x28
    return rows


def _all(pool: ThreadPoolExecutor, work: Callable[[np.ndarray], object], parts: list[np.ndarray]) -> None:
    list(pool.map(work, parts))


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
