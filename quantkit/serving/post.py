"""The way from the scheduler's thread to the event loop."""

import asyncio
import contextlib
from typing import Any

Letters = list[tuple[asyncio.Queue[Any], Any]]


class Post:
    """Puts things into queues of an event loop, all from one thread. They wait for `send`: whatever wakes the loop
    takes the interpreter from the thread that computes, and a step has a token for everybody."""

    def __init__(self) -> None:
        self.letters: dict[asyncio.AbstractEventLoop, Letters] = {}

    def put(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue[Any], thing: Any) -> None:
        """In the order of calls."""
        self.letters.setdefault(loop, []).append((queue, thing))

    def send(self) -> None:
        """All that was put since."""
        sent, self.letters = self.letters, {}
        for loop, letters in sent.items():
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(_deliver, letters)


def _deliver(letters: Letters) -> None:
    for queue, thing in letters:
        queue.put_nowait(thing)
