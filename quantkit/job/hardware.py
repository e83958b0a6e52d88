"""`quantkit hardware`: which plans fit a machine, how fast they can be, and how to start them."""

from collections.abc import Sequence
from pathlib import Path

from quantkit import bundle, machine
from quantkit.job.plan import files_of, load_or_plan
from quantkit.machine import threads as threads_here
from quantkit.models import family
from quantkit.models.open import ModelRef, open_model
from quantkit.planning import hardware_table, targets
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.hardware import Machine
from quantkit.planning.recipe import Recipe

SPLIT_BYTES = 50 * 10**9  # the default of --split-max-size


def machine_of(
    ram: int | None,
    vram: int | None,
    ram_bandwidth: float | None,
    gpu_bandwidth: float | None,
    disk_bandwidth: float | None,
    disk: Path | None,
) -> Machine:
    """Sizes in bytes and bandwidths in GB/s as given, else as measured on this machine."""
    if vram is None:
        vram = machine.free_vram()
    return Machine(
        ram=machine.free_ram() if ram is None else ram,
        vram=vram,
        ram_bandwidth=ram_bandwidth * 1e9 if ram_bandwidth else machine.ram_bandwidth(),
        gpu_bandwidth=gpu_bandwidth * 1e9 if gpu_bandwidth else machine.gpu_bandwidth() if vram else None,
        disk_bandwidth=disk_bandwidth * 1e9 if disk_bandwidth else machine.disk_bandwidth(disk) if disk else None,
    )


def hardware_report(
    model: ModelRef | Path | str,
    recipes: Sequence[str],
    target: str | None,
    machine: Machine,
    context: int,
    threads: int | None = None,
) -> str:
    """The view of `quantkit hardware` for plan.json files or recipes (none: the bundled ones by size)."""
    known = {name: Recipe.load(name) for name in bundle.recipe_names()}
    by_size = [name for name, one in known.items() if one.published and not one.is_open]
    plans = [load_or_plan(model, name, target, BudgetOptions()) for name in recipes or by_size]
    source = open_model(model)
    config = family.from_hf(source.config)
    rows = []
    for plan in plans:
        files = files_of(source, plan, None if targets.get(plan.target).single_file else SPLIT_BYTES)
        rows.append((plan, sum(file.size for file in files), str(files[0].path)))
    return hardware_table.report(rows, config, machine, context, str(model), threads or threads_here())
