"""The one-pass job on a synthetic checkpoint of R1's geometry: seconds a layer, weights/s, GB/s, peak memory.

    python scripts/make_synthetic.py synthetic --dense 0 --moe 1
    python scripts/bench_onepass.py synthetic --tokens 32768 --out /tmp/one

Random tokens, the real recipe, the real writer; only the tokenizer's metadata are missing from the file.
"""

import resource
import time
from itertools import pairwise
from pathlib import Path

import click
import torch

from quantkit import onepass
from quantkit.arch import deepseek
from quantkit.calibration.state import PassState
from quantkit.encoding import GgmlEncoder
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.planning.plan import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.quantize import encode_pending, fit_importance
from quantkit.runtime.sources import CheckpointSource

R1_MOE, R1_ROUTED = 58, 58 * 256 * 3 * 2048 * 7168


@click.command()
@click.argument("folder", type=click.Path(exists=True, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--target", default="ktransformers", show_default=True)
@click.option("--tokens", default=32768, show_default=True)
@click.option("--effort", default="normal", show_default=True)
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default=True)
@torch.inference_mode()
def main(folder: Path, out: Path, recipe: str, target: str, tokens: int, effort: str, device: str) -> None:
    """Run it and print what it took."""
    checkpoint = Checkpoint.open(folder)
    source = CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)
    plan = make_plan(deepseek.specs(source.config), Recipe.load(recipe), target, model="synthetic")
    ids = torch.randint(0, source.config.n_vocab, (tokens // 512, 512), generator=torch.Generator().manual_seed(0))
    metadata = deepseek.metadata(source.config, plan.mla, "synthetic")
    state = PassState(out / "state", "bench")
    started = time.perf_counter()
    stamps = [started]
    with GGUFWriter.open(out / "synthetic.gguf", plan.tensors, metadata, fingerprint={}, restart=True,
                         overwrite=True) as writer:  # fmt: skip
        imatrix, used = onepass.run(source, plan, ids, writer, onepass.EncoderOptions(effort), state,
                                    hidden_dtype=torch.bfloat16,
                                    progress=lambda _: stamps.append(time.perf_counter()))  # fmt: skip
        passed = time.perf_counter()
        print("seconds a layer: " + ", ".join(f"{b - a:.1f}" for a, b in pairwise(stamps)), flush=True)
        encode_pending(checkpoint, plan, fit_importance(plan, imatrix), writer, GgmlEncoder())
    state.remove()
    weights = {layer: sum(t.n_weights for t in plan.tensors if t.layer == layer) for layer in range(plan_layers(plan))}
    for layer, (before, after) in enumerate(pairwise(stamps)):
        took = after - before
        print(f"layer {layer}: {took:.1f} s, {weights[layer] / took / 1e9:.2f} G weights/s, "
              f"{weights[layer] / took / 1e9:.2f} GB/s of FP8")  # fmt: skip
    print(f"left to ggml (embeddings, output, norms): {time.perf_counter() - passed:.1f} s")
    print(f"moments used: {dict(used)}")
    size = sum(file.stat().st_size for file in writer.files)
    print(f"file {size / 1e9:.2f} GB, whole run {time.perf_counter() - started:.0f} s")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")
    if device == "cuda":
        print(f"peak GPU memory {torch.cuda.max_memory_allocated() / 1e9:.2f} GB")
    moe = stamps[-1] - stamps[-2]
    print(f"R1: {R1_MOE} MoE layers x {moe:.1f} s = {R1_MOE * moe / 60:.0f} min on one such device")


def plan_layers(plan) -> int:
    return 1 + max(tensor.layer for tensor in plan.tensors if tensor.layer is not None)


if __name__ == "__main__":
    main()
