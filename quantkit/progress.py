"""Progress of long work: a bar on a terminal, a line now and then elsewhere. All of it goes to stderr.

Both show how far it is, at what rate, the time gone, and the time left: by what this run has done since it began, for
what an earlier run did says nothing of the speed.
"""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from textwrap import fill
from typing import Literal, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text

from quantkit.errors import shown

console = Console(stderr=True, highlight=False)

LINE_EVERY = 30.0  # seconds between two lines of a log, at least
INSIDE_EVERY = 300.0  # while one layer goes on, once its first line has told when all will be done
SHORT = 1.0  # seconds of which nobody is told
WARNING = "warning: "
LABEL = re.compile(r"[A-Za-z]+ {2,}(?=\S)")
"""Of `reads       11.7 MB of ...`: what follows it keeps to its column on a terminal."""

Level = Literal["quiet", "normal", "verbose"]
_level: Level = "normal"


class Advance(Protocol):
    """Called with what has been done since the last call, in the units of the total. at: where the work is now,
    `layer 3 of 61`. before: an earlier run did it."""

    def __call__(self, amount: float = 1, at: str = "", before: bool = False) -> None: ...


@dataclass
class Meter:
    """How far some work is. total, done: in `unit` (B: bytes); before: what of `done` earlier runs did."""

    total: float
    unit: str
    done: float = 0.0
    before: float = 0.0
    at: str = ""
    began: float = field(default_factory=lambda: time.monotonic())

    @property
    def elapsed(self) -> float:
        """Seconds."""
        return time.monotonic() - self.began

    @property
    def share(self) -> float:
        """Of the whole, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 1.0

    @property
    def rate(self) -> float | None:
        """Units a second in this run; None before anything is done."""
        mine, elapsed = self.done - self.before, self.elapsed
        return mine / elapsed if mine > 0 and elapsed > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds, if it goes on at this rate."""
        return max(0.0, self.total - self.done) / self.rate if self.rate else None

    def rate_text(self) -> str:
        """`1.24 GB/s`, empty before anything is done."""
        return f"{self.text(self.rate)}/s" if self.rate else ""

    def text(self, amount: float) -> str:
        """In its unit."""
        if self.unit == "B":
            return f"{amount / 1e9:,.2f} GB" if amount >= 1e8 else f"{amount / 1e6:,.2f} MB"
        return f"{amount:,.0f} {self.unit}" if amount >= 1000 else f"{amount:.3g} {self.unit}"

    def eta_text(self) -> str:
        """`ETA 0:12:03`."""
        return f"ETA {clock(self.left)}" if self.left is not None else "ETA ?"


class _Bar:
    """A bar of rich, redrawn where it stands."""

    def __init__(self, what: str, meter: Meter):
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), _Figures(meter))
        self.progress = Progress(*columns, console=console)
        self.task, self.meter = self.progress.add_task(what, total=meter.total or 1), meter

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.show()
        self.progress.stop()

    def show(self) -> None:
        """What the meter says now."""
        self.progress.update(self.task, completed=self.meter.done if self.meter.total else 1)


class _Figures(ProgressColumn):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def render(self, task: Task) -> Text:
        m = self.meter
        end = "" if task.finished else m.eta_text()
        text = " ".join(filter(None, (f"{m.share:4.0%}", m.at, m.rate_text(), clock(m.elapsed), end)))
        return Text(text, no_wrap=True)


class _Lines:
    """A line of a log: where a layer has ended, at most every LINE_EVERY seconds (each one if verbose); in a long first
    layer once, so that there is an ETA; at the end."""

    def __init__(self, what: str, meter: Meter):
        self.what, self.meter = what, meter
        self.told, self.told_at = meter.began, ""

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            if self.meter.elapsed < SHORT:
                return
            rate = self.meter.rate_text()
            say(f"{self.what}: done in {clock(self.meter.elapsed)}" + (f", {rate}" if rate else ""), plain=True)
        elif self.meter.done > self.meter.before:
            self._tell(f"{self.what}: stopped")

    def show(self) -> None:
        """A line, if one is due."""
        m, now = self.meter, time.monotonic()
        moved = m.at != self.told_at or not m.at
        pause = LINE_EVERY if moved or self.told == m.began else INSIDE_EVERY
        if _level == "verbose" and m.at and moved:
            pause = 0.0
        if now - self.told >= pause:
            self._tell(self.what)

    def _tell(self, what: str) -> None:
        m = self.meter
        self.told, self.told_at = time.monotonic(), m.at
        parts = (
            m.at,
            f"{m.share:.0%}",
            f"{m.text(m.done)} of {m.text(m.total)}",
            m.rate_text(),
            f"elapsed {clock(m.elapsed)}",
            m.eta_text(),
        )
        say(f"{what}: " + ", ".join(filter(None, parts)), plain=True)


@contextmanager
def track(what: str, total: float, unit: str) -> Iterator[Advance]:
    """`with track("encode", n, "Mweights") as advance: ... advance(k)`, from any thread."""
    meter, lock = Meter(total, unit), threading.Lock()
    view = _Bar(what, meter) if console.is_terminal and _level != "verbose" else _Lines(what, meter)

    def advance(amount: float = 1, at: str = "", before: bool = False) -> None:
        with lock:
            meter.done += amount
            meter.before += amount if before else 0
            meter.at = at or meter.at
            view.show()

    with view:
        yield advance


def clock(seconds: float | None) -> str:
    """`0:12:03`, `2 days, 3:00:00`."""
    return "?" if seconds is None else str(timedelta(seconds=round(seconds)))


def be_quiet() -> None:
    """For all ranks but the first."""
    console.quiet = True


def set_level(level: Level) -> None:
    """quiet: warnings and errors only. verbose: also a line for every layer, on a terminal too."""
    global _level
    _level = level


def verbose() -> bool:
    """Whether the person wants to know more than how it goes."""
    return _level == "verbose"


def say(text: str, plain: bool = False) -> None:
    """A line for the person who watches: what was decided, what to beware of (`warning: ...`, which is always said).
    plain: how it goes."""
    if _level == "quiet" and not text.startswith(WARNING):
        return
    text = shown(text)
    label = LABEL.match(text)
    if label and console.is_terminal and len(text) > console.width and "\n" not in text:  # no table
        text = fill(text, console.width, subsequent_indent=" " * label.end(), break_on_hyphens=False)
    console.print(text, markup=False, soft_wrap=True)


@cache
def say_once(text: str) -> None:
    """`say`, unless this process has said it: what is read more than once."""
    say(text)
