"""Settings of two-sided encoding, on experts that see few tokens or many: KLD of each variant beside ggml's.

    python scripts/research/two_sided.py MODEL CALIB.txt EVAL.txt OTHER.txt --chunks 4 --chunks 256 --out DIR \\
        -v "gamma=1.0" -v "block=8,passes=5" -v "lambda=0.3,gamma=1.2,own=0.3,IQ1_S=1.08"

Starvation is that of starve.py: routed experts see --chunks of --total chunks. The backward pass derives the same
chunks, at most --derived of them. A variant sets fields of TwoSided and EncoderOptions, `lambda` (added to the damping
of H_I), `tries` (of a block's first encoding), `gamma` (factor on every type's gamma - 1), or the gamma of a type by
name; `one` leaves the gradients out.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import click
import torch
from starve import cut_texts, divergence, write

from quantkit.calibration.gradients import GradientOptions, GradientPass, Labels, Rows
from quantkit.calibration.spill import Spill
from quantkit.encoding import hessian
from quantkit.encoding.layer import GAMMA, EncoderOptions
from quantkit.encoding.state import Effort
from quantkit.encoding.two_sided import FIRST, TwoSided
from quantkit.formats.gradients import path_of
from quantkit.machine import chosen_device
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source

PLAIN_DAMPING = hessian.damping


def derive(source: CheckpointSource, tokens: torch.Tensor, folder: Path, samples: int) -> Path:
    """The gradients of these tokens, on the source's device."""
    if not path_of(folder, 0).exists():
        room = Room("device", source.device, torch.float32)
        rows = Rows.of(source.config, tokens.numel(), samples)
        spill = Spill(folder / "state", "sweep")
        with torch.inference_mode(False):
            GradientPass(source, tokens, rows, room, spill, folder).run(
                Labels(source, GradientOptions(samples=samples))
            )
        spill.remove()
    return folder


def options(variant: dict[str, str], folder: Path) -> EncoderOptions:
    """Sets the damping on the way."""
    extra = float(variant.pop("lambda", 0))
    hessian.damping = lambda n_in, tokens: PLAIN_DAMPING(n_in, tokens) + extra
    factor = float(variant.pop("gamma", 1))
    gamma = {name: 1 + (value - 1) * factor for name, value in GAMMA.items()}
    gamma |= {name: float(variant.pop(name)) for name in list(variant) if name in GAMMA}
    one = variant.pop("one", None)
    effort: str | Effort = variant.pop("effort", FIRST)
    if "tries" in variant:
        effort = replace(FIRST, tries=int(variant.pop("tries")))
    pseudo = float(variant.pop("pseudo_tokens", 1))
    numbers = {k: int(v) if k in ("block", "passes") else float(v) for k, v in variant.items()}
    two = TwoSided(effort=effort, **numbers)
    return EncoderOptions("normal", gamma, pseudo, None if one else folder, two)


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--chunks", "counts", multiple=True, type=int, default=(256,), show_default=True)
@click.option("--total", default=256, show_default=True)
@click.option("--derived", default=64, show_default=True, help="Chunks of the backward pass, at most.")
@click.option("--samples", default=3, show_default=True)
@click.option("--scored", "n_scored", default=107, show_default=True)
@click.option("-v", "variants", multiple=True, help="NAME=VALUE,...")
@click.option("--ggml/--no-ggml", default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.inference_mode()
def main(
    model: str,
    texts: tuple[Path, ...],
    recipe: str,
    counts: tuple[int, ...],
    total: int,
    derived: int,
    samples: int,
    n_scored: int,
    variants: tuple[str, ...],
    ggml: bool,
    out: Path,
) -> None:
    """Print a line for each variant; all of them in OUT/two_sided.json."""
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = open_weights(model)
    original = CheckpointSource(checkpoint, chosen_device(), torch.float32)
    plan = make_plan(family.specs(original.config), Recipe.load(recipe), "llama.cpp", model="sweep")
    tokens, judged = cut_texts(original, texts, total, n_scored)
    rows = []
    for count in counts:
        most = count * 512 if count < total else None
        mine = tokens[: min(count, derived)]
        folder = derive(original, mine, out / f"gradients-{recipe}-{len(mine)}-{samples}", samples)
        base: dict[str, float] = {}
        for variant in (["ggml"] if ggml else []) + list(variants):
            started = time.perf_counter()
            parts = {} if variant in ("ggml", "") else dict(part.split("=") for part in variant.split(","))
            how = None if variant == "ggml" else options(parts, folder)
            path = write(checkpoint, plan, tokens, most, out / "file", how)
            file = open_source(path, original.device, torch.float32)
            kld = {name: divergence(original, file, ids) for name, ids in judged.items()}
            base = base or kld
            rows.append({"chunks": count, "recipe": recipe, "variant": variant, "kld": kld})
            figures = "  ".join(f"{name} {value:.4f} ({value / base[name]:.3f})" for name, value in kld.items())
            print(f"{count:4}  {variant:40}  {figures}  {time.perf_counter() - started:.0f} s", flush=True)
            (out / "two_sided.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
