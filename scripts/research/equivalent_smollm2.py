"""Turned residual streams of a model with outlier channels: output error of what reads SmolLM2-135M's stream.

    python scripts/research/equivalent_smollm2.py SmolLM2-135M-Instruct.Q4_1.gguf calib.txt eval.txt

Model, texts and weights of tokens as in encoder_smollm2.py. gate and up of some layers are encoded as they are, with
their norm's weight folded in, and with the stream turned besides, by ours (error feedback under H) and by ggml (its
diagonal as imatrix); every H is turned along, so errors compare: Σ w |(W − Q) x|² / Σ w |W x|². Rows of 576 are filled
up with zeros to three superblocks. Prints the channels' spread first.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from encoder_smollm2 import Llama, chunks, moments
from equivalent import SEED, equal_pivots

from quantkit.encoding import hessian
from quantkit.encoding.api import encode
from quantkit.encoding.hessian import Hessian, damp, prepare
from quantkit.ggml import quants

ROW = 768
PLAIN_DAMPING = hessian.damping
SCALES = (0.125, 0.25, 0.5)  # powers of the mean square of an input, into its column: AWQ (arXiv 2306.00978)


def bases(pooled: torch.Tensor, tokens: float) -> Iterator[tuple[str, torch.Tensor]]:
    """Orthogonal Q float64 [d, d] by name; pooled: mean of all normed streams' moments, of norms without weights."""
    d = len(pooled)
    random = torch.Generator().manual_seed(SEED)
    signs = torch.randint(0, 2, (d,), generator=random).double() * 2 - 1
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < 64:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)]) / math.sqrt(2)
    mixed, _ = torch.linalg.qr(torch.randn(d // 64, d // 64, generator=random, dtype=torch.float64))
    _, vectors = torch.linalg.eigh(pooled)
    eye = torch.eye(d, dtype=torch.float64)
    by = pooled.diagonal().argsort(descending=True)
    yield "folded", eye
    yield "Hadamard, blocks of 64", signs[:, None] * torch.block_diag(*[block] * (d // 64))
    yield "Hadamard, whole width", signs[:, None] * torch.kron(mixed.contiguous(), block)
    yield "PCA, ascending", vectors
    yield "PCA, descending", vectors.flip(1)
    yield "equal pivots", equal_pivots(damp(pooled.float(), tokens).double())
    yield "sorted, largest first", eye[:, by]


def turned(h: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Moments [d, d] of x B, float32 [ROW, ROW]: nothing is known of what fills up."""
    out = torch.zeros(ROW, ROW)
    out[: len(h), : len(h)] = (basis.T @ h.double() @ basis).float()
    return out


def error(qtype: str, how: str, w: torch.Tensor, h: Hessian, truth: torch.Tensor) -> float:
    """Of rows w float32 [n, ROW], by the moments of other text."""
    if how == "ggml":
        packed = quants.quantize(qtype, w.numpy(), h.diagonal.numpy())
    else:
        packed = encode(qtype, w, prepare([h], ROW, torch.device("cpu")), effort=how, device="cpu")
    e = w - torch.from_numpy(quants.dequantize(qtype, packed, ROW))
    return float(((e @ truth) * e).sum() / ((w @ truth) * w).sum())


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("calib", type=Path)
    p.add_argument("eval", type=Path)
    p.add_argument("--types", nargs="+", default=["IQ1_S", "IQ2_XXS"])
    p.add_argument("--how", nargs="+", default=["ggml", "normal"])
    p.add_argument("--layers", type=int, nargs="+", default=[1, 7, 13, 19, 25])
    p.add_argument("--chunks", type=int, nargs=2, default=(48, 16), help="of 512 tokens, calibration and evaluation")
    p.add_argument("--damping", type=float, default=1, help="factor on the part of it that is alike for all columns")
    a = p.parse_args()
    hessian.damping = lambda n_in, tokens: a.damping * PLAIN_DAMPING(n_in, tokens)
    model = Llama(a.model)
    everywhere = set(range(model.layers))
    with torch.inference_mode():
        known, _, _ = moments(model, chunks(model, a.calib, a.chunks[0]), everywhere)
        truth, _, _ = moments(model, chunks(model, a.eval, a.chunks[1]), set(a.layers))
        norms = {
            (i, f"{n}_in"): model.weight(f"blk.{i}.{n}_norm").double() for i in everywhere for n in ("attn", "ffn")
        }
        plain = {key: known[key].matrix.double() / g[:, None] / g for key, g in norms.items()}
        pooled = sum(h / h.diagonal().mean() for h in plain.values()) / len(plain)
        for i in a.layers:
            with_weight, without = (h.diagonal() for h in (known[i, "ffn_in"].matrix, plain[i, "ffn_in"]))
            spread = [float(own.max() / own.mean()) for own in (with_weight, without)]
            print(f"layer {i}: mean squares up to {spread[0]:.0f} times their mean, without weight {spread[1]:.0f}")
        turns = [("as it is", None), *bases(pooled, known[0, "ffn_in"].tokens)]
        names = [name for name, _ in turns] + [f"columns × mean square^{p}" for p in SCALES]
        print("| | | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 2) + "|")
        for qtype in a.types:
            for how in a.how:
                rows = [
                    compare(model, qtype, how, i, turns, (known[i, "ffn_in"], truth[i, "ffn_in"])) for i in a.layers
                ]
                mean = np.exp(np.log(np.array(rows)).mean(0))
                ratios = " | ".join(f"{r:.3f}" for r in mean[1:] / mean[0])
                print(f"| {qtype} | {how} | {mean[0]:.4f} | {ratios} |", flush=True)


def compare(
    model: Llama,
    qtype: str,
    how: str,
    layer: int,
    turns: list[tuple[str, torch.Tensor | None]],
    moments: tuple[Hessian, Hessian],
) -> list[float]:
    """Errors of a layer's gate on up, for every turn. moments: of calibration and of evaluation."""
    g = model.weight(f"blk.{layer}.ffn_norm").double()
    own = moments[0].diagonal.double()
    eye = torch.eye(len(g), dtype=torch.float64)
    changes = [(name, eye if q is None else q / g[:, None], eye if q is None else q * g[:, None]) for name, q in turns]
    changes += [(f"s^{p}", torch.diag(own**-p), torch.diag(own**p)) for p in SCALES]
    w = torch.cat([model.weight(f"blk.{layer}.ffn_{part}") for part in ("gate", "up")]).double()
    out = []
    for _, basis, inverse in changes:
        rows = torch.nn.functional.pad((w @ inverse).float(), (0, ROW - len(g)))
        h, other = (turned(m.matrix, basis) for m in moments)
        out.append(error(qtype, how, rows, Hessian(h, h.diagonal().clone(), moments[0].tokens), other))
    return out


if __name__ == "__main__":
    main()
