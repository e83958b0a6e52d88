"""Plans of R1 against Unsloth's types at the same bytes, by published damage that the plan did not see.

    python scripts/research/judge_published.py TABLES

TABLES: as in fit_published.py. For each of the four models: the prior is fitted on the other three, spends the bytes of
Unsloth's plan (llama.cpp, split), and both plans are judged by the fourth table as published: no smoothing, and cells
below the baseline count as negative. What that table has not measured (attention, before V3.1-Terminus) is judged by
the fit of all four. In brackets the same with a plan that saw the judging table, within the recipe's rules; and what no
choice of any type for any tensor can be better than (the knapsack's linear relaxation, cells below the baseline as 0).

--where prints what share of the damage of Unsloth's plan lies in which tensors.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import click
import numpy as np
from fit_published import FLAT, KNOWN, Damages, experts, fit, knots, read_table

from quantkit.codecs import types as qtypes
from quantkit.formats.gguf_spec import pad
from quantkit.models import family
from quantkit.models.open import open_model
from quantkit.planning.allocate import Item, Limits, Option, allocate
from quantkit.planning.assign import make_plan, plan_within
from quantkit.planning.plan import Plan
from quantkit.planning.prior import ERROR
from quantkit.planning.recipe import Budget, Recipe
from quantkit.tensors import ROUTED_ROLES, TensorSpec

PLACES = {
    "attention": (),
    "routed experts": ROUTED_ROLES,
    "shared experts": ("ffn_gate_shexp", "ffn_up_shexp", "ffn_down_shexp"),
    "dense layers": ("ffn_gate", "ffn_up", "ffn_down"),
    "embedding and output": ("token_embd", "output"),
}
"""Where a tensor is -> roles; all others are attention's, or have no damage."""
RECIPES = ("1.58bit", "1.73bit", "2.22bit", "2.51bit")


@cache
def specs() -> tuple[TensorSpec, ...]:
    """R1's tensors."""
    return tuple(family.specs(family.from_hf(open_model("deepseek-r1").config)))


@cache
def unsloth(recipe: str) -> Plan:
    """R1 in Unsloth's types."""
    return make_plan(specs(), Recipe.load(f"unsloth-{recipe}"))


@dataclass(frozen=True)
class Table:
    """A damage model (planning.damage.Damage). layers: role -> damage at Q4_K of every layer."""

    layers: dict[str, np.ndarray]
    name: str = "a table"

    def of(self, spec: TensorSpec, qtype: str) -> float:
        """If only this tensor has this type."""
        if spec.fixed or qtype not in ERROR:
            return 0.0
        row = self.layers[spec.role]
        return float(row[spec.layer or 0]) * ERROR[qtype]

    def total(self, damages: float) -> float:
        """The sum."""
        return damages


def spread(unit: dict[str, np.ndarray], n_layer: int) -> Table:
    """A fit as a damage model."""
    at = np.arange(n_layer)
    return Table({r: row if len(row) == 1 else np.interp(at, knots(n_layer), row) for r, row in unit.items()})


def damage_of(plan: Plan, unit: dict[str, np.ndarray], n_layer: int) -> float:
    """Of a plan, by a fit."""
    return total(plan, spread(unit, n_layer))


def total(plan: Plan, damage: Table) -> float:
    """Of a plan."""
    return sum(damage.of(spec, plan.by_name[spec.name].qtype) for spec in specs())


def raw(table: Damages, rest: Table) -> Table:
    """A table as it is, routed experts together 1, and what it lacks from `rest`."""
    layers = dict(rest.layers)
    for role, row in table.items():
        one = row / experts(table)
        layers[role] = np.where(np.isnan(one), rest.layers[role], one)
    return Table(layers)


def spend(plan: Plan, damage: Table, recipe: str) -> Plan:
    """The best plan in the bytes of another."""
    budget = Budget(size=plan.data_bytes)
    return plan_within(specs(), Recipe.load(recipe).aimed("llama.cpp"), "r1", budget, damage, lambda p: p.data_bytes)


def bound(theirs: Plan, truth: Table) -> float:
    """Damage that every choice of types for all tensors has at least, in the bytes of a plan."""
    items = []
    for spec in specs():
        names = [spec.fixed] if spec.fixed else [name for name in ERROR if qtypes.fits(name, spec.n_in)]
        sizes = {name: pad(spec.n_rows * qtypes.row_bytes(name, spec.n_in)) for name in names}
        items.append(Item(spec.name, tuple(Option(name, size, truth.of(spec, name)) for name, size in sizes.items())))
    return allocate(items, Limits(theirs.data_bytes)).bound


def where(theirs: Plan, truth: Table) -> str:
    """Shares of a plan's damage, and of its bytes."""
    whole, shares = total(theirs, truth), dict.fromkeys(PLACES, (0.0, 0.0))
    for spec in specs():
        place = next((p for p in PLACES if spec.role in PLACES[p]), "attention")
        tensor, (damage, size) = theirs.by_name[spec.name], shares[place]
        own = truth.of(spec, tensor.qtype) / whole
        shares[place] = damage + own, size + tensor.n_bytes / theirs.data_bytes
    return ", ".join(f"{place} {damage:.1%} in {size:.1%} of the bytes" for place, (damage, size) in shares.items())


@click.command()
@click.argument("tables", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--recipe", default="published", show_default=True, help="The open recipe that spends the bytes.")
@click.option("--flat", default=FLAT, show_default=True, help="How far profiles are drawn towards flat ones.")
@click.option("--where", "places", is_flag=True, help="Say where the damage of Unsloth's plans lies.")
def main(tables: Path, recipe: str, flat: float, places: bool) -> None:
    """Print a row for each of Unsloth's files, a column for each judge: ratio, the least one, and the bound of all."""
    known = KNOWN[0]
    n_layer = known.geometry[0]
    read = {name: read_table(tables / f"{name}.csv", n_layer) for name in (*known.tables, "DeepSeek-V3.1-Terminus.ppl")}
    everything = spread(fit([read[name] for name in known.tables], flat), n_layer)
    click.echo(f"{'':<25}" + "".join(f"{judge.removeprefix('DeepSeek-'):>22}" for judge in read))
    for name in RECIPES:
        theirs = unsloth(name)
        cells = []
        for judge, table in read.items():
            others = [key for key in known.tables if not judge.startswith(key.rpartition(".")[0])]
            seen = spread(fit([read[key] for key in others], flat), n_layer)
            truth = raw(table, everything)
            ours, least = spend(theirs, seen, recipe), spend(theirs, raw_positive(truth), recipe)
            assert max(ours.data_bytes, least.data_bytes) <= theirs.data_bytes
            whole = total(theirs, truth)
            positive = raw_positive(truth)  # else what noise calls a gain would be taken, in the worst types there are
            possible = bound(theirs, positive) / total(theirs, positive)
            cells.append((total(ours, truth) / whole, total(least, truth) / whole, possible))
            if places:
                click.echo(f"{name} by {judge}: {where(theirs, truth)}")
        row = "".join(f"{f'{ratio:.3f} ({best:.3f}, {no:.3f})':>22}" for ratio, best, no in cells)
        click.echo(f"{name:<9}{theirs.data_bytes:>16,}{row}")


def raw_positive(truth: Table) -> Table:
    """For a plan that is allowed to see the judge: without negative cells, which no knapsack takes."""
    return Table({role: np.maximum(row, 0) for role, row in truth.layers.items()})


if __name__ == "__main__":
    main()
