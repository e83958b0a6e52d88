"""Neurons in another order, or scaled (neurons.py): the error of down alone, at more columns than small models have.

    python scripts/research/neurons_down.py -v "" -v order=h- -v b=0.5                      # 2048 synthetic neurons
    python scripts/research/neurons_down.py -v "" -v b=0.5 --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf calib.txt eval.txt

Synthetic: silu(gate x) · (up x) of correlated x, whose mean squares are heavy-tailed. tr(Δ H Δᵀ) with H of other tokens
than it was encoded by, of those, and of those as damped, each beside the first variant's.
"""

from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F
from encoder_smollm2 import Llama, chunks, moments
from neurons import Variant, encode_down

from quantkit.codecs.types import QTYPES
from quantkit.encoding.hessian import Hessian, second_moment, unshrinking
from quantkit.ggml import quants

Case = tuple[torch.Tensor, Hessian, torch.Tensor]
"""down [rows, n], the moments of its inputs, and those of other tokens [n, n]."""


def synthetic(columns: int, rows: int, tokens: int, spread: tuple[float, float]) -> Iterator[Case]:
    """spread: standard deviations of the logs of the neurons' sizes, in gate and up, and in down."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    width = columns // 2
    x = normal(2 * tokens, 64) @ normal(64, width) / 8 + 0.5 * normal(2 * tokens, width)
    gate, up = (normal(columns, width) / width**0.5 * (spread[0] * normal(columns, 1)).exp() for _ in range(2))
    hidden = F.silu(2 * x @ gate.T - 0.5) * (x @ up.T)
    down = 0.02 * normal(rows, columns) * (spread[1] * normal(columns)).exp()
    other = second_moment(hidden[tokens:]).matrix
    assert other is not None
    yield down, second_moment(hidden[:tokens]), other


def smollm2(path: Path, texts: tuple[Path, Path], n: tuple[int, int], every: int) -> Iterator[Case]:
    """Of some layers of SmolLM2-135M, 1536 neurons each."""
    model = Llama(path)
    layers = set(range(0, model.layers, every))
    known, truth = (moments(model, chunks(model, text, most), layers)[0] for text, most in zip(texts, n, strict=True))
    for i in sorted(layers):
        yield model.weight(f"blk.{i}.ffn_down"), known[i, "ffn_down"], truth[i, "ffn_down"].matrix


def errors(case: Case, qtype: str, v: Variant) -> tuple[float, float, float]:
    """By other tokens, by these, and by these damped."""
    w, h, other = case
    done = encode_down(w, h, qtype, v)
    q = torch.empty_like(w)
    q[:, done.order] = torch.from_numpy(quants.dequantize(qtype, done.packed, w.shape[1]).copy()) * done.s[done.order]
    delta = q / unshrinking(QTYPES[qtype].gamma, w.shape[1], h.tokens) - w
    return float(((delta @ other) * delta).sum()), *done.error


@click.command()
@click.argument("texts", nargs=-1, type=click.Path(exists=True, path_type=Path))
@click.option("--columns", default=2048, show_default=True)
@click.option("--rows", default=48, show_default=True)
@click.option("--tokens", default=8192, show_default=True, help="Four of each dimension, as R1 sees in 0.5 M.")
@click.option("--spread", type=float, nargs=2, default=(0.5, 0.1), show_default=True, help="Gate and up; down.")
@click.option("--smollm2", "path", type=click.Path(exists=True, path_type=Path), help="Its GGUF.")
@click.option("--chunks", "n", type=int, nargs=2, default=(24, 12), show_default=True, help="Of its texts.")
@click.option("--every", default=6, show_default=True, help="So many of its layers.")
@click.option("--type", "qtypes", multiple=True, default=("IQ1_S", "IQ2_XXS"), show_default=True)
@click.option("-v", "variants", multiple=True, help="NAME=VALUE,... as in neurons.py")
@torch.inference_mode()
def main(texts, columns, rows, tokens, spread, path, n, every, qtypes, variants) -> None:
    """Print a line for each type and variant."""
    torch.set_num_threads(1)
    cases = list(smollm2(path, texts, n, every) if path else synthetic(columns, rows, tokens, spread))
    logs = [(h.diagonal.clamp_min(1e-12).log().std(), w.square().mean(0).log().std()) for w, h, _ in cases]
    print("log of mean squares, standard deviation: inputs, columns", [[round(float(x), 2) for x in y] for y in logs])
    for qtype in qtypes:
        base = None
        for text in variants:
            found = np.log(np.array([errors(case, qtype, Variant.of(text)) for case in cases])).mean(0)
            base = found if base is None else base
            print(f"{qtype:8} {text:28}", *(f"{ratio:.3f}" for ratio in np.exp(found - base)), flush=True)


if __name__ == "__main__":
    main()
