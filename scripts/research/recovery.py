"""What recovery could do with a finished file: optimizers, rates, steps and what moves, the whole model in memory.

    python scripts/research/recovery.py MODEL BASE.gguf CALIB.txt EVAL.txt OTHER.txt -v "" -v "opt=lion,lr=1e-3" \\
        -v "what=norms+router+mats+d,steps=60"

A variant sets fields of `Tuning`. Matrices outside of the routed experts move from the original's weights and are
encoded again in the end, one-sided, under the moments of the calibration text. KLD over the second halves of chunks,
before (`loose`) and after; texts after CALIB.txt chose nothing but what a person chooses who reads this output.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from encoder_harness import Variant, calibrate, encode_tensor
from encoder_proxy import final, load
from encoder_recover import MATRICES, SUPERBLOCK, parts
from starve import cut_texts

from quantkit.codecs import types as qtypes
from quantkit.encoding.api import SUPPORTED
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml import quants
from quantkit.machine import chosen_device
from quantkit.models import family
from quantkit.models.config import mla_of
from quantkit.models.open import open_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf

MICRO = 16  # chunks that are derived at once
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Tuning:
    """what: norms, router, mats (matrices outside of the experts), d (superblock scales of the experts), dm (of coarse
    matrices outside of them). batch: chunks of a step. lr: in standard deviations of a matrix, or of a logarithm.
    fine: matrices of so many bits and more move as `mats`, others by `dm`. average: share of the last steps whose mean
    is taken. dlr: factor on the rate of scales. splice: halves of chunks are put together anew after the first pass of
    the text; noise: of so many of its tokens others of it stand there then."""

    what: str = "norms+router+mats"
    opt: str = "lion"
    lr: float = 3e-3
    steps: int = 30
    batch: int = 32
    beta1: float = 0.9
    beta2: float = 0.95
    fine: float = 4.0
    average: float = 0.0
    decay: float = 0.0
    dlr: float = 1.0
    splice: int = 0
    noise: float = 0.0

    @classmethod
    def of(cls, text: str) -> "Tuning":
        """From NAME=VALUE,..."""
        plain = cls()
        given = dict(part.split("=") for part in text.split(",") if part)
        return replace(plain, **{name: type(getattr(plain, name))(value) for name, value in given.items()})


class Free:
    """What moves, and the weights that it makes. w: the original's; q: the file's."""

    def __init__(self, q: Weights, w: Weights, types: dict[str, str], how: Tuning):
        self.base, self.delta, self.kind = dict(q), {}, {}
        what = how.what.split("+")
        for name, t in q.items():
            role = name.rpartition(".")[2]
            coarse = role in MATRICES and qtypes.get(types[name]).bpw < how.fine
            if role.endswith("_norm") and "norms" in what:
                self._add(name, t.shape, "log")
            elif role == "ffn_gate_inp" and "router" in what:
                self._add(name, t.shape, "shift")
            elif role in MATRICES and "mats" in what and not coarse:
                self.base[name] = w[name]
                self._add(name, t.shape, "shift")
            elif (role in MATRICES and "dm" in what) or (role.endswith("_exps") and "d" in what):
                if parts(t):
                    self._add(name, (*t.shape[:-1], t.shape[-1] // SUPERBLOCK, 1), "scale")
        self.unit = {name: self.base[name].std() for name, kind in self.kind.items() if kind == "shift"}

    def _add(self, name: str, shape: tuple[int, ...], kind: str) -> None:
        self.delta[name] = torch.zeros(shape, device=self.base[name].device, requires_grad=True)
        self.kind[name] = kind

    def weights(self, delta: Weights | None = None) -> Weights:
        out = dict(self.base)
        for name, t in (delta or self.delta).items():
            base, kind = self.base[name], self.kind[name]
            if kind == "shift":
                out[name] = base + t * self.unit[name]
            else:
                out[name] = (
                    base * t.exp() if kind == "log" else (base.unflatten(-1, (-1, SUPERBLOCK)) * t.exp()).flatten(-2)
                )
        return out


def tune(config, free: Free, w: Weights, ids: torch.Tensor, how: Tuning) -> Weights:
    """The tuned weights, not rounded."""
    with torch.no_grad():
        target = torch.cat([final(config, w, part) for part in ids.split(MICRO)])
    names = list(free.delta)
    first, second = ([torch.zeros_like(free.delta[n]) for n in names] for _ in range(2))
    mean, n_mean = [torch.zeros_like(t) for t in first], 0
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
    changed, now = how.splice or how.noise, ids
    for step in range(how.steps):
        if len(order) < how.batch:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
            now = _changed(ids, how, generator) if changed and step else ids
        pick, order = order[: how.batch], order[how.batch :]
        for part in pick.split(MICRO):
            made, whole = free.weights(), len(pick) * ids.shape[1]
            with torch.no_grad():
                aim = target[part] if now is ids else final(config, w, now[part])
                p = F.log_softmax(aim @ w["output"].T, -1)
            q = F.log_softmax(final(config, made, now[part]) @ made["output"].T, -1)
            (F.kl_div(q, p, log_target=True, reduction="sum") / whole).backward()
        rate = how.lr * 0.5 * (1 + math.cos(math.pi * step / how.steps))
        with torch.no_grad():
            for i, name in enumerate(names):
                t = free.delta[name]
                _move(t, first[i], second[i], rate * (how.dlr if free.kind[name] == "scale" else 1), step, how)
                if step >= how.steps * (1 - how.average):
                    mean[i] += t
            n_mean += step >= how.steps * (1 - how.average)
    with torch.no_grad():
        if n_mean:
            return free.weights({name: total / n_mean for name, total in zip(names, mean, strict=True)})
        return {name: t.detach() for name, t in free.weights().items()}


def _changed(ids: torch.Tensor, how: Tuning, generator: torch.Generator) -> torch.Tensor:
    """Chunks that the text does not have, of its tokens."""
    out = ids.clone()
    if how.splice:
        half = ids.shape[1] // 2
        out[:, half:] = ids[torch.randperm(len(ids), generator=generator).to(ids.device), half:]
    other = ids.flatten()[torch.randint(ids.numel(), ids.shape, generator=generator).to(ids.device)]
    return torch.where((torch.rand(ids.shape, generator=generator) < how.noise).to(ids.device), other, out)


def _move(t, m, v, rate: float, step: int, how: Tuning) -> None:
    g = t.grad
    if how.opt == "adam":
        m.lerp_(g, 1 - how.beta1)
        v.lerp_(g * g, 1 - how.beta2)
        u = (m / (1 - how.beta1 ** (step + 1))) / ((v / (1 - how.beta2 ** (step + 1))).sqrt() + 1e-12)
    elif how.opt == "lion":
        u = m.lerp(g, 1 - how.beta1).sign()
        m.lerp_(g, 1 - how.beta2)
    elif how.opt == "factored":  # Adam whose second moment is its rows' times its columns'
        m.lerp_(g, 1 - how.beta1)
        s = g.square().flatten(0, -2) if g.ndim > 1 else g.square()[None]
        by = s.mean(1, keepdim=True) * s.mean(0, keepdim=True) / (s.mean() + 1e-30) if g.ndim > 1 else s
        v.lerp_(by.view(g.shape), 1 - how.beta2)
        u = (m / (1 - how.beta1 ** (step + 1))) / ((v / (1 - how.beta2 ** (step + 1))).sqrt() + 1e-12)
    else:  # momentum, of mean square 1 over a tensor
        m.lerp_(g, 1 - how.beta1)
        u = m / (m.square().mean().sqrt() + 1e-20)
    t.mul_(1 - how.decay * rate)
    t -= rate * u
    t.grad = None


@torch.no_grad()
def judge(config, w: Weights, q: Weights, ids: torch.Tensor) -> float:
    """Mean KLD of the second halves."""
    total = 0.0
    for part in ids.split(8):
        half = part.shape[1] // 2
        p = F.log_softmax(final(config, w, part)[:, half:-1] @ w["output"].T, -1)
        r = F.log_softmax(final(config, q, part)[:, half:-1] @ q["output"].T, -1)
        total += float((p.exp() * (p - r)).sum(-1).double().sum())
    return total / (len(ids) * (ids.shape[1] - ids.shape[1] // 2 - 1))


def read(path: Path, device: torch.device) -> tuple[Weights, dict[str, str]]:
    """Decoded weights of a file as `encoder_proxy.load` has them, and their types."""
    file: GGUFFile = open_gguf(path, device).file
    config = family.from_gguf(file.metadata)
    out, types = {}, {}
    for spec in family.specs(config, mla_of(file.tensors)):
        tensor, name = file.tensors[spec.name], spec.name.rpartition(".")[0]
        data = quants.dequantize(tensor.qtype, file.data(spec.name).reshape(spec.n_rows, -1), spec.n_in)
        value = torch.from_numpy(data).view(spec.shape)
        out[name] = (value.transpose(1, 2).contiguous() if spec.role == "attn_k_b" else value).to(device)
        types[name] = tensor.qtype
    return out, types


class Bench:
    """What all variants begin with: the original's weights w, the file's q and its types, calibration tokens and their
    statistics, and the texts by which they are judged."""

    def __init__(self, model: Path, base: Path, texts: tuple[Path, ...], total: int, scored: int):
        torch.backends.cuda.matmul.allow_tf32 = True
        self.device = torch.device(chosen_device())
        self.config, w = load(model)
        self.w = {name: t.to(self.device) for name, t in w.items()}
        self.q, self.types = read(base, self.device)
        source = CheckpointSource(open_weights(str(model)), self.device.type, torch.float32)
        tokens, judged = cut_texts(source, texts, total, scored)
        self.tokens = tokens.to(self.device)
        self.judged = {name: ids.to(self.device) for name, ids in judged.items()}
        self.stats = calibrate(self.config, self.w, self.tokens)

    def show(self, label: str, made: Weights, seconds: float) -> None:
        figures = (f"{name} {judge(self.config, self.w, made, ids):.4f}" for name, ids in self.judged.items())
        print(f"{label:60}  {'  '.join(figures)}  {seconds:.0f} s", flush=True)

    @torch.no_grad()
    def encode_again(self, free: Free, made: Weights) -> None:
        """Matrices that moved, in place, if their type is one of ours."""
        for name, kind in free.kind.items():
            if kind == "shift" and self.types[name] in SUPPORTED:
                made[name] = encode_tensor(self.stats, name, made[name], self.types[name], Variant())


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("-v", "variants", multiple=True, help="NAME=VALUE,...")
@click.option("--total", default=256, show_default=True, help="Chunks of the first text.")
@click.option("--scored", default=107, show_default=True, help="Chunks of each other text.")
def main(model: Path, base: Path, texts: tuple[Path, ...], variants: tuple[str, ...], total: int, scored: int) -> None:
    """Print a line for each variant."""
    bench = Bench(model, base, texts, total, scored)
    bench.show("base", bench.q, 0)
    for text in variants:
        how, started = Tuning.of(text), time.perf_counter()
        free = Free(bench.q, bench.w, bench.types, how)
        made = tune(bench.config, free, bench.w, bench.tokens, how)
        bench.show(text + " loose", made, time.perf_counter() - started)
        bench.encode_again(free, made)
        bench.show(text, made, time.perf_counter() - started)


if __name__ == "__main__":
    main()
