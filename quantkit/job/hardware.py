"""`quantkit hardware`: which plans fit a machine, how fast they can be, and how to start them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from quantkit import machine
from quantkit.job.plan import by_size, files_of, load_or_plan
from quantkit.machine import threads as threads_here
from quantkit.models import family
from quantkit.models.open import ModelRef, open_model
from quantkit.planning import hardware_table, presets, targets
from quantkit.planning.arithmetic import SHARES, Arithmetic, cores
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.hardware import Machine

SPLIT_BYTES = 50 * 10**9  # the default of --split-max-size


@dataclass(frozen=True)
class Named:
    """A machine as a person says it: bytes that the model may take, names of `presets`, threads; None: as here."""

    ram: int | None = None
    vram: int | None = None
    gpu: str | None = None
    cpu: str | None = None
    threads: int | None = None


def machine_of(asked: Named, bandwidths: Mapping[str, float], disk: Path | None) -> Machine:
    """bandwidths: bytes/s of `ram`, `gpu`, `disk`, where given. All else as published of what has a name, or measured
    here, in a few seconds: unless the RAM's bandwidth is given, which says that another machine is meant."""
    here = not asked.cpu and "ram" not in bandwidths
    found, how = _cpu(asked, here)
    gpu, found = _gpu(asked, replace(found, ram=machine.free_ram() if asked.ram is None else asked.ram))
    how |= gpu
    if disk and "disk" not in bandwidths:
        found, how["disk"] = replace(found, disk_bandwidth=machine.disk_bandwidth(disk)), "measured"
    return found.reading(bandwidths, {part: said for part, said in how.items() if part not in bandwidths})


def _cpu(asked: Named, here: bool) -> tuple[Machine, dict[str, str]]:
    """RAM's bandwidth and the CPU's arithmetic, and where they are from."""
    n = asked.threads
    if asked.cpu:
        cpu = presets.cpu(asked.cpu)
        n = n or cpu.cores
        rates = Arithmetic(cores(n, cpu.core, SHARES[cpu.lookups]), cpu.matrix)
        found, whole = Machine(0, ram_bandwidth=cpu.reads(n), arithmetic=rates, threads=n), cpu.reads(cpu.cores)
        read = f"{presets.SUSTAINED} of published"
        if cpu.reads(n) < whole:
            read = f"share of {n} of {cpu.cores} cores, assumed"
        return found, {"ram": read, "cpu": f"{n} cores, assumed"}
    if not here:
        return Machine(0, threads=n), {}
    from quantkit.runtime.native import probe  # with torch

    n = n or threads_here()
    rates = Arithmetic(probe.rates(n), probe.matrix())
    how = {"ram": "measured", "cpu": f"{n} thread{'s' if n > 1 else ''}, measured"}
    return Machine(0, ram_bandwidth=machine.ram_bandwidth(), arithmetic=rates, threads=n), how


def _gpu(asked: Named, found: Machine) -> tuple[dict[str, str], Machine]:
    """With its VRAM, bandwidth and arithmetic."""
    known = presets.gpu(asked.gpu) if asked.gpu else None
    vram = (known.vram if known else machine.free_vram()) if asked.vram is None else asked.vram
    bandwidth = presets.SUSTAINED_GPU * known.bandwidth if known else machine.gpu_bandwidth() if vram else None
    how = {"gpu": f"{presets.SUSTAINED_GPU} of published" if known else "measured"} if bandwidth else {}
    if bandwidth and not known:
        known = presets.like(machine.gpu_name())
    rates = found.arithmetic
    if known:
        rates = replace(rates, pace=known.pace, products=known.products, bus=known.bus)
    return how, replace(found, vram=vram, gpu_bandwidth=bandwidth, arithmetic=rates)


def hardware_report(
    model: ModelRef | Path | str,
    recipes: Sequence[str],
    target: str | None,
    machine: Machine,
    context: int,
    threads: int | None = None,
) -> str:
    """The view of `quantkit hardware` for plan.json files or recipes (none: the bundled ones by size)."""
    plans = [load_or_plan(model, name, target, BudgetOptions()) for name in recipes or by_size()]
    source = open_model(model)
    config = family.from_hf(source.config)
    rows = []
    for plan in plans:
        files = files_of(source, plan, None if targets.get(plan.target).single_file else SPLIT_BYTES)
        rows.append((plan, sum(file.size for file in files), str(files[0].path)))
    return hardware_table.report(rows, config, machine, context, str(model), threads or threads_here())
