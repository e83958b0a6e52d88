"""Streaming calibration at R1's true geometry: peak memory, GB/s of checkpoint, tokens/s, and the time for all of R1.

    python scripts/bench/synthetic.py synthetic --dense 1 --moe 2
    python scripts/bench/stream.py synthetic --tokens 4096

Run it with 1, 2 and 3 layers (--layers): the peak must not grow.
"""

import resource
import time
from itertools import pairwise
from pathlib import Path

import click
import torch

from quantkit.calibration.collect import collect
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.memory import memory
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource

R1_BYTES, R1_MOE, R1_DENSE = 688_574_839_360, 58, 3


def drop_cache(folder: Path) -> None:
    """Ask the kernel to forget the shards, so that they are read from the disk."""
    import os

    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--tokens", default=4096, show_default=True)
@click.option("--chunk", default=512, show_default=True)
@click.option("--layers", default=None, type=int, help="Only the first N layers.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--hidden", type=click.Choice(["float32", "bfloat16"]), default="bfloat16", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default=None, help="Compute dtype.")
@click.option(
    "--room",
    type=click.Choice(["device", "ram", "disk"]),
    default="device",
    show_default=True,
    help="Where hidden states live.",
)
@torch.inference_mode()
def main(
    folder: Path, tokens: int, chunk: int, layers: int | None, device: str, hidden: str, dtype: str | None, room: str
) -> None:
    """Collect importance over random tokens and print what it took."""
    checkpoint = Checkpoint.open(folder)
    if layers:
        dense = min(layers, checkpoint.config["first_k_dense_replace"])
        checkpoint.config.update(num_hidden_layers=layers, first_k_dense_replace=dense)
    compute = getattr(torch, dtype) if dtype else torch.float32 if device == "cpu" else torch.bfloat16
    source = CheckpointSource(checkpoint, device, compute)
    drop_cache(folder)
    ids = torch.randint(0, source.config.n_vocab, (tokens // chunk, chunk), generator=torch.Generator().manual_seed(0))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    stamps = [time.perf_counter()]
    collect(
        source,
        ids,
        room=Room(room, device, folder, getattr(torch, hidden)),
        progress=lambda _: stamps.append(time.perf_counter()),
    )
    n_bytes = {
        layer: sum(e.n_bytes for n, e in checkpoint.tensors.items() if n.startswith(f"model.layers.{layer}."))
        for layer in range(source.config.n_layer)
    }
    print(f"{'layer':>5} {'s':>8} {'GB':>7} {'GB/s':>6} {'tokens/s':>9}")
    steps = [after - before for before, after in pairwise(stamps)]
    for layer, took in enumerate(steps):
        gb = n_bytes[layer] / 1e9
        print(f"{layer:>5} {took:>8.2f} {gb:>7.2f} {gb / took:>6.2f} {tokens / took:>9.0f}")
    estimate = memory(source.config, compute, getattr(torch, hidden)).total(tokens, room)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak RSS {peak / 1e6:.2f} GB; estimated {estimate / 1e9:.2f} GB")
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    if source.config.n_moe:
        moe, dense = steps[-1], steps[0]
        total = R1_MOE * moe + R1_DENSE * dense
        print(
            f"R1 at {tokens:,} tokens: {R1_MOE} x {moe:.1f} s + {R1_DENSE} x {dense:.1f} s = {total / 60:.0f} min "
            f"({R1_BYTES / 1e9 / total:.2f} GB/s)"
        )


if __name__ == "__main__":
    main()
