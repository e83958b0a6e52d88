"""Work that follows a pass over the layers in a thread of its own."""

import contextlib
import os
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

from quantkit.progress import Advance

Work = Callable[[Advance], None]
"""Calls what it is given now and then, and is ended there when the pass has failed."""


LOW = 10  # nice


def _give_way() -> None:
    """Lower the priority of this thread and of those that it starts (Linux has one for each thread)."""
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), LOW)


class Behind:
    """Does what it is given, in order, at most so many pieces of work behind. An error is raised by the next `add`, or
    by `close`."""

    def __init__(self, most: int, first: Callable[[], None]):
        """first: what the thread begins with, for one core; if it fails, so does what needs it. What is added after it
        takes the time that the pass leaves: threads that share a product wait for the last of them."""
        self.most, self._stopped = most, False
        self._thread = ThreadPoolExecutor(1, "behind")
        self._waiting: list[Future[None]] = []
        self._thread.submit(first)
        self._thread.submit(_give_way)

    def add(self, work: Work) -> None:
        """Waits until fewer than `most` are waiting."""
        self._wait(self.most - 1)
        self._waiting.append(self._thread.submit(work, self._go_on))

    def close(self, failed: bool) -> None:
        """Waits for all of it; of a pass that has failed only until the work under way next calls."""
        self._stopped = failed
        self._thread.shutdown(cancel_futures=failed)
        if not failed:
            self._wait(0)

    def _wait(self, most: int) -> None:
        while len(self._waiting) > most or (self._waiting and self._waiting[0].done()):
            self._waiting.pop(0).result()

    def _go_on(self, amount: float = 1, at: str = "", before: bool = False) -> None:
        if self._stopped:
            raise CancelledError
