"""What `plan`, `make` and `hardware` share: a model, a recipe and a budget -> a plan, before any weight is read."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from quantkit import bundle
from quantkit import machine as probe
from quantkit.encoding.jobs import check_plan, file_metadata
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_layout import layout
from quantkit.formats.model_folder import open_source
from quantkit.formats.part_file import FileLayout
from quantkit.formats.sensitivity import Sensitivity
from quantkit.models import deepseek2 as deepseek
from quantkit.models.config import DeepseekConfig
from quantkit.planning import hardware, hardware_table, targets
from quantkit.planning.allocate import Solver
from quantkit.planning.budget import plan_within, predict
from quantkit.planning.damage import Damage, Measured, Prior
from quantkit.planning.plan import Plan, make_plan
from quantkit.planning.recipe import Budget, Recipe
from quantkit.remote import repo as remote
from quantkit.tensors import TensorSpec

DEFAULT_RECIPE = "1.58bit"
VOCABULARY_BYTES = 41.1  # a token in R1's GGUF: 5.3 MB of tokens, types and merges for 129,280
SPLIT_BYTES = 50 * 10**9  # the default of --split-max-size
RUN_BYTES = 512  # metadata that only the run knows: names of imatrix and text


def open_model(model: str | Path) -> Checkpoint | Geometry:
    """A folder, the name of a bundled model, or a model on a Hub, of which only headers are read."""
    path = Path(model)
    if path.is_dir():
        return open_source(path)
    if str(model) in bundle.model_names():
        return open_source(bundle.models_dir() / str(model))
    if (repo := remote.parse(str(model), getattr(model, "revision", None))) and not path.exists():
        return remote.open_remote(repo, getattr(model, "cache_bytes", remote.CACHE_BYTES))
    names = ", ".join(bundle.model_names())
    raise QuantkitError(
        f"{model}: no such folder, not one of the bundled models ({names}), and not a Hub id (user/name)"
    )


@dataclass(frozen=True)
class BudgetOptions:
    """What `plan` and `make` can be told about size; nothing: the recipe alone decides.

    size: bytes of the whole file; bpw: bits of tensor data per weight; ram, vram: bytes that the model may take on the
    machine that will run it, with a KV cache of `context` tokens. measured: a sensitivity.json, None: the prior.
    """

    size: int | None = None
    bpw: float | None = None
    ram: int | None = None
    vram: int | None = None
    context: int = 16384
    measured: Path | None = None
    solver: Solver = "lagrange"

    @property
    def given(self) -> bool:
        return any(limit is not None for limit in (self.size, self.bpw, self.ram, self.vram))

    def check(self) -> None:
        limits = {"--size": self.size, "--bpw": self.bpw, "--ram": self.ram}
        chosen = [name for name, value in limits.items() if value is not None]
        if len(chosen) > 1:
            raise QuantkitError(f"{' and '.join(chosen)} contradict each other: give one budget")
        if self.size == 0 or (self.ram == 0 and not self.vram):
            raise QuantkitError(f"{chosen[0]} 0 leaves no room for any file")
        if self.vram is not None and self.ram is None:
            raise QuantkitError(
                "--vram needs --ram too: what the GPU cannot hold of the routed experts streams from it"
            )


def recipe_name(recipe: str | Path | None, budget: BudgetOptions) -> str:
    """The recipe that is meant: a budget alone is served by `auto`."""
    return str(recipe) if recipe is not None else "auto" if budget.given else DEFAULT_RECIPE


def plan_model(
    model: str | Path,
    recipe: str | Path | None = None,
    target: str | None = None,
    mla: str | None = None,
    budget: BudgetOptions = BudgetOptions(),
    split_max_bytes: int | None = None,
) -> Plan:
    """A type for every tensor. Needs no weights: bundled descriptions will do."""
    budget.check()
    rules = Recipe.load(recipe_name(recipe, budget))
    source = open_model(model)
    config = DeepseekConfig.from_hf(source.config)
    specs = deepseek.specs(config, mla or rules.mla)
    if not budget.given and not (rules.is_open and rules.budget):
        return make_plan(specs, rules, target, model=source.path.name)
    damage = damage_model(specs, budget.measured)

    def within(limits: Budget, words: str | None = None) -> Plan:
        return plan_within(
            specs,
            rules,
            target,
            source.path.name,
            limits,
            damage,
            lambda plan: file_bytes(source, plan, split_max_bytes),
            budget.solver,
            words,
        )

    if budget.ram is None:
        own = rules.budget or Budget()
        return within(Budget(budget.size, budget.bpw, own.gpu) if budget.given else own)
    return _plan_for_machine(within, config, mla or rules.mla, budget)


def _plan_for_machine(
    within: Callable[[Budget, str], Plan], config: DeepseekConfig, mla: str, budget: BudgetOptions
) -> Plan:
    """Everything but the routed experts on the GPU, experts in RAM, those of whole layers on the GPU while they fit."""
    machine = hardware.Machine(budget.ram or 0, budget.vram or 0)
    cache = budget.context * hardware.kv_bytes(config, mla)
    words = f"{machine.ram:,} bytes of RAM" + (f" and {machine.vram:,} of VRAM" if machine.vram else "")
    words += f" with a KV cache of {cache:,} ({budget.context:,} tokens)"
    room = hardware.gpu_room(config, mla, machine.vram, budget.context) if machine.vram else None
    size = machine.ram + (room if room is not None else -cache - hardware.WORKSPACE)
    while True:
        plan = within(Budget(size=max(1, size), gpu=room), words)
        overflow = hardware.place(plan, config, machine, budget.context).disk
        if overflow == 0:
            return plan
        size -= overflow  # layers go to the GPU whole, so a part of it stays empty


def damage_model(specs: Sequence[TensorSpec], measured: Path | None) -> Damage:
    """Predicted damage by tensor and type: measured entries if there is a sensitivity.json, else the prior."""
    prior = Prior(specs)
    if measured is None:
        return prior
    found = Sensitivity.load(measured)
    return Measured(
        {(e.tensor, e.qtype): (e.kld, e.kld_error) for e in found.entries}, prior, f"{measured.name} of {found.model}"
    )


def files_of(source: Checkpoint | Geometry, plan: Plan, split_max_bytes: int | None) -> list[FileLayout]:
    """The file(s) of a plan with their headers. Where there is no vocabulary, R1's bytes a token stand for it."""
    config = DeepseekConfig.from_hf(source.config)
    if isinstance(source, Geometry) or not (Path(source.path) / "tokenizer.json").exists():
        vocabulary = {"vocabulary": "x" * int(VOCABULARY_BYTES * config.n_vocab)}
        metadata = deepseek.metadata(config, plan.mla, plan.model) | vocabulary
    else:
        metadata = file_metadata(source, config, plan)
    metadata = metadata | {"quantkit.reserve": "x" * RUN_BYTES}
    name = f"{plan.model}-{plan.recipe}"
    return layout(Path(name) / f"{name}.gguf", plan.tensors, metadata, split_max_bytes)


def file_bytes(source: Checkpoint | Geometry, plan: Plan, split_max_bytes: int | None) -> int:
    """Bytes of all files of a plan, headers included."""
    return sum(file.size for file in files_of(source, plan, split_max_bytes))


def plan_file_bytes(model: str | Path, plan: Plan) -> int:
    """Bytes of one unsplit file."""
    return file_bytes(open_model(model), plan, None)


def load_or_plan(model: str | Path, name: str, target: str | None, mla: str | None, budget: BudgetOptions) -> Plan:
    """A plan.json, or a recipe's plan; `auto` within the budget."""
    if name.endswith(".json"):
        path = Path(name)
        return Plan.from_json(path.read_bytes(), name)
    is_open = Recipe.load(name).is_open
    return plan_model(model, name, target, mla, budget if is_open else BudgetOptions())


def predict_plan(model: str | Path, plan: Plan, measured: Path | None) -> float:
    """KL divergence expected of a plan of this model, nats a token."""
    specs = deepseek.specs(DeepseekConfig.from_hf(open_model(model).config), plan.mla)
    check_plan(plan, {spec.name: spec for spec in specs})
    return predict(plan, specs, damage_model(specs, measured))


def machine_of(
    ram: int | None,
    vram: int | None,
    ram_bandwidth: float | None,
    gpu_bandwidth: float | None,
    disk_bandwidth: float | None,
    disk: Path | None,
) -> hardware.Machine:
    """Sizes in bytes and bandwidths in GB/s as given, else as measured on this machine."""
    if vram is None:
        vram = probe.free_vram()
    return hardware.Machine(
        ram=probe.free_ram() if ram is None else ram,
        vram=vram,
        ram_bandwidth=ram_bandwidth * 1e9 if ram_bandwidth else probe.ram_bandwidth(),
        gpu_bandwidth=gpu_bandwidth * 1e9 if gpu_bandwidth else probe.gpu_bandwidth() if vram else None,
        disk_bandwidth=disk_bandwidth * 1e9 if disk_bandwidth else probe.disk_bandwidth(disk) if disk else None,
    )


def hardware_report(
    model: str | Path,
    recipes: Sequence[str],
    target: str | None,
    mla: str | None,
    machine: hardware.Machine,
    context: int,
    threads: int | None = None,
) -> str:
    """The view of `quantkit hardware` for plan.json files or recipes (none: the bundled ones with fixed types)."""
    fixed = [name for name in bundle.recipe_names() if not Recipe.load(name).is_open]
    plans = [load_or_plan(model, name, target, mla, BudgetOptions()) for name in recipes or fixed]
    source = open_model(model)
    config = DeepseekConfig.from_hf(source.config)
    rows = []
    for plan in plans:
        files = files_of(source, plan, None if targets.get(plan.target).single_file else SPLIT_BYTES)
        rows.append((plan, sum(file.size for file in files), str(files[0].path)))
    return hardware_table.report(rows, config, machine, context, str(model), threads or os.cpu_count() or 1)
