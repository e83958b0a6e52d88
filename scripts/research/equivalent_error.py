"""What encoders lose in routed experts of equivalent models: tr(D H Dt) / tr(W H Wt), H of other text than they saw.

    python scripts/research/equivalent_error.py calib.txt eval.txt MODEL COPY ... --every 6

Copies are of equivalent.py. gate on up, and down, of some experts of every layer are encoded without gamma, under the
moments that the product would encode them under. Printed: how even the pivots of these moments are (geometric over
arithmetic mean), then the mean error, and the geometric mean of its ratios to MODEL's.
"""

from pathlib import Path

import click
import numpy as np
import torch
from starve import chunks

from quantkit.encoding.api import encode_batch
from quantkit.encoding.hessian import Hessian, blend, damp, second_moment
from quantkit.encoding.moments import Moments
from quantkit.ggml import quants
from quantkit.models.open import open_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import stream
from quantkit.runtime.watch import ExpertVisit, Watcher

Case = tuple[str, torch.Tensor, Hessian]
"""gate|up or down, its weights, and the moments of its inputs."""


class Experts(Watcher):
    """Every so many experts of a layer with their moments."""

    def __init__(self, every: int) -> None:
        self.every, self.shared, self.weights, self.cases = every, Moments(), [], []

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        if role == "ffn_gate_inp":
            self.shared.add(x, weight)
            self.weights.append(weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        if visit.expert % self.every == 0:
            weight = torch.cat(self.weights)[visit.tokens] * visit.weight.float().square()
            gate, up, down = visit.matrices
            own = blend(second_moment(visit.x, weight), self.shared.hessians()[0], gate.shape[1])
            self.cases.append(("gate and up", torch.cat([gate, up]), own))
            self.cases.append(("down", down.clone(), second_moment(visit.hidden, weight)))


def cases(source: CheckpointSource, text: Path, count: int, every: int) -> list[Case]:
    """Of all layers."""
    found: list[Case] = []
    for step in stream(source, chunks(source, text, count)):
        seen = Experts(every)
        step.compute(seen)
        found += seen.cases
    return found


def evenness(h: Hessian) -> float:
    """Geometric over arithmetic mean of the pivots that feedback has."""
    pivots = torch.linalg.cholesky(damp(h.matrix, h.tokens).double().flip(0, 1)).diagonal().square()
    return float(pivots.log().mean().exp() / pivots.mean())


def error(qtype: str, encoder: str, case: Case, truth: torch.Tensor) -> float:
    """Of one matrix."""
    _, w, h = case
    if encoder == "ggml":
        packed = quants.quantize(qtype, w.numpy(), h.diagonal.numpy())
    else:
        packed = encode_batch(qtype, w[None], [h], effort=encoder, device="cpu")[0]
    e = w - torch.from_numpy(quants.dequantize(qtype, packed, w.shape[1]))
    return float(((e @ truth) * e).sum() / ((w @ truth) * w).sum())


@click.command()
@click.argument("calib", type=click.Path(exists=True, path_type=Path))
@click.argument("other", type=click.Path(exists=True, path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--type", "qtype", default="IQ1_S", show_default=True)
@click.option("--chunks", "counts", nargs=2, default=(64, 40), show_default=True, help="Of 512 tokens, of each text.")
@click.option("--every", default=6, show_default=True, help="Every so many experts.")
@torch.inference_mode()
def main(calib: Path, other: Path, models: tuple[str, ...], qtype: str, counts: tuple[int, int], every: int) -> None:
    """Print a line for each model, encoder and kind of matrix."""
    quants.prepare(qtype)
    first: dict[tuple[str, str], np.ndarray] = {}
    for model in models:
        source = CheckpointSource(open_weights(model), "cpu", torch.float32)
        known, truth = (cases(source, *each, every) for each in zip((calib, other), counts, strict=True))
        even = {kind: [evenness(h) for k, _, h in known if k == kind] for kind in ("gate and up", "down")}
        print("pivots: " + ", ".join(f"{kind} {np.mean(each):.3f}" for kind, each in even.items()) + f"  {model}")
        for encoder in ("normal", "ggml"):
            for kind in ("gate and up", "down"):
                pairs = [(a, b[2].matrix) for a, b in zip(known, truth, strict=True) if a[0] == kind]
                errors = np.array([error(qtype, encoder, a, b) for a, b in pairs])
                ratio = errors / first.setdefault((encoder, kind), errors)
                mean = np.exp(np.log(ratio).mean())
                spread = f"{mean:.3f} ({ratio.min():.2f} to {ratio.max():.2f})"
                print(f"{encoder:7} {kind:12} {errors.mean():.4f}  {spread}  {model}", flush=True)


if __name__ == "__main__":
    main()
