"""Progress of long work: a bar with rate and ETA on a terminal, plain lines elsewhere. All of it goes to stderr."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from quantkit.errors import shown

console = Console(stderr=True, highlight=False)


class Advance(Protocol):
    """Called with what has been done since the last call, in the units of the total."""

    def __call__(self, amount: float = 1) -> None: ...


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.3g} {self.unit}/s")


@contextmanager
def track(what: str, total: float, unit: str) -> Iterator[Advance]:
    """`with track("encode", n, "Mweights") as advance: ... advance(k)`."""
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        _Rate(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total)
        yield lambda amount=1: progress.advance(task, amount)


def be_quiet() -> None:
    """For all ranks but the first."""
    console.quiet = True


def say(text: str) -> None:
    """A line for the person who watches: what was decided, what to beware of."""
    console.print(shown(text), markup=False, soft_wrap=True)


@cache
def say_once(text: str) -> None:
    """`say`, unless this process has said it: what is read more than once."""
    say(text)
