"""Where the work of an engine lets others in.

A piece of a prompt passes all layers in one call, which can take seconds: with its experts moved over the bus once, it
cannot be made small and stay fast. Engines call `pause` between parts of that work, and whoever asked for it may answer
other sequences there, with the same engine: everything that a part needs is its own by then. A part should take 10 ms
or less on the machines that an engine is made for.

A step of decoding on a GPU is launched in a tenth of its time. Engines call `launched` then: this thread has nothing to
do, and what others do with Python's lock costs the step nothing.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, wait
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch

Others = Callable[[str], None]
"""Told what has just been done of the prompt."""

Result = TypeVar("Result")

LOOK = 0.002  # seconds between two looks whether another thread is done

_here = threading.local()


@contextmanager
def pausing(others: Others | None) -> Iterator[None]:
    """Within it, `pause` in this thread calls that, and not again from inside; None: nobody waits."""
    before, _here.others = getattr(_here, "others", None), others
    try:
        yield
    finally:
        _here.others = before


def wanted() -> bool:
    """Whether somebody waits, so that parts should be small."""
    return getattr(_here, "others", None) is not None


def pause(device: torch.device | None = None, what: str = "experts") -> None:
    """Between two parts of a prompt's work; what a GPU has been given of it is done first, or nobody could tell how
    long it takes. what: the part before."""
    others = getattr(_here, "others", None)
    if others is None:
        return
    if device is not None and device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    with pausing(None):
        others(what)


class Aside(Generic[Result]):
    """A part of a prompt's work that another thread does meanwhile. While others have their turn it rests, at its own
    next pause: both would need the same cores."""

    def __init__(self, work: Callable[[], Result], thread: Executor):
        self.free = threading.Event()
        self.free.set()
        self.others: Others | None = getattr(_here, "others", None)
        self.working = thread.submit(self._run, work)

    def _run(self, work: Callable[[], Result]) -> Result:
        with pausing(None if self.others is None else lambda _: self._rest()):
            return work()

    def _rest(self) -> None:
        self.free.wait()

    @contextmanager
    def resting(self) -> Iterator[None]:
        """It rests while others are let in within this, in the thread that made it."""
        with pausing(None if self.others is None else self._alone):
            yield

    def _alone(self, what: str) -> None:
        assert self.others is not None
        self.free.clear()
        try:
            self.others(what)
        finally:
            self.free.set()

    def result(self, what: str) -> Result:
        """Of the work; others are let in while it is waited for."""
        while wanted() and not self.working.done():
            wait([self.working], LOOK)
            pause(what=what)
        return self.working.result()


@contextmanager
def launching(others: Callable[[], None]) -> Iterator[None]:
    """Within it, `launched` in this thread calls that."""
    before, _here.meanwhile = getattr(_here, "meanwhile", None), others
    try:
        yield
    finally:
        _here.meanwhile = before


def launched() -> None:
    """A step of decoding is at work on a GPU, and this thread waits for it."""
    meanwhile = getattr(_here, "meanwhile", None)
    if meanwhile is not None:
        meanwhile()
