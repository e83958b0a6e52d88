"""Where the work of an engine lets others in.

A piece of a prompt passes all layers in one call, which can take seconds: with its experts moved over the bus once, it
cannot be made small and stay fast. Engines call `pause` between parts of that work, and whoever asked for it may answer
other sequences there, with the same engine: everything that a part needs is its own by then.

A step of decoding on a GPU is launched in a tenth of its time. Engines call `launched` then: this thread has nothing to
do, and what others do with Python's lock costs the step nothing.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

_here = threading.local()


@contextmanager
def pausing(others: Callable[[], None] | None) -> Iterator[None]:
    """Within it, `pause` in this thread calls that, and not again from inside; None: nobody waits."""
    before, _here.others = getattr(_here, "others", None), others
    try:
        yield
    finally:
        _here.others = before


def wanted() -> bool:
    """Whether somebody waits, so that parts should be small."""
    return getattr(_here, "others", None) is not None


def pause(device: torch.device | None = None) -> None:
    """Between two parts of a prompt's work; what a GPU has been given of it is done first, or nobody could tell how
    long it takes."""
    others = getattr(_here, "others", None)
    if others is None:
        return
    if device is not None and device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    with pausing(None):
        others()


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
