"""When tokens come while prompts are read: before somebody waits too long, and seldom enough to read on meanwhile."""

import time
from collections.abc import Callable
from heapq import nlargest

from quantkit import progress

GAP = 0.1  # seconds between two tokens of a sequence while prompts of others are read, if the machine allows it
MARGIN = 0.2  # of GAP, for what is not foreseen
AIM = 0.6  # of GAP: how far apart tokens are as long as that leaves prompts most of the time
MOST, LEAST = 4, 0.8  # steps of decoding: as long are prompts read between two, if GAP allows it; at least
KEPT = 0.8  # of what a part took once, each time that it takes less: what comes seldom is not forgotten at once
BEGIN = "the beginning"
TOLD = 5  # gaps that are told of


class Clock:
    """When the sequences that are decoding must have their next tokens, while prompts are read. now: seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now, self.gaps = now, Gaps()
        self.tokens = self.seen = now()  # when they had the last; when a part of a prompt ended
        self.step = 0.0  # seconds of a step of decoding, as of late
        self.after: dict[str, float] = {}  # of the part that follows each kind of part
        self.last = BEGIN  # the part that ended then

    def begin(self) -> None:
        """Prompts are read from here on."""
        self.seen, self.last, self.gaps.parts = self.now(), BEGIN, []

    def due(self, what: str) -> bool:
        """A part of a prompt is done: whether tokens come before another one."""
        now = self.now()
        took = now - self.seen
        self.gaps.note(what, took)
        self.after[self.last] = max(took, KEPT * self.after.get(self.last, 0.0))
        self.seen, self.last = now, what
        return now + self.after.get(what, took) - self.tokens > self.room()

    def room(self) -> float:
        """Seconds for prompts between two steps of decoding: until AIM, or longer, so that they have most of the time;
        but not beyond GAP. Where a step takes more than half of that, prompts get nearly as long as it does, and no
        longer than GAP."""
        gap, step = GAP * (1 - MARGIN), self.step
        return max(GAP * AIM - step, min(MOST * step, gap - step), min(gap, LEAST * step))

    def decoded(self, begun: float) -> None:
        """Tokens are there, of a step that began then."""
        now = self.now()
        self.gaps.note("the step", now - begun)
        self.gaps.end()
        self.tokens = self.seen = now
        self.step = max(now - begun, KEPT * self.step)


class Gaps:
    """What was done between tokens while prompts were read, kept of the longest gaps that are longer than GAP: for
    whoever looks where they come from."""

    def __init__(self) -> None:
        self.parts: list[tuple[str, float]] = []
        self.longest: list[tuple[float, str]] = []

    def note(self, what: str, seconds: float) -> None:
        """A part ended, of a prompt's or the step that ends the gap."""
        self.parts.append((what, seconds))

    def end(self) -> None:
        """There are tokens."""
        gap = sum(seconds for _, seconds in self.parts)
        if len(self.parts) > 1 and gap > GAP:
            self.longest = nlargest(TOLD, [*self.longest, (gap, self._told())])
        self.parts = []

    def _told(self) -> str:
        """Milliseconds of each kind, and how many parts they are."""
        kinds: dict[str, list[float]] = {}
        for what, seconds in self.parts:
            kinds.setdefault(what, []).append(1e3 * seconds)
        told = []
        for what, own in kinds.items():
            several = f" ({len(own)}, the longest {max(own):.0f})" if len(own) > 1 else ""
            told.append(f"{what} {sum(own):.0f}{several}")
        return ", ".join(told)

    def tell(self, say: Callable[[str], None]) -> None:
        """Of the longest, a line each if somebody wants to know; then they are forgotten."""
        if progress.verbose():
            for gap, told in self.longest:
                say(f"tokens after {1e3 * gap:.0f} ms beside a prompt: {told}")
        self.longest = []
