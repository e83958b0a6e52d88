"""The way from the scheduler's thread to the event loop."""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

Letters = list[tuple[asyncio.Queue[Any], Any]]


class Post:
    """Puts things into queues of an event loop, all from one thread. Within `held` they wait for each other: whatever
    wakes the loop takes the interpreter from the thread that computes, and a step has a token for everybody."""

    def __init__(self) -> None:
        self.letters: dict[asyncio.AbstractEventLoop, Letters] = {}
        self.holding = False

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], thing: Any) -> None:
        """In the order of calls."""
        self.letters.setdefault(loop, []).append((queue, thing))
        if not self.holding:
            self._send()

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """What is put within it is there after it."""
        self.holding = True
        try:
            yield
        finally:
            self.holding = False
            self._send()

    def _send(self) -> None:
        sent, self.letters = self.letters, {}
        for loop, letters in sent.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, letters)


def _deliver(letters: Letters) -> None:
    for queue, thing in letters:
        queue.put_nowait(thing)
