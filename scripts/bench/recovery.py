"""One step of recovery at R1's true geometry: s and GB/s of a layer each way, peak memory, disk, and all of R1.

    python scripts/bench/synthetic.py synthetic --dense 1 --moe 1
    python scripts/bench/synthetic_gguf.py synthetic.gguf --dense 1 --moe 1
    python scripts/bench/recovery.py synthetic synthetic.gguf --out /scratch/recovery

The backward seconds of a layer hold its update. The first step has no values to read yet, so two are run and the second
is shown (--steps). What it writes is removed. The original's hidden states are random, and so are the weights: only
sizes and times mean anything.
"""

import json
import resource
import shutil
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from gradients import TimedSpill
from stream import R1_DENSE, R1_MOE, drop_cache

from quantkit import bundle
from quantkit.calibration import gradients
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.recovery.options import RecoverOptions, Sizes
from quantkit.job.recovery.passes import Target
from quantkit.job.recovery.step import TrainingStep
from quantkit.job.recovery.student import Student
from quantkit.job.recovery.tuned import Tuned, moving, scaled
from quantkit.job.recovery.values import Values
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.memory import Limits
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf


def show_layers(student: Student, steps: list[tuple[float, float]]) -> None:
    print(f"{'layer':>5} {'GB':>7} {'forward s':>10} {'GB/s':>6} {'backward s':>11} {'GB/s':>6}")
    tensors = student.file.tensors.items()
    for layer, (forward, backward) in enumerate(steps):
        tensors = student.file.tensors.items()
        size = sum(t.n_bytes for name, t in tensors if name.startswith(f"blk.{layer}.")) / 1e9
        print(
            f"{layer:>5} {size:>7.2f} {forward:>10.2f} {size / forward:>6.2f} {backward:>11.2f} {size / backward:>6.2f}"
        )


def show_r1(how: RecoverOptions, recipe: str, steps: list[tuple[float, float]], head: float) -> None:
    """The sums for all of R1."""
    r1 = family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))
    plan = make_plan(family.specs(r1), Recipe.load(recipe), "llama.cpp", "R1")
    sizes = Sizes.of(r1, plan.by_name, how)
    values, hidden = sizes.disk(131072)
    print(
        f"R1: {sizes.n_values:,} weights and scales ({sizes.n_experts:,} of experts) move, {values / 1e9:.0f} GB of "
        f"values in {sizes.dtype}, {hidden / 1e9:.0f} GB of hidden states, a file of {plan.n_bytes / 1e9:.0f} GB that "
        "is read twice a step"
    )
    both = [R1_DENSE * dense + R1_MOE * moe for dense, moe in zip(steps[0], steps[-1], strict=True)]
    one = sum(both) + head
    print(
        f"R1: {R1_DENSE} x {sum(steps[0]):.2f} s + {R1_MOE} x {sum(steps[-1]):.2f} s + {head:.2f} s for the head = "
        f"{one / 60:.1f} min a step ({both[0] / 60:.1f} forward); {how.steps} steps {how.steps * one / 3600:.1f} h"
    )


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.argument("file", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A scratch folder.")
@click.option("--tokens", default=16384, show_default=True)
@click.option("--steps", default=2, show_default=True)
@click.option("--moves", type=click.Choice(["experts", "matrices", "vectors"]), default="experts", show_default=True)
@click.option("--recipe", default="1.58bit", show_default=True, help="That the file was made by.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--room", "place", type=click.Choice(["device", "ram", "disk"]), default=None, help="Of all tokens.")
def main(
    folder: Path,
    file: Path,
    out: Path,
    tokens: int,
    steps: int,
    moves: str,
    recipe: str,
    device: str,
    place: str | None,
) -> None:
    """Steps over random tokens in chunks of 512; prints what the last one took."""
    how = RecoverOptions(moves=moves, tokens=tokens, lr=3e-3, hidden=place)
    original = CheckpointSource(Checkpoint.open(folder), device, torch.float32 if device == "cpu" else torch.bfloat16)
    weights, c, n_chunk = open_gguf(file, device), original.config, tokens // 512
    out.mkdir(parents=True, exist_ok=True)
    sizes = replace(Sizes.of(c, weights.file.tensors, how), dtype=torch.bfloat16, hidden=torch.bfloat16)  # as R1's are
    room = sizes.room(original, (n_chunk, 512), Limits(None, place, out), gradients.memory(original, 1, 512))
    specs = moving(c, weights.file.tensors, moves)
    values = Values(out, specs, sizes.dtype, scaled(specs, weights.file.tensors))
    student = Student(weights, Tuned(weights.file, original.checkpoint, values, original.device), original.dtype)
    target = Target(original, torch.randn(n_chunk, 512, c.d).bfloat16())
    ids = torch.randint(0, c.n_vocab, (n_chunk, 512), generator=torch.Generator().manual_seed(0))
    drop_cache(folder)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for number in range(steps):
        spill = TimedSpill(out / f"step-{number:03}", "bench")
        step = TrainingStep(student, ids, torch.arange(n_chunk), target, room, spill)
        begin = time.perf_counter()
        step.run(how.update(number), lambda amount=1, at="", before=False: None)
        end = time.perf_counter()
        print(f"step {number + 1}: {end - begin:.1f} s")
        found, head = spill.steps(c.n_layer, end), spill.stamps[f"gradient-{c.n_layer:03}"]
        head -= spill.stamps[f"inputs-{c.n_layer:03}"]
        spill.remove()
    show_layers(student, found)
    print(f"head {head:.2f} s; peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    show_r1(how, recipe, found, head)
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
