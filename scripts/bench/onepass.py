"""The one-pass job on a synthetic checkpoint: seconds a layer, weights/s, GB/s of the checkpoint, peak memory.

    python scripts/bench/synthetic.py synthetic --dense 1 --moe 1
    python scripts/bench/onepass.py synthetic --tokens 32768 --out /tmp/one

Random tokens, the real recipe, the real writer; only the tokenizer's metadata are missing from the file. Under
`accelerate launch` the ranks share the work (scripts/bench/ranks.py compares).
"""

import json
import resource
import time
from itertools import pairwise
from pathlib import Path

import click
import torch

from quantkit import progress, ranks
from quantkit.calibration.collect import collect
from quantkit.calibration.state import PassState
from quantkit.encoding.jobs import GgmlEncoder, encode_pending, fit_importance
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.room import Room
from quantkit.runtime.sources.checkpoint import CheckpointSource


def resident() -> float:
    """The most of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="ktransformers", show_default=True)
@click.option("--tokens", default=32768, show_default=True)
@click.option("--encoder", default="quantkit", type=click.Choice(["quantkit", "ggml"]), show_default=True)
@click.option("--effort", default="normal", show_default=True)
@click.option("--gradients", type=click.Path(exists=True, path_type=Path), help="Encode two-sided by these.")
@click.option("--device", default=None, help="Default: a GPU if there is one.")
@click.option("--json", "figures", type=click.Path(path_type=Path), default=None, help="Write the figures here.")
@torch.inference_mode()
def main(
    folder: Path,
    out: Path,
    recipe: str,
    target: str,
    tokens: int,
    encoder: str,
    effort: str,
    gradients: Path | None,
    device: str | None,
    figures: Path | None,
) -> None:
    """Run it and print what it took."""
    ranks.join()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if first := ranks.index() == 0:
        out.mkdir(parents=True, exist_ok=True)
    else:
        progress.be_quiet()

    def show(text: str) -> None:
        if first:
            print(text, flush=True)

    checkpoint = Checkpoint.open(folder)
    source = CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)
    plan = make_plan(family.specs(source.config), Recipe.load(recipe), target, model="synthetic")
    ids = torch.randint(0, source.config.n_vocab, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    metadata = family.metadata(source.config, plan.mla, "synthetic")
    state = PassState(out / "state", "bench")
    state.remove()
    ranks.barrier()
    started = time.perf_counter()
    stamps, cpu, memory = [started], [time.process_time()], []

    def stamp(_: int) -> None:
        stamps.append(time.perf_counter())
        cpu.append(time.process_time())
        memory.append(torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0)
        show(f"layer {len(memory) - 1}: {stamps[-1] - stamps[-2]:.1f} s, RSS so far {resident():.2f} GB")
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    with GGUFWriter.open(
        out / "synthetic.gguf", plan.tensors, metadata, fingerprint={}, restart=True, overwrite=True
    ) as writer:
        how = EncoderOptions(effort, gradients=gradients) if encoder == "quantkit" else None
        room = Room("device", device, hidden=torch.bfloat16)
        with FileEncoder(source, plan, writer, LayerOptions(how, None if how else 0)) as encoding:
            imatrix = collect(source, ids, state, room=room, turns=encoding.turns, watch=encoding.watch, progress=stamp)
        used = encoding.used_by_all()
        passed = time.perf_counter()
        layers = [after - before for before, after in pairwise(stamps)]
        show("seconds a layer: " + ", ".join(f"{took:.1f}" for took in layers))
        show("CPU seconds a layer: " + ", ".join(f"{after - before:.1f}" for before, after in pairwise(cpu)))
        encode_pending(checkpoint, plan, fit_importance(plan, imatrix), writer, GgmlEncoder())
    whole = time.perf_counter() - started
    state.remove()
    for layer, (took, n_bytes, peak) in enumerate(zip(layers, source.layer_bytes(), memory, strict=True)):
        weights = sum(t.n_weights for t in plan.tensors if t.layer == layer)
        show(
            f"layer {layer}: {took:.1f} s, {weights / took / 1e9:.3g} G weights/s, {n_bytes / 1e9:.2f} GB of the "
            f"checkpoint, {n_bytes / took / 1e9:.3g} GB/s" + (f", GPU memory {peak:.2f} GB" if peak else "")
        )
    show(
        f"left to ggml (embeddings, output, norms): {started + whole - passed:.1f} s, "
        f"{time.process_time() - cpu[-1]:.1f} CPU seconds"
    )
    show(f"moments used: {dict(used)}")
    show(f"file {sum(file.stat().st_size for file in writer.files) / 1e9:.2f} GB, whole run {whole:.0f} s")
    rss = max(ranks.gather(resident()))
    show(f"peak RSS {rss:.2f} GB" + (" of a rank" if ranks.count() > 1 else ""))
    vram = max(memory) if device == "cuda" else None
    if vram is not None:
        show(f"peak GPU memory {vram:.2f} GB")
        devices = f"{ranks.count()} such devices" if ranks.count() > 1 else "one such device"
        show(f"a layer like the last 58 times, as R1's: {58 * layers[-1] / 60:.0f} min on {devices}")
    if figures and first:
        figures.write_text(json.dumps({"layers": layers, "whole": whole, "rss": rss, "vram": vram}))
    ranks.leave()


if __name__ == "__main__":
    main()
