"""A recipe with open tensors, a budget and a damage model -> a plan of the whole file."""

from collections.abc import Callable, Sequence

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.planning import allocate, targets
from quantkit.planning.allocate import Infeasible, Item, Limits, Option, Solver
from quantkit.planning.damage import Damage
from quantkit.planning.plan import ALIGNMENT, Outlook, Plan, make_plan, rule_of_each
from quantkit.planning.recipe import Budget, Recipe, Rule
from quantkit.sizes import both_units
from quantkit.tensors import TensorSpec

FileBytes = Callable[[Plan], int]
"""Bytes of the file(s) of a plan, headers included."""


def plan_within(
    specs: Sequence[TensorSpec],
    recipe: Recipe,
    target: str | None,
    model: str,
    budget: Budget,
    damage: Damage,
    file_bytes: FileBytes,
    solver: Solver = "lagrange",
    limit: str | None = None,
) -> Plan:
    """The plan with the least predicted damage that obeys the recipe's rules and stays within the budget.

    limit: the budget in the user's words, for the record. QuantkitError if the recipe leaves nothing open, or the
    smallest types do not fit (it names the smallest size).
    """
    target = target or recipe.target
    ruled = rule_of_each(specs, recipe, target)
    if not recipe.is_open or not any(rule and rule.allocate for _, rule in ruled):
        raise QuantkitError(
            f"{recipe.source}: its rules fix every type, so a budget has nothing to choose; "
            "leave tensors open with allocate, or use --recipe auto"
        )
    items = [_item(spec, rule, recipe, target, damage) for spec, rule in ruled]
    first = {item.name: item.options[0].qtype for item in items}
    smallest = make_plan(specs, recipe, target, model, first)
    overhead = file_bytes(smallest) - smallest.data_bytes if budget.size else 0
    while True:
        limits = _limits(budget, smallest, overhead)
        try:
            found = allocate.allocate(items, limits, solver)
        except Infeasible as error:
            raise QuantkitError(_too_small(error, budget, smallest, overhead, recipe)) from None
        kld = damage.total(sum(damage.of(spec, found.types[spec.name]) for spec in specs))
        outlook = Outlook(limit or describe(budget), solver, kld, found.gap, damage.name)
        plan = make_plan(specs, recipe, target, model, found.types, outlook)
        excess = file_bytes(plan) - budget.size if budget.size else 0
        if excess <= 0:
            return plan
        overhead += excess  # more splits, each with its own header


def predict(plan: Plan, specs: Sequence[TensorSpec], damage: Damage) -> float:
    """KL divergence at the output that the damage model expects of a plan, nats a token."""
    return damage.total(sum(damage.of(spec, plan.by_name[spec.name].qtype) for spec in specs))


def describe(budget: Budget) -> str:
    """The limits in words: `131,000,000,000 bytes, 12,000,000,000 of them on the GPU`."""
    whole = f"{budget.size:,} bytes" if budget.size else f"{budget.bpw:g} bpw" if budget.bpw else "any size"
    return whole + (f", all but the routed experts in {budget.gpu:,} bytes" if budget.gpu else "")


def _item(spec: TensorSpec, rule: Rule | None, recipe: Recipe, target: str, damage: Damage) -> Item:
    """A tensor and its types; those that a rule or the format fixes have one."""
    fixed = spec.fixed or (rule.qtype if rule else None)
    names = (fixed,) if fixed else rule.allocate.of(spec, target) if rule and rule.allocate else ()
    if not names:
        number = rule.number if rule else 0
        use = " ".join(targets.suggest(target, spec.role, spec.n_in))
        raise QuantkitError(f"{recipe.source}: rule {number} leaves no type for {spec.name}: {target} computes {use}")
    sizes = {name: spec.n_rows * qtypes.row_bytes(name, spec.n_in) for name in names if qtypes.fits(name, spec.n_in)}
    options = tuple(
        Option(name, -(-size // ALIGNMENT) * ALIGNMENT, 0.0 if len(names) == 1 else damage.of(spec, name))
        for name, size in sorted(sizes.items(), key=lambda pair: pair[1])
    )
    return Item(spec.name, options, resident=not spec.is_routed)


def _limits(budget: Budget, smallest: Plan, overhead: int) -> Limits:
    if budget.size:
        return Limits(budget.size - overhead, budget.gpu)
    if budget.bpw:
        weights = sum(tensor.n_weights for tensor in smallest.tensors)
        return Limits(int(budget.bpw * weights / 8), budget.gpu)
    raise QuantkitError("a budget needs a size or bits per weight")


def _too_small(error: Infeasible, budget: Budget, smallest: Plan, overhead: int, recipe: Recipe) -> str:
    what = f"recipe {recipe.name}, target {smallest.target}: the smallest feasible"
    if "GPU" in error.what:
        return (
            f"{what} set of tensors that stay on the GPU (all but the routed experts) is {error.smallest:,} bytes; "
            f"the budget leaves {error.limit:,}"
        )
    if budget.bpw:
        return f"{what} is {8 * error.smallest / sum(t.n_weights for t in smallest.tensors):.4f} bpw, not {budget.bpw}"
    needed, given = error.smallest + overhead, budget.size or 0
    return f"{what} size is {needed:,} bytes ({both_units(needed)}); {given:,} ({both_units(given)}) is too small"
