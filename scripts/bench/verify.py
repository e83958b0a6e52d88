"""`quantkit verify` at R1's true geometry: seconds a layer for both streams, peak memory, and the time for all of R1.

    python scripts/bench/synthetic.py synthetic --dense 1 --moe 2
    python scripts/bench/verify.py synthetic --file synthetic.gguf --tokens 65536

The GGUF is made once, if it is not there: the real recipe, weights encoded by ggml with unit importance (about two
minutes a MoE layer on 16 cores), only the tokenizer's metadata are missing. Random tokens. Run with --layers 1, 2, 3:
the peak must not grow. --make-only makes the GGUF and ends.
"""

import resource
import threading
import time
from itertools import pairwise
from pathlib import Path

import click
import numpy as np
import torch

from quantkit.encoding.jobs import GgmlEncoder, encode_pending
from quantkit.evaluation.divergence import HeadLogits, diverge, scored, scored_targets
from quantkit.evaluation.side_by_side import SideBySide
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.memory import memory
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.tensors import Importance

R1_MOE, R1_DENSE = 58, 3


def make_file(checkpoint: Checkpoint, out: Path, recipe: str, target: str) -> None:
    """A GGUF of the synthetic checkpoint, without a tokenizer."""
    config = family.from_hf(checkpoint.config)
    plan = make_plan(family.specs(config), Recipe.load(recipe), target, model="synthetic")
    imatrix = {
        t.name: Importance(
            np.ones((t.shape[0] if len(t.shape) == 3 else 1, t.shape[-1]), np.float32), np.ones(1, np.float32)
        )
        for t in plan.tensors
        if len(t.shape) > 1
    }
    with GGUFWriter.open(out, plan.tensors, family.metadata(config, plan.mla, "synthetic"), fingerprint={}) as writer:
        encode_pending(checkpoint, plan, imatrix, writer, GgmlEncoder())


def only_layers(checkpoint: Checkpoint, file: GGUFSource, layers: int) -> None:
    """Pretend that both models end after so many layers."""
    dense = min(layers, checkpoint.config["first_k_dense_replace"])
    checkpoint.config.update(num_hidden_layers=layers, first_k_dense_replace=dense)
    changed = {"deepseek2.block_count": layers, "deepseek2.leading_dense_block_count": dense}
    file.config = family.from_gguf(file.file.metadata | changed)


class Anonymous(threading.Thread):
    """Peak of memory that is not a mapped file's: pages of the GGUF can be dropped at any time."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0

    def run(self) -> None:
        while True:
            with open("/proc/self/status") as status:
                self.peak = max(self.peak, *(int(line.split()[1]) for line in status if line.startswith("RssAnon")))
            time.sleep(0.02)


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--file", type=click.Path(path_type=Path), required=True, help="GGUF of the checkpoint.")
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="ktransformers", show_default=True)
@click.option("--tokens", default=65536, show_default=True)
@click.option("--chunk", default=512, show_default=True)
@click.option("--layers", default=None, type=int, help="Only the first N layers.")
@click.option("--hidden", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@click.option("--make-only", is_flag=True)
@torch.inference_mode()
def main(
    folder: Path,
    file: Path,
    recipe: str,
    target: str,
    tokens: int,
    chunk: int,
    layers: int | None,
    hidden: str,
    device: str,
    make_only: bool,
) -> None:
    """Stream both models side by side over random tokens and print what it took."""
    checkpoint = Checkpoint.open(folder)
    if not file.exists():
        started = time.perf_counter()
        make_file(checkpoint, file, recipe, target)
        print(f"made {file} ({file.stat().st_size / 1e9:.2f} GB) in {time.perf_counter() - started:.0f} s")
    if make_only:
        return
    source = open_source(file, device)
    if layers:
        only_layers(checkpoint, source, layers)
    reference = CheckpointSource(checkpoint, device, source.dtype)
    c, dtype = reference.config, getattr(torch, hidden)
    ids = torch.randint(0, c.n_vocab, (tokens // chunk, chunk), generator=torch.Generator().manual_seed(0))
    watch = Anonymous()
    watch.start()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    both, stamps = SideBySide(reference, source, ids, dtype), [time.perf_counter()]

    def done(_: float) -> None:
        if device == "cuda":
            torch.cuda.synchronize()
        stamps.append(time.perf_counter())

    states = both.run(done)
    rows = [scored(state) for state in states]
    heads = HeadLogits(reference, rows[0]), HeadLogits(source, rows[1])
    found = diverge(*heads, scored_targets(ids), c.n_vocab).summary()
    head = time.perf_counter() - stamps[-1]
    steps = [after - before for before, after in pairwise(stamps)]
    size = {
        layer: sum(e.n_bytes for n, e in checkpoint.tensors.items() if n.startswith(f"model.layers.{layer}."))
        + sum(t.n_bytes for n, t in source.file.tensors.items() if n.startswith(f"blk.{layer}."))
        for layer in range(c.n_layer)
    }
    print(f"{tokens:,} tokens in chunks of {chunk}, {device}, compute {source.dtype}, hidden states {hidden}")
    print(f"{'layer':>5} {'s':>8} {'GB read':>8} {'GB/s':>6} {'own':>7} {'error':>7}")
    for layer, took in enumerate(steps):
        gb, errors = size[layer] / 1e9, both.errors[layer]
        print(f"{layer:>5} {took:>8.2f} {gb:>8.2f} {gb / took:>6.2f} {errors.own:>7.3f} {errors.error:>7.3f}")
    print(f"head  {head:>8.2f}   mean KLD {found['kld_mean']:.3f} over {found['tokens']:,} tokens")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    estimate = 2 * memory(c, source.dtype, dtype).total(tokens)
    print(
        f"peak RSS {peak / 1e6:.2f} GB, without mapped files {watch.peak / 1e6:.2f} GB; "
        f"estimated for both streams {estimate / 1e9:.2f} GB"
    )
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    if c.n_moe and c.n_dense and c.d == 7168:
        moe, dense = steps[-1], steps[0]
        total = R1_MOE * moe + R1_DENSE * dense + head
        print(f"R1: {R1_MOE} x {moe:.1f} s + {R1_DENSE} x {dense:.1f} s + {head:.1f} s = {total / 60:.1f} min")


if __name__ == "__main__":
    main()
