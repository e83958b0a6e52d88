"""Shapes, a recipe and perhaps a budget -> a plan: which type every tensor gets."""

from collections.abc import Callable, Mapping, Sequence

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_spec import pad
from quantkit.models.config import mla_of
from quantkit.planning import targets
from quantkit.planning.allocate import SOLVER, Infeasible, Item, Limits, Option, allocate
from quantkit.planning.damage import Damage
from quantkit.planning.plan import Outlook, Plan, PlannedTensor, check_rows, check_target, offsets
from quantkit.planning.recipe import Budget, Recipe, Rule
from quantkit.sizes import both_units
from quantkit.tensors import TensorSpec

FileBytes = Callable[[Plan], int]
"""Bytes of the file(s) of a plan, headers included."""


def make_plan(
    specs: Sequence[TensorSpec],
    recipe: Recipe,
    target: str | None = None,
    model: str = "",
    chosen: Mapping[str, str] | None = None,
    outlook: Outlook | None = None,
) -> Plan:
    """Give every tensor the type of the first rule that matches it, and refuse what the target cannot compute.

    target: instead of the recipe's, `llama.cpp` or `llama.cpp/combined`; the layout of kv_b is that of the specs.
    chosen: tensor name -> qtype for the tensors that the recipe leaves to a budget (see `plan_within`).
    """
    recipe = recipe.aimed(target)
    picked = []
    for spec, rule in rule_of_each(specs, recipe):
        qtype = spec.fixed if rule is None else rule.qtype or (chosen or {}).get(spec.name)
        if qtype is None:
            raise QuantkitError(f"{recipe.source}: {spec.name} is left to a budget; give one, such as --size 140GB")
        picked.append((spec, rule, targets.fitting(recipe.target, spec.role, spec.n_in, qtype)))
    tensors = _lay_out(picked)
    plan = Plan(model, recipe.name, recipe.target, mla_of((s.name for s in specs), recipe.mla), tensors, outlook)
    check_target(plan)
    return plan


def rule_of_each(specs: Sequence[TensorSpec], recipe: Recipe) -> list[tuple[TensorSpec, Rule | None]]:
    """Every tensor with the rule that decides it (None where the format does). A rule without use is refused."""
    rules = recipe.rules_for(recipe.target)
    moe_layers = sorted({spec.layer for spec in specs if spec.is_routed and spec.layer is not None})
    used: set[int] = set()
    found = []
    for spec in specs:
        rule = None if spec.fixed else _first_match(spec, rules, moe_layers, used)
        if rule is None and not spec.fixed:
            what = f"{spec.name} (role {spec.role}, target {recipe.target})"
            raise QuantkitError(f"{recipe.source}: no rule for {what}; add one")
        found.append((spec, rule))
    _refuse_useless(recipe, rules, used, specs, moe_layers)
    return found


class TooSmall(QuantkitError):
    """A budget that no file fits. needed: bytes of the smallest file, 0 if it is not its size that is in the way."""

    def __init__(self, message: str, needed: int):
        super().__init__(message)
        self.needed = needed


def plan_within(
    specs: Sequence[TensorSpec], recipe: Recipe, model: str, budget: Budget, damage: Damage, file_bytes: FileBytes
) -> Plan:
    """The plan with the least predicted damage that obeys the recipe's rules and stays within the budget.

    QuantkitError if the recipe leaves nothing open; TooSmall if the smallest types do not fit (it names their size).
    """
    ruled = rule_of_each(specs, recipe)
    if not recipe.is_open or not any(rule and rule.allocate for _, rule in ruled):
        raise QuantkitError(
            f"{recipe.source}: its rules fix every type, so a budget has nothing to choose; "
            "leave tensors open with allocate, or use --recipe auto"
        )
    items = [_item(spec, rule, recipe, damage) for spec, rule in ruled]
    first = {item.name: item.options[0].qtype for item in items}
    smallest = make_plan(specs, recipe, model=model, chosen=first)
    overhead = file_bytes(smallest) - smallest.data_bytes if budget.size else 0
    while True:
        limits = _limits(budget, smallest, overhead)
        try:
            found = allocate(items, limits)
        except Infeasible as error:
            needed = 0 if "GPU" in error.what or budget.bpw else error.smallest + overhead
            raise TooSmall(_too_small(error, budget, smallest, overhead), needed) from None
        kld = damage.total(sum(damage.of(spec, found.types[spec.name]) for spec in specs))
        outlook = Outlook(str(budget), SOLVER, kld, found.gap, damage.name)
        plan = make_plan(specs, recipe, model=model, chosen=found.types, outlook=outlook)
        excess = file_bytes(plan) - budget.size if budget.size else 0
        if excess <= 0:
            return plan
        overhead += excess  # more splits, each with its own header


def predict(plan: Plan, specs: Sequence[TensorSpec], damage: Damage) -> float:
    """KL divergence at the output that the damage model expects of a plan, nats a token."""
    return damage.total(sum(damage.of(spec, plan.by_name[spec.name].qtype) for spec in specs))


def _first_match(spec: TensorSpec, rules: Sequence[Rule], moe_layers: list[int], used: set[int]) -> Rule | None:
    """The winner. Rules behind a share of the layers count as used too: in a shallow model the share may be all."""
    winner = None
    for rule in rules:
        if rule.matches(spec, moe_layers):
            used.add(rule.number)
            winner = winner or rule
            if rule.share is None:
                break
    return winner


def _refuse_useless(
    recipe: Recipe, rules: Sequence[Rule], used: set[int], specs: Sequence[TensorSpec], moe_layers: list[int]
) -> None:
    for rule in rules:
        if rule.number in used or rule.optional:
            continue
        what = f"{recipe.source}: rule {rule.number} ({', '.join(rule.match)} -> {rule.qtype or 'allocate'})"
        hits = [spec for spec in specs if rule.matches(spec, moe_layers)]
        if not hits:
            raise QuantkitError(f"{what} matches no tensor; correct it, or set optional = true")
        reason = "types are fixed by the format" if all(s.fixed for s in hits) else "tensors are taken by earlier rules"
        raise QuantkitError(f"{what} never applies: its {reason}; remove or move it")


def _lay_out(chosen: Sequence[tuple[TensorSpec, Rule | None, str]]) -> tuple[PlannedTensor, ...]:
    sized = []
    for spec, rule, qtype in chosen:
        check_rows(spec.name, spec.role, spec.n_in, qtype)
        sized.append((spec, rule, qtype, qtypes.row_bytes(qtype, spec.n_in)))
    starts = offsets(row * spec.n_rows for spec, _, _, row in sized)
    return tuple(
        PlannedTensor(
            name=spec.name,
            shape=tuple(spec.shape),
            role=spec.role,
            layer=spec.layer,
            qtype=qtype,
            row_bytes=row,
            n_bytes=row * spec.n_rows,
            offset=start,
            rule=rule.number if rule else None,
            why=_why(rule, spec, qtype),
        )
        for (spec, rule, qtype, row), start in zip(sized, starts, strict=True)
    )


def _why(rule: Rule | None, spec: TensorSpec, qtype: str) -> str:
    """The rule's reason, or why its type could not be had."""
    if rule is None:
        return "the format allows no other type"
    fell_back = rule.qtype is not None and rule.qtype != qtype
    return f"{rule.qtype} by rule, but {targets.FALLS_BACK} {spec.n_in:,}" if fell_back else rule.why


def _item(spec: TensorSpec, rule: Rule | None, recipe: Recipe, damage: Damage) -> Item:
    """A tensor and its types; those that a rule or the format fixes have one."""
    target, fixed = recipe.target, spec.fixed or (rule.qtype if rule else None)
    fitting = (targets.fitting(target, spec.role, spec.n_in, fixed),) if fixed else ()
    names = fitting or (rule.allocate.of(spec, target) if rule and rule.allocate else ())
    if not names:
        number = rule.number if rule else 0
        use = " ".join(targets.suggest(target, spec.role, spec.n_in))
        raise QuantkitError(f"{recipe.source}: rule {number} leaves no type for {spec.name}: {target} computes {use}")
    sizes = {name: spec.n_rows * qtypes.row_bytes(name, spec.n_in) for name in names if qtypes.fits(name, spec.n_in)}
    options = tuple(
        Option(name, pad(size), 0.0 if len(names) == 1 else damage.of(spec, name))
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


def _too_small(error: Infeasible, budget: Budget, smallest: Plan, overhead: int) -> str:
    what = f"recipe {smallest.recipe}, target {smallest.target}: the smallest feasible"
    if "GPU" in error.what:
        return (
            f"{what} set of tensors that stay on the GPU (all but the routed experts) is {error.smallest:,} bytes; "
            f"the budget leaves {error.limit:,}"
        )
    if budget.bpw:
        return f"{what} is {8 * error.smallest / sum(t.n_weights for t in smallest.tensors):.4f} bpw, not {budget.bpw}"
    needed, given = error.smallest + overhead, budget.size or 0
    return f"{what} size is {needed:,} bytes ({both_units(needed)}); {given:,} ({both_units(given)}) is too small"
