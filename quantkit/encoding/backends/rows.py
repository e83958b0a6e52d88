"""Rows of a matrix shared out to threads. Kernels treat each row alone, and drop the GIL: bytes are the same."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from quantkit import machine

LEAST_ROWS = 16  # for which another thread is worth waking


@cache
def _pool(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "rows")


def by_rows(work: Callable[[slice], object], n_rows: int, step: int = 1) -> None:
    """work(rows) for all of n_rows, in parts that begin at multiples of `step`: one here, the others in threads."""
    n = max(1, min(machine.threads(), n_rows // LEAST_ROWS))
    each = -(-n_rows // (n * step)) * step
    first, *others = [slice(begin, min(begin + each, n_rows)) for begin in range(0, n_rows, each)] or [slice(0, 0)]
    waiting = [_pool(machine.threads()).submit(work, rows) for rows in others]
    try:
        work(first)
    finally:  # nobody writes into arrays that their owner has given up
        for future in waiting:
            future.exception()
    for future in waiting:
        future.result()
