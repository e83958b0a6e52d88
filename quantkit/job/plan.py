"""A model, a recipe and a budget -> a plan and the bytes of its file, before any weight is read."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats import fp4
from quantkit.formats.byte_source import read_whole
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_layout import layout
from quantkit.formats.part_file import FileLayout
from quantkit.formats.sensitivity import Sensitivity
from quantkit.models import family
from quantkit.models.config import Mla, ModelConfig
from quantkit.models.open import ModelRef, open_model
from quantkit.models.tokenizer_metadata import file_of
from quantkit.planning import hardware, mixtures, published, targets
from quantkit.planning.assign import TooSmall, make_plan, plan_within, predict
from quantkit.planning.budget import NO_BUDGET, BudgetOptions
from quantkit.planning.damage import Damage, Measured, unmeasured
from quantkit.planning.metadata import file_metadata
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Budget, Recipe
from quantkit.progress import say_once
from quantkit.sizes import both_units
from quantkit.tensors import TensorSpec

DEFAULT_RECIPE = "1.58bit"
VOCABULARY_BYTES = 41.1  # a token in R1's GGUF: 5.3 MB of tokens, types and merges for 129,280
RUN_BYTES = 512  # metadata that only the run knows: names of imatrix and text


def recipe_name(recipe: str | Path | None, budget: BudgetOptions) -> str:
    """The recipe that is meant: a budget alone is served by `auto`."""
    return str(recipe) if recipe is not None else "auto" if budget.given else DEFAULT_RECIPE


def is_plan(recipe: str | Path) -> bool:
    """Whether a plan.json stands where a recipe could: it fixes every type already."""
    return str(recipe).endswith(".json")


def recipe_text(recipe: str | Path | None, budget: BudgetOptions, config: ModelConfig, mla: Mla) -> str | None:
    """The TOML of the recipe that is meant, for the record; None of a plan.json. config, mla: of the model, for whose
    layers a preset is written out."""
    name = recipe_name(recipe, budget)
    if is_plan(name):
        return None
    preset = preset_of(name)
    return (
        mixtures.text(mixtures.recipe(preset, config, family.specs(config, mla), mla)) if preset else Recipe.text(name)
    )


def preset_of(name: str) -> str | None:
    """The preset of llama-quantize that is meant, if it is one; a file of that name comes first."""
    return None if Path(name).is_file() else mixtures.known(name)


def rules_of(name: str, target: str | None, config: ModelConfig) -> Recipe:
    """A recipe by name, as written; of a preset the rules for this model, in the layout that the target asks for."""
    preset = preset_of(name)
    if preset is None:
        return Recipe.load(name)
    mla = (targets.parse(target).mla if target else None) or "split"
    return mixtures.recipe(preset, config, family.specs(config, mla), mla)


def plan_model(
    model: ModelRef | Path | str,
    recipe: str | Path | None = None,
    target: str | None = None,
    budget: BudgetOptions = NO_BUDGET,
    split_max_bytes: int | None = None,
    mtp: bool = True,
) -> Plan:
    """A type for every tensor: by a recipe, within a budget, or as a plan.json has it. Needs no weights.

    target: instead of the recipe's, `llama.cpp` or `llama.cpp/combined`. split_max_bytes: headers of splits count too.
    mtp: with the layers that predict the token after the next, where llama.cpp reads them.
    """
    budget.check()
    source = open_model(model)
    if not mtp:
        source.config = family.without_mtp(source.config)
    if target and (architecture := targets.parse(target).architecture):
        source.config = family.seen_as(source.config, architecture)
    plan = _plan_model(source, recipe_name(recipe, budget), target, budget, split_max_bytes)
    config = family.from_hf(family.seen_like(source.config, plan.by_name))
    for caveat in targets.caveats(plan.target, config):
        say_once(f"warning: {caveat}")
    if fell := [f"{t.name} {t.qtype}" for t in plan.tensors if targets.FALLS_BACK in t.why]:
        more = f" and {len(fell) - 1} more" if len(fell) > 1 else ""
        say_once(f"types whose blocks do not divide the rows fall back as in llama-quantize: {fell[0]}{more}")
    if plan.outlook:
        say_once(f"types of {plan.model} by {plan.outlook.damage}")  # once, however many plans are shown
    return plan


def _plan_model(
    source: Checkpoint | Geometry, name: str, target: str | None, budget: BudgetOptions, split_max_bytes: int | None
) -> Plan:
    if is_plan(name):
        return _read_plan(Path(name), source, target, budget)
    config = family.from_hf(source.config)
    rules = aimed(rules_of(name, target, config), target, config)
    targets.check_model(rules.target, config)
    specs = as_stored(family.specs(config, rules.mla), source)
    closed = not budget.given and not (rules.is_open and rules.budget)
    by_rules = make_plan(specs, rules, model=source.name) if closed else None
    if by_rules and not (rules.published and published.recognise(specs)):
        return by_rules
    damage = damage_model(specs, budget.measured)
    spending = rules
    if rules.published and (by_rules or (budget.measured is None and published.recognise(specs))):
        other = Recipe.load(rules.published)
        spending = replace(rules, rules=other.rules, source=other.source)

    def within(limits: Budget) -> Plan:
        """The best plan within these bytes; by the recipe's own rules if those of the published tables do not fit."""
        of_file = partial(file_bytes, source, split_max_bytes=split_max_bytes)
        try:
            return plan_within(specs, spending, source.name, limits, damage, of_file)
        except QuantkitError:
            if by_rules or spending is rules:
                raise
            plan = plan_within(specs, rules, source.name, limits, damage, of_file)
            say_once(f"warning: {limits} is so little that types are coarser than the published tables vouch for")
            return plan

    if by_rules:
        size = file_bytes(source, by_rules, split_max_bytes)
        return within(Budget(size, words=f"the {size:,} bytes of {rules.name}'s own rules"))
    if budget.ram is None:
        own = rules.budget or Budget()
        return within(Budget(budget.size, budget.bpw, own.gpu) if budget.given else own)
    try:
        return _plan_for_machine(within, config, rules.mla, budget)
    except TooSmall as error:
        usual = make_plan(specs, Recipe.load(DEFAULT_RECIPE), f"{rules.target}/{rules.mla}", model=source.name)
        if not error.needed or not (budget.vram or _needed_fits(usual, config, budget)):
            raise
        size = max(error.needed, file_bytes(source, usual, split_max_bytes))
        return _say_disk(within(_budget_of_machine(config, rules.mla, budget, size)), config, budget)


def as_stored(specs: Sequence[TensorSpec], source: Checkpoint | Geometry) -> list[TensorSpec]:
    """The specs; where the original is FP4, with the type that copies it."""

    def is_fp4(name: str) -> bool:
        return name in source.tensors and source.tensors[name].dtype == fp4.DTYPE

    return [replace(spec, exact=fp4.COPY) if all(map(is_fp4, spec.sources)) else spec for spec in specs]


def aimed(recipe: Recipe, target: str | None, config: ModelConfig) -> Recipe:
    """The recipe for the target that is asked for; for llama.cpp if none is asked for and its own does not know this
    kind of model, or cannot compute experts of this size."""
    found = recipe.aimed(target)
    if target is None and not targets.knows(found.target, config):
        say_once(f"{found.target} reads no {config.architecture} from a GGUF: planned for llama.cpp")
        return recipe.aimed(targets.LLAMA_CPP.name)
    if target is not None or targets.computes_experts(found.target, config):
        return found
    say_once(
        f"{found.target} needs expert sizes that are multiples of {targets.get(found.target).expert_multiple}, this "
        f"model has {config.d} and {config.n_ff_exp}: planned for llama.cpp"
    )
    return recipe.aimed(targets.LLAMA_CPP.name)


def _read_plan(path: Path, source: Checkpoint | Geometry, target: str | None, budget: BudgetOptions) -> Plan:
    """A plan.json for this model; there is nothing left that a target or a budget could decide."""
    plan = Plan.from_json(read_whole(path, "plan"), str(path))
    config = family.from_hf(family.seen_like(source.config, plan.by_name))
    plan.check_model(family.specs(config, plan.mla))
    if budget.given:
        raise QuantkitError(f"{path}: a plan fixes every type, so a budget has nothing to choose; give a recipe")
    asked, own = targets.parse(target or plan.target), config.architecture
    if asked.name != plan.target or asked.mla not in (None, plan.mla) or asked.architecture not in (None, own):
        raise QuantkitError(f"{path} is made for {plan.target}/{plan.mla}, not for --target {target}; plan again")
    return plan


def _plan_for_machine(within: Callable[[Budget], Plan], config: ModelConfig, mla: Mla, budget: BudgetOptions) -> Plan:
    """Everything but the routed experts on the GPU, experts in RAM, those of whole layers on the GPU while they fit."""
    machine = hardware.Machine(budget.ram or 0, budget.vram or 0)
    limits = _budget_of_machine(config, mla, budget)
    size = limits.size or 0
    while True:
        plan = within(replace(limits, size=max(1, size)))
        overflow = hardware.place(plan, config, machine, budget.context).disk
        if overflow == 0:
            return plan
        size -= overflow  # layers go to the GPU whole, so a part of it stays empty


def _budget_of_machine(config: ModelConfig, mla: Mla, budget: BudgetOptions, size: int | None = None) -> Budget:
    """size: bytes of the file, None: what RAM and VRAM hold beside cache and buffers."""
    ram, vram = budget.ram or 0, budget.vram or 0
    cache = budget.context * hardware.kv_bytes(config, mla)
    words = f"{ram:,} bytes of RAM" + (f" and {vram:,} of VRAM" if vram else "")
    words += f" with a KV cache of {cache:,} ({budget.context:,} tokens)"
    room = hardware.gpu_room(config, mla, vram, budget.context) if vram else None
    if size is not None:
        return Budget(size, gpu=room, words=f"{words}, experts beyond it on the disk")
    return Budget(ram + (room if room is not None else -cache - hardware.WORKSPACE), gpu=room, words=words)


def _needed_fits(plan: Plan, config: ModelConfig, budget: BudgetOptions) -> bool:
    """Whether RAM alone holds what every token needs, so that only experts are read from the disk."""
    placed = hardware.place(plan, config, hardware.Machine(budget.ram or 0, 0), budget.context)
    return placed.disk < placed.cpu_experts


def _say_disk(plan: Plan, config: ModelConfig, budget: BudgetOptions) -> Plan:
    """What a plan that memory does not hold means."""
    machine = hardware.Machine(budget.ram or 0, budget.vram or 0).completed()
    placed = hardware.place(plan, config, machine, budget.context)
    read = hardware.speed(plan, config, machine, placed).disk
    vram = f" and {both_units(machine.vram)} of VRAM" if machine.vram else ""
    say_once(
        f"no file of {plan.model} fits {both_units(machine.ram)} of RAM{vram}: "
        f"{both_units(placed.disk)} of experts stay on the disk, {both_units(read)} are read for each token if all are "
        "chosen equally often (run it with --ram)"
    )
    return plan


def damage_model(specs: Sequence[TensorSpec], measured: Path | None) -> Damage:
    """Predicted damage by tensor and type: measured entries if there is a sensitivity.json, else what was published of
    such models, else the prior."""
    if measured is None:
        return unmeasured(specs)
    found = Sensitivity.load(measured)
    entries = {(e.tensor, e.qtype): (e.kld, e.kld_error) for e in found.entries}
    return Measured(entries, f"{measured.name} of {found.model}", specs)


def files_of(source: Checkpoint | Geometry, plan: Plan, split_max_bytes: int | None) -> list[FileLayout]:
    """The file(s) of a plan with their headers. Where there is no vocabulary, R1's bytes a token stand for it."""
    config = family.from_hf(family.seen_like(source.config, plan.by_name))
    if isinstance(source, Geometry) or not file_of(source.path).exists():
        vocabulary = {"vocabulary": "x" * int(VOCABULARY_BYTES * config.n_vocab)}
        metadata = family.metadata(config, plan.mla, plan.model) | vocabulary
    else:
        metadata = file_metadata(source.path, config, plan)
    metadata = metadata | {"quantkit.reserve": "x" * RUN_BYTES}
    name = f"{plan.model}-{plan.recipe}"
    return layout(Path(name) / f"{name}.gguf", plan.tensors, metadata, split_max_bytes)


def file_bytes(source: Checkpoint | Geometry, plan: Plan, split_max_bytes: int | None) -> int:
    """Bytes of all files of a plan, headers included."""
    return sum(file.size for file in files_of(source, plan, split_max_bytes))


def plan_file_bytes(model: ModelRef | Path | str, plan: Plan) -> int:
    """Bytes of one unsplit file."""
    return file_bytes(open_model(model), plan, None)


def by_size() -> list[str]:
    """The bundled recipes that stand for a size: what several are shown of if none is asked for."""
    known = {name: Recipe.load(name) for name in bundle.recipe_names()}
    return [name for name, one in known.items() if one.published and not one.is_open]


def load_or_plan(model: ModelRef | Path | str, recipe: str, target: str | None, budget: BudgetOptions) -> Plan:
    """`plan_model` for one of several that are shown together: target and budget are for those that they can decide."""
    if is_plan(recipe):
        return plan_model(model, recipe)
    is_open = preset_of(recipe) is None and Recipe.load(recipe).is_open
    return plan_model(model, recipe, target, budget if is_open else NO_BUDGET)


def predict_plan(model: ModelRef | Path | str, plan: Plan, measured: Path | None) -> float:
    """KL divergence expected of a plan of this model, nats a token."""
    source = open_model(model)
    specs = as_stored(family.specs(family.from_hf(family.seen_like(source.config, plan.by_name)), plan.mla), source)
    plan.check_model(specs)
    return predict(plan, specs, damage_model(specs, measured))


def basis(model: ModelRef | Path | str, plan: Plan, measured: Path | None) -> str:
    """What `predict_plan` rests on, for people."""
    if measured:
        return str(measured)
    config = family.from_hf(family.seen_like(open_model(model).config, plan.by_name))
    return unmeasured(family.specs(config, plan.mla)).name
