"""`quantkit hardware --json`: what the view is made of, for programs."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.job.plan import by_size, files_of, load_or_plan
from quantkit.machine import threads as threads_here
from quantkit.models import family
from quantkit.models.open import ModelRef, open_model
from quantkit.planning import elsewhere, hardware, targets
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.expected import expected
from quantkit.planning.hardware import Machine


def facts(
    model: ModelRef | Path | str,
    recipes: Sequence[str],
    target: str | None,
    machine: Machine,
    context: int,
    threads: int | None,
    split_max_bytes: int,
) -> dict[str, Any]:
    """`machine`, `context`, and for each plan (none given: the bundled ones by size) its file's bytes, `placement`,
    bytes of one token by where they lie with the bound on tokens a second (`token`), tokens a second that are
    `expected`, and start `commands`; `refused` says why a plan fits nowhere. `published`: what others measured. Bytes
    and bytes a second."""
    source = open_model(model)
    config = family.from_hf(source.config)
    plans: list[dict[str, Any]] = []
    for name in recipes or by_size():
        plan = load_or_plan(model, name, target, BudgetOptions())
        files = files_of(source, plan, None if targets.get(plan.target).single_file else split_max_bytes)
        about: dict[str, Any] = {"recipe": plan.recipe, "target": plan.target}
        about |= {"file_bytes": sum(file.size for file in files), "files": len(files)}
        plans.append(about)
        try:
            where = hardware.place(plan, config, machine, context)
        except QuantkitError as error:
            about["refused"] = str(error)
            continue
        file, n = str(files[0].path), threads or threads_here()
        guess = expected(plan, config, machine, where)
        found = hardware.commands(plan, where, machine, context, file, str(model), n)
        about |= {
            "placement": asdict(where),
            "token": asdict(hardware.speed(plan, config, machine, where)),
            "expected": guess._asdict() if guess else None,
            "commands": hardware.for_model(found, config),
        }
    about_it = {"model": str(model), "machine": asdict(machine), "context": context, "plans": plans}
    return about_it | {"published": [asdict(speed) for speed in elsewhere.speeds(config)]}
