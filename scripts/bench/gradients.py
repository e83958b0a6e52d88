"""The streamed backward pass at R1's true geometry: s and GB/s of a layer each way, peak memory, disk, and all of R1.

    python scripts/bench/synthetic.py synthetic --dense 1 --moe 2
    python scripts/bench/gradients.py synthetic --tokens 16384 --out /scratch/gradients

A forward pass of many tokens alone (1,048,576, say) is `stream.py --tokens N`. Run it with 2 and 3 layers (--layers):
the peak must not grow. What it writes is removed. Labels are drawn from a random
model, so only sizes and times mean anything.
"""

import json
import resource
import shutil
import time
from pathlib import Path

import click
import torch
from stream import R1_DENSE, R1_MOE, drop_cache

from quantkit import bundle
from quantkit.calibration import gradients
from quantkit.calibration.gradients import GradientOptions, GradientPass, Labels, Rows
from quantkit.calibration.spill import Spill
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.runtime.memory import Limits, memory, room_for
from quantkit.runtime.rates import active_weights
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource


class TimedSpill(Spill):
    """Notes when each array is on disk."""

    def __init__(self, folder: Path, job: str):
        super().__init__(folder, job)
        self.stamps: dict[str, float] = {}

    def put(self, name: str, array: torch.Tensor) -> None:
        super().put(name, array)
        self.stamps[name] = time.perf_counter()

    def steps(self, n_layer: int, end: float) -> list[tuple[float, float]]:
        """Seconds forward and backward of each layer."""
        at = self.stamps | {"gradient-000": end}
        return [
            (
                at[f"inputs-{layer + 1:03}"] - at[f"inputs-{layer:03}"],
                at[f"gradient-{layer:03}"] - at[f"gradient-{layer + 1:03}"],
            )
            for layer in range(n_layer)
        ]


def open_layers(folder: Path, layers: int | None, device: str, dtype: str | None) -> CheckpointSource:
    checkpoint = Checkpoint.open(folder)
    if layers:
        dense = min(layers, checkpoint.config["first_k_dense_replace"])
        checkpoint.config.update(num_hidden_layers=layers, first_k_dense_replace=dense)
    compute = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    return CheckpointSource(checkpoint, device, compute)


def show(source: CheckpointSource, room: Room, rows: Rows, steps: list[tuple[float, float]]) -> None:
    """Each layer, the peaks, and the sums for all of R1."""
    print(f"{'layer':>5} {'GB':>7} {'forward s':>10} {'GB/s':>6} {'backward s':>11} {'GB/s':>6}")
    tensors = source.checkpoint.tensors.items()
    for layer, (forward, backward) in enumerate(steps):
        gb = sum(e.n_bytes for name, e in tensors if name.startswith(f"model.layers.{layer}.")) / 1e9
        print(f"{layer:>5} {gb:>7.2f} {forward:>10.2f} {gb / forward:>6.2f} {backward:>11.2f} {gb / backward:>6.2f}")
    need = memory(source.config, source.dtype, room.hidden)
    more = gradients.memory(source, rows.n_sample, 512)
    estimate = (need + more).total(rows.n_tokens, room.place)
    print(
        f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB; estimated {estimate / 1e9:.2f} GB"
    )
    if source.device.type == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    r1 = family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))
    state, kept = gradients.disk(r1, Rows.of(r1, rows.n_tokens, rows.n_sample), room.hidden)
    print(f"R1: {state / 1e9:.0f} GB of state and {kept / 1e9:.0f} GB of gradients on disk")
    if source.config.n_moe:
        both = [R1_MOE * moe + R1_DENSE * dense for dense, moe in zip(steps[0], steps[-1], strict=True)]
        print(f"R1 at {rows.n_tokens:,} tokens: {both[0] / 60:.0f} min forward, {both[1] / 60:.0f} min backward")
        share = routed_share(r1)  # ranks share routed experts, and compute the rest each
        eight = [seconds * (1 - share + share / 8) / 60 for seconds in both]
        print(f"eight GPUs, if computing is all: {eight[0]:.0f} and {eight[1]:.0f} min ({share:.0%} of it is shared)")


def routed_share(config: ModelConfig) -> float:
    """Of the products of a token, those with routed experts."""
    routed = 3 * config.d * config.n_ff_exp * config.n_used * config.n_moe
    return routed / active_weights(config)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="A scratch folder.")
@click.option("--tokens", default=16384, show_default=True)
@click.option("--samples", default=3, show_default=True)
@click.option("--layers", default=None, type=int, help="Only the first N layers.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default=None, help="Compute dtype.")
@click.option("--room", "place", type=click.Choice(["device", "ram", "disk"]), default=None, help="Of all tokens.")
def main(
    folder: Path, out: Path, tokens: int, samples: int, layers: int | None, device: str, dtype: str | None, place: str
) -> None:
    """Derive over random tokens in chunks of 512 and print what it took."""
    source = open_layers(folder, layers, device, dtype)
    drop_cache(folder)
    ids = torch.randint(0, source.config.n_vocab, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    rows = Rows(tokens, samples, torch.bfloat16)
    out.mkdir(parents=True, exist_ok=True)
    room = room_for(source, tokens, Limits(None, place, out), gradients.memory(source, samples, 512))
    spill = TimedSpill(out / "state", "bench")
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    GradientPass(source, ids, rows, room, spill, out).run(Labels(source, GradientOptions(samples=samples)))
    show(source, room, rows, spill.steps(source.config.n_layer, time.perf_counter()))
    shutil.rmtree(out)


if __name__ == "__main__":
    main()
