"""What pages are made of: templates, tables, and the words for a divergence."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import jinja2

from quantkit.sizes import both_units

Point = tuple[str, int, float]
"""Of a file: name, bytes, mean KLD."""
WORDS = (
    (0.01, "nearly the original"),
    (0.05, "close to the original"),
    (0.2, "noticeably changed"),
    (0.5, "much changed"),
    (float("inf"), "far from the original"),
)
"""Mean KLD in nats below which a file is called so; ours, there is no standard (docs/verify.md)."""


@dataclass(frozen=True)
class Table:
    """head: names of columns; rows of cells. On a phone a row is a block of its own, each cell after its column's name.
    numbers: columns that are set to the right."""

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    numbers: bool = True


def verdict(points: Sequence[Point], by_chance: Collection[tuple[str, str]] = ()) -> str:
    """One sentence about files that were measured alike: the nearest to the original, and what is beaten in both size
    and divergence. by_chance: pairs of names, (a, b), of which it is not certain that b is nearer than a."""
    if len(points) < 2:
        return "Nothing here was measured alike, so nothing can be compared."
    best, size, kld = min(points, key=lambda point: point[2])
    text = f"{best} is the nearest to the original ({words_for(kld)}, {kld:.3g} nats a token in {both_units(size)})"
    losers = {
        name: other
        for name, n, k in points
        for other, n2, k2 in points
        if n2 <= n and k2 < k and (name, other) not in by_chance
    }
    if losers:
        text += "; " + ", ".join(f"{name} is beaten by {other} in no more bytes" for name, other in losers.items())
    elif all(n < size for name, n, _ in points if name != best):
        text += "; each of the others is smaller"
    return text + "."


def markdown(table: Table) -> str:
    """A pipe table whose columns stand under each other on a terminal, too."""
    every = [[str(cell) for cell in row] for row in (table.head, *table.rows)]
    widths = [max(len(row[i]) for row in every) for i in range(len(table.head))]

    def line(row: Sequence[str]) -> str:
        cells = [
            f"{cell:>{w}}" if table.numbers and i else f"{cell:<{w}}"
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rule = ["-" * (w + 1) + ":" if table.numbers and i else "-" * (w + 2) for i, w in enumerate(widths)]
    return "\n".join([line(every[0]), f"|{'|'.join(rule)}|", *map(line, every[1:])])


def environment() -> jinja2.Environment:
    """Where templates are found; whatever files say is escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("quantkit.job.report", "templates"),
        autoescape=True,
        undefined=jinja2.ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def words_for(kld: float) -> str:
    """How a file of such a mean KLD is called."""
    return next(words for limit, words in WORDS if kld < limit)
