"""What pages are made of: templates, tables, and the words for a divergence."""

from collections.abc import Sequence
from dataclasses import dataclass

import jinja2

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
