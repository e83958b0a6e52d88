"""How fast this machine's CPU multiplies packed weights: about a second of work, kept nowhere."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import torch

from quantkit.ggml.graph import Linear
from quantkit.ggml.quants import row_size
from quantkit.runtime.native.library import HALVES, SUPERBLOCK, native

N_IN = 4096
SECONDS = 0.03  # for each type: a thread's products take some milliseconds, and so does starting it
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
            works: list[Callable[[], object]]
            if lib and qtype in lib.types:
                works = [partial(lib.product, qtype, part, x) for part in np.array_split(rows, n_threads)]
            else:
                works = [partial(Linear(qtype, rows, N_IN, len(rows), n_threads), torch.from_numpy(x))]
            found[qtype] = _a_second(pool, works) * len(rows) * N_IN / len(works)
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


def _a_second(pool: ThreadPoolExecutor, works: Sequence[Callable[[], object]]) -> float:
    """How often all of them are done, each by a thread that begins with the others and repeats it: the sum."""
    start = threading.Barrier(len(works))

    def repeat(work: Callable[[], object]) -> float:
        start.wait()
        begun, n, took = time.perf_counter(), 0, 0.0
        while took < SECONDS:
            work()
            n, took = n + 1, time.perf_counter() - begun
        return n / took

    return sum(pool.map(repeat, works))
