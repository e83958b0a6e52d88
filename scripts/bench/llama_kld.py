"""KL divergence of GGUF files from another, all computed by stock llama.cpp.

    python scripts/bench/llama_kld.py ORIGINAL-f32.gguf FILE.gguf ... --tokens 16384

Chunks of 512 tokens of the evaluation text, the second half of each scored, as `quantkit verify` has them; the other
program's own tokenizer is not asked (`quantkit certify` does).
"""

from pathlib import Path

import click
import numpy as np
import torch

from quantkit.calibration.corpus import TextChoice, cut
from quantkit.evaluation.oracles import llama
from quantkit.runtime.sources.gguf import open_source

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


def log_probs(file: Path, tokens: np.ndarray) -> torch.Tensor:
    """Of what is scored, float32 [n, n_vocab]."""
    rows = [torch.from_numpy(llama.logits(file, chunk[None])[0, tokens.shape[1] // 2 : -1]) for chunk in tokens]
    return torch.cat(rows).log_softmax(-1)


@click.command(help=__doc__.split("\n\n")[0])
@click.argument("original", type=FILE)
@click.argument("files", type=FILE, nargs=-1, required=True)
@click.option("--tokens", default=16384, show_default=True)
def main(original: Path, files: tuple[Path, ...], tokens: int) -> None:
    """Entry point."""
    text = TextChoice(n_tokens=tokens)
    chunks = cut(text.corpus("evaluation"), open_source(original), text).tokens.numpy()
    base = log_probs(original, chunks)
    following = torch.from_numpy(chunks[:, chunks.shape[1] // 2 + 1 :]).flatten().long()
    nll = -base.gather(1, following[:, None]).mean()
    print(f"{llama.version()}: {len(base):,} tokens scored, perplexity of {original.name} {nll.exp():.4f}")
    for file in files:
        own = log_probs(file, chunks)
        kld = (base.exp() * (base - own)).sum(-1)
        error = kld.std() / len(kld) ** 0.5
        top = (base.argmax(-1) == own.argmax(-1)).float().mean()
        print(f"{file}: {file.stat().st_size:,} bytes, KLD {kld.mean():.5f} ± {error:.5f}, same top-1 {top:.2%}")


if __name__ == "__main__":
    main()
