"""KLD of finished files against their original over whole texts, as ratios to the first file's.

    python scripts/research/judge.py MODEL GGML.gguf OURS.gguf ... --text eval.txt --text wiki.txt

Second halves of chunks of 512 tokens, spread over each text; nothing but forward passes.
"""

from pathlib import Path

import click
import torch
from starve import chunks, divergence

from quantkit.machine import chosen_device
from quantkit.models.open import open_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source


@click.command()
@click.argument("model")
@click.argument("files", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--text", "texts", multiple=True, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--scored", default=10_000, help="Chunks of each text, at most.")
@torch.inference_mode()
def main(model: str, files: tuple[Path, ...], texts: tuple[Path, ...], scored: int) -> None:
    """Print a line for each file."""
    original = CheckpointSource(open_weights(model), chosen_device(), torch.float32)
    tokens = {text.stem: chunks(original, text, scored) for text in texts}
    first: dict[str, float] = {}
    for path in files:
        file = open_source(path, original.device, torch.float32)
        kld = {name: divergence(original, file, ids) for name, ids in tokens.items()}
        first = first or kld
        figures = "  ".join(f"{name} {value:.4f} ({value / first[name]:.3f})" for name, value in kld.items())
        print(f"{path.stat().st_size:>12,}  {figures}  {path}", flush=True)


if __name__ == "__main__":
    main()
