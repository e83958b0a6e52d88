"""Durations that hold on a machine that does other things too."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is done takes less: by the clock or, where other programs compute too, of this process's own time; by the
    clock never ten times as long."""
    clock, own = time.monotonic(), time.process_time()
    yield
    clock, own = time.monotonic() - clock, time.process_time() - own
    assert min(clock, own) < seconds and clock < 10 * seconds, f"{clock:.2f} s, {own:.2f} s of this process's"


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    """Return when it is true."""
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it did not come about"
        time.sleep(0.002)
