"""How often a model says what its MTP layer drafted: of checkpoints and GGUF files, greedily, on the evaluation text.

    python scripts/bench/drafts.py tiny-v3.2 ours/tiny-v3.2-1.58bit.gguf ggml/tiny-v3.2-1.58bit.gguf

The draft at a token is of the token after the next; it is accepted if the model itself, having read the next one, finds
the same one likeliest.
"""

from pathlib import Path

import click
import torch

from quantkit.calibration.corpus import TextChoice, cut
from quantkit.models.open import open_weights
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import Source, head_logits, stream


@torch.inference_mode()
def accepted(source: Source, tokens: torch.Tensor) -> float:
    """Share of the drafts at tokens int64 [n_chunk, t], but for the last two of a chunk."""
    norm, output = source.head()
    likeliest = None
    for step in stream(source, tokens, mtp=True):
        if step.weights.mtp is None:
            step.compute()
            continue
        seen = rms_norm(step.hidden, norm, source.config.rms_eps)
        likeliest = output(seen.to(source.dtype)).argmax(-1)
        drafts = head_logits(source, (step.weights.mtp.head_norm, output), step.compute()).argmax(-1)
        return float((drafts[:, :-1] == likeliest[:, 1:-1]).float().mean())
    raise click.UsageError(f"{source.name} has no MTP layer")


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("models", nargs=-1, required=True)
@click.option("--tokens", default=16384, show_default=True)
def main(models: tuple[str, ...], tokens: int) -> None:
    """Entry point."""
    for model in models:
        source = open_source(Path(model)) if model.endswith(".gguf") else CheckpointSource(open_weights(model))
        text = TextChoice(n_tokens=tokens)
        chunks = cut(text.corpus("evaluation"), source, text).tokens
        print(f"{model}: {accepted(source, chunks):.2%} of {chunks.numel():,} drafts accepted")


if __name__ == "__main__":
    main()
