"""A file's continuations beside its original's: rates of failures, probability of the original's words, findings."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from rich.table import Table
from tokenizers import Tokenizer

from quantkit.evaluation.behaviour.items import Item
from quantkit.evaluation.behaviour.judge import (
    GRAMS,
    MOST_REPEATED,
    is_call,
    number,
    parses,
    repeated,
    thinks_without_end,
)
from quantkit.evaluation.behaviour.rates import Rate, paired
from quantkit.evaluation.behaviour.writing import Notes, Written
from quantkit.evaluation.generation import loop_period

Judge = Callable[[Item, Written, str], bool]
"""Item, what was written, its text -> whether that is a failure."""


def _repeats(n: int, item: Item, made: Written, text: str) -> bool:
    return repeated(made.tokens, n) > MOST_REPEATED


LONG = ("text", "chat")
FAILURES: dict[str, tuple[tuple[str, ...], Judge]] = {
    "ends in a loop": (LONG, lambda item, made, text: loop_period(made.tokens) > 0),
    **{f"repeats its {n}-grams": (LONG, partial(_repeats, n)) for n in GRAMS},
    "does not end": (LONG, lambda item, made, text: not made.ended),
    "thinks without end": (("chat",), lambda item, made, text: thinks_without_end(text, item.begun)),
    "code does not parse": (("code",), lambda item, made, text: not parses(item.lead, text, not made.ended)),
    "wrong sum": (("sum",), lambda item, made, text: number(text) != item.wanted),
    "call is no JSON": (("call",), lambda item, made, text: not is_call(text)),
    "needle not found": (("needle",), lambda item, made, text: number(text) != item.wanted),
}
MUCH = 1.0  # nats a token by which a file may find the original's words less probable


def rates(items: Sequence[Item], theirs: Notes, ours: Notes, tokenizer: Tokenizer) -> list[Rate]:
    """Of all failures, greedy and sampled apart."""
    found = []
    for what, (kinds, judge) in FAILURES.items():
        for mode in ("greedy", "sampled"):
            mine = [item for item in items if item.kind in kinds and item.mode == mode]
            if not mine:
                continue
            bad = []
            for notes in (ours, theirs):
                made = [(item, notes.written(item)) for item in mine]
                texts = (tokenizer.decode(list(each.tokens), skip_special_tokens=False) for _, each in made)
                bad.append(sum(judge(*each, text) for each, text in zip(made, texts, strict=True)))
            found.append(Rate(what, mode, bad[0], len(mine), bad[1], len(mine)))
    return found


def words(items: Sequence[Item], theirs: Notes, ours: Notes) -> dict[str, Any]:
    """Negative log-likelihood of the original's continuations, nats a token: by the file, by the original itself, and
    what the file loses, with a 95 % interval over continuations."""
    rows = []
    for item in items:
        made = theirs.written(item)
        if made.tokens:
            rows.append((ours.found[f"nll/{item.key}"]["nll"], made.nll, len(made.tokens)))
    if not rows:
        return {}
    n = sum(row[2] for row in rows)
    nll, reference = (sum(row[i] for row in rows) / n for i in (0, 1))
    lost = nll - reference
    # of a ratio of sums, linearized: what counts is how far each continuation is from losing as much a token as all do
    spread = [lost + (a - b - lost * k) * len(rows) / n for a, b, k in rows]
    interval = paired(spread) if math.isfinite(lost) else None
    return {
        "tokens": n,
        "nll": nll,
        "nll_reference": reference,
        "lost": lost,
        "lost_ci95": list(interval) if interval else None,
    }


def findings(found: Sequence[Rate], nll: dict[str, Any], weights: Sequence[str]) -> list[str]:
    """What is wrong with the file, a line each."""
    out = list(weights)
    for rate in found:
        if rate.worse:
            row = rate.figures()
            out.append(
                f"{rate.what}: {row['rate']:g} % of {rate.n} {rate.mode} continuations "
                f"[{row['ci95'][0]:g} to {row['ci95'][1]:g}], the original {row['rate_reference']:g} %"
            )
    if nll and not math.isfinite(nll["nll"]):
        out.append("the original's words have no probability")
    elif nll and nll["lost"] > MUCH:
        out.append(f"the original's words are {nll['lost']:.2f} nats a token less probable than to the original")
    return out


def table(result: dict[str, Any]) -> Table:
    """For a person, within 80 columns. n: continuations."""
    made = Table("failure", "", "n", "file", "95 %", "original", "95 %", box=None)
    for row in result["rates"]:
        made.add_row(
            row["what"] + (" !" if row["worse"] else ""),
            row["mode"],
            f"{row['n']:,}",
            f"{row['rate']:.1f} %",
            "{:.1f}–{:.1f}".format(*row["ci95"]),
            f"{row['rate_reference']:.1f} %",
            "{:.1f}–{:.1f}".format(*row["ci95_reference"]),
        )
    return made
