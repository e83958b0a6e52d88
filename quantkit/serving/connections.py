"""Connections that send nothing, or lines for the log without end, must not keep others out: uvicorn's protocol with a
deadline for headers and a limit on connections, and loggers that repeat themselves seldom."""

import asyncio
import contextlib
import logging
import resource
import time
from collections.abc import Iterator, MutableMapping

from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_SECONDS = 10  # a connection without a request is closed after that
MOST = 4096  # connections
BACKLOG = 100  # connections that are accepted at once, before any can be closed
SELDOM = 10.0  # seconds between two lines of the log that say the same


def most_connections() -> int:
    """Half of the files that this process may open, after asking for as many as it may get."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    want = 4 * MOST if hard == resource.RLIM_INFINITY else min(hard, 4 * MOST)
    if soft != resource.RLIM_INFINITY and soft < want:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (want, hard))
            soft = want
    return MOST if soft == resource.RLIM_INFINITY else max(8, min(MOST, soft // 2))


class Guarded(H11Protocol):
    """A connection. Beyond `most` of them, the one that has waited longest without a whole request is closed: whoever
    sends one is answered, however many others hold connections open."""

    most: int
    waiting: MutableMapping["Guarded", None]  # oldest first
    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio.Protocol."""
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.most:
            oldest = next(iter(self.waiting))
            del self.waiting[oldest]
            self.connections.discard(oldest)  # it counts no more, though it is lost a little later
            oldest.transport.abort()

    def handle_events(self) -> None:
        """After each piece that was received."""
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        """After each answer."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        self._no_deadline()
        self.waiting.pop(self, None)

    def _watch(self) -> None:
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering:  # the endpoint bounds the time of bodies
            self._no_deadline()
        elif self.deadline is None:
            self.deadline = self.loop.call_later(HEADER_SECONDS, self.transport.abort)
        if answering and not self.cycle.more_body:
            self.waiting.pop(self, None)
        else:
            self.waiting.setdefault(self)

    def _no_deadline(self) -> None:
        if self.deadline:
            self.deadline.cancel()
        self.deadline = None


def guarded(most: int) -> type[Guarded]:
    """The protocol of one server, which has at most so many connections."""
    return type("GuardedHere", (Guarded,), {"most": most, "waiting": {}})


class Seldom(logging.Filter):
    """Of lines that only differ in their arguments, one each SELDOM seconds, with the number that were left out."""

    def __init__(self) -> None:
        super().__init__()
        self.last: dict[str, float] = {}
        self.left_out: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """See logging.Filter."""
        key, now = f"{record.name} {record.msg:.80}", time.monotonic()
        if now - self.last.get(key, -SELDOM) < SELDOM:
            self.left_out[key] = self.left_out.get(key, 0) + 1
            return False
        self.last = {k: at for k, at in self.last.items() if now - at < SELDOM} | {key: now}
        if n := self.left_out.pop(key, 0):
            record.msg = f"{record.msg} ({n:,} more of these were left out)"
        return True


@contextlib.contextmanager
def seldom(*names: str) -> Iterator[None]:
    """The loggers of these names, within it: they are everybody's in this process."""
    own = {logging.getLogger(name): Seldom() for name in names}
    for logger, each in own.items():
        logger.addFilter(each)
    try:
        yield
    finally:
        for logger, each in own.items():
            logger.removeFilter(each)
