"""Threads that share out what there is to do."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import TypeVar

import torch

from quantkit import machine

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """n threads: whoever asks, and others that wait in `pool` meanwhile."""

    def __init__(self, n: int | None = None):
        """n: default as many as torch uses, but no more than there are cores for this process."""
        self.n = n or min(torch.get_num_threads(), machine.cores())
        self.pool = ThreadPoolExecutor(self.n)

    def share_out(
        self, work: Callable[[int, Item], Result], items: Sequence[Item], most: int | None = None
    ) -> list[Result]:
        """work(worker, item) of all items, in their order, by at most so many threads (default: all), each of which
        takes the next item when it is done. After an error nobody takes another one."""
        results: dict[int, Result] = {}
        left, n = iter(range(len(items))), min(most or self.n, self.n, len(items))

        @torch.inference_mode()
        def run(worker: int) -> None:
            if worker:  # a thread of the pool has a number of its own, by default all cores
                torch.set_num_threads(1)
            for i in left:
                results[i] = work(worker, items[i])

        with one_thread_each(n):
            others = [self.pool.submit(run, i) for i in range(1, n)]
            try:
                run(0)
            finally:  # nobody works on after an error: what they work on will be used again
                list(left)
                wait(others)
        for other in others:
            other.result()
        return [results[i] for i in range(len(items))]


@contextmanager
def one_thread_each(n: int) -> Iterator[None]:
    """n threads multiply: let torch not divide each of their products once more."""
    before = torch.get_num_threads()
    if n > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if n > 1:
            torch.set_num_threads(before)
