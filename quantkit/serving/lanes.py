"""Where requests are made ready, beside the event loop: rendered and tokenized, short ones not behind long ones."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from quantkit.errors import QuantkitError
from quantkit.serving.refusals import Refused
from quantkit.serving.renderer import Renderer

SHORT = 16 << 10  # bytes of a request

Made = TypeVar("Made")


class Lanes:
    """One thread with its renderer for short requests, one for others. most: that may wait."""

    def __init__(self, most: int):
        self.most, self.n_waiting, self.closed = most, 0, False
        self.renderers = Renderer(), Renderer()
        self.threads = [ThreadPoolExecutor(1, f"quantkit-lane-{i}") for i in range(2)]
        for renderer in self.renderers:
            renderer.start()

    async def run(self, size: int, work: Callable[[Renderer], Made]) -> Made:
        """What `work` makes of a request of so many bytes, in its lane. Refused if too many wait."""
        if self.n_waiting >= self.most:
            raise Refused(429, f"{self.n_waiting} requests wait to be tokenized", "queue_full", {"Retry-After": "1"})
        self.n_waiting += 1
        lane = int(size > SHORT)
        try:
            if not self.closed:
                return await asyncio.get_running_loop().run_in_executor(self.threads[lane], work, self.renderers[lane])
        except (asyncio.CancelledError, QuantkitError, Refused):
            if not self.closed:
                raise
        finally:
            self.n_waiting -= 1
        raise Refused(503, "the server is shutting down")

    def close(self) -> None:
        """What waits is not begun, what renders is ended."""
        self.closed = True
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for renderer in self.renderers:
            renderer.close()
