"""Where requests are made ready, beside the event loop: short ones do not wait for long ones, texts not for chats."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from quantkit.errors import QuantkitError
from quantkit.serving.refusals import Refused
from quantkit.serving.renderer import Renderer

SHORT = 16 << 10  # bytes of a request

Made = TypeVar("Made")


class Lanes:
    """A thread for each kind of request: short or long, to be rendered or not; with renderers. most: that may wait."""

    def __init__(self, most: int):
        self.most, self.n_waiting, self.closed = most, 0, False
        self.renderers = Renderer(), Renderer()
        self.threads = [ThreadPoolExecutor(1, f"quantkit-lane-{i}") for i in range(4)]
        for renderer in self.renderers:
            renderer.start()

    async def tokenize(self, size: int, work: Callable[[], Made]) -> Made:
        """What `work` makes of a request of so many bytes. Refused if too many wait."""
        return await self._run(int(size > SHORT), work)

    async def render(self, size: int, work: Callable[[Renderer], Made]) -> Made:
        """As `tokenize`, with a renderer."""
        return await self._run(2 + (size > SHORT), partial(work, self.renderers[size > SHORT]))

    async def _run(self, lane: int, work: Callable[[], Made]) -> Made:
        if self.n_waiting >= self.most:
            raise Refused(429, f"{self.n_waiting} requests wait to be tokenized", "queue_full", {"Retry-After": "1"})
        self.n_waiting += 1
        try:
            self.check_open()
            return await asyncio.get_running_loop().run_in_executor(self.threads[lane], work)
        except (asyncio.CancelledError, QuantkitError, Refused):
            self.check_open()
            raise
        finally:
            self.n_waiting -= 1

    def check_open(self) -> None:
        """Refused at the server's end."""
        if self.closed:
            raise Refused(503, "the server is shutting down")

    def close(self) -> None:
        """What waits is not begun, what renders is ended."""
        self.closed = True
        for thread in self.threads:
            thread.shutdown(wait=False, cancel_futures=True)
        for renderer in self.renderers:
            renderer.close()
