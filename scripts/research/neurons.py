"""Changes inside an expert that leave its function alone: neurons in another order, or scaled between up and down.

    python scripts/research/neurons.py MODEL CALIB.txt EVAL.txt OTHER.txt --out DIR -v "" -v order=h- -v b=0.5

silu(gate x) · (up x) is linear in up, so rows of gate and up may be put in any order together with the columns of down,
and row i of up times s_i, column i of down over s_i: any stock GGUF can hold the result. A variant sets fields of
`Variant`. The first call with --out makes the product's file and keeps the experts' moments; each variant encodes the
experts again into a copy of it. Printed: of down, tr(Δ H Δᵀ) beside the product's (geometric mean over experts; H as
measured, and as damped), and KLD over the second halves of chunks. `--twin` writes the first variant in float32 instead
and prints its KLD, which must be 0.
"""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import click
import numpy as np
import torch
from starve import CHUNK, chunks

from quantkit.calibration.collect import collect
from quantkit.encoding.api import Method, encode_batch, finite, pack
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Factor, Hessian, blend, damp, factorize, unshrinking
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import GAMMA, EncoderOptions, FileEncoder, LayerEncoder, LayerOptions, LayerWriter
from quantkit.encoding.state import State
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml import quants
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.planning.assign import make_plan
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import Source, final_hidden, head_tiles
from quantkit.runtime.watch import Projections
from quantkit.tensors import ROUTED_ROLES

LIMIT = 16.0  # of a scale, and of its inverse
EXACT = 'name = "exact"\ndescription = "."\n[[rules]]\nmatch = "*"\nqtype = "F32"\nwhy = "to compare"\n'


@dataclass(frozen=True)
class Variant:
    """order: of the neurons, KEY+ (ascending) or KEY- (`keys`), `even:KEY` (each
    group of 8 has a share of the large and the small), or `group` (eights of correlated ones). a, b: s = h^a
    n^b. refit: how often the gains of down's columns are fitted and it is encoded again. inside: KEY+ or KEY-, the
    order in which the encoder goes through down's columns, which stay where they are in the file: superblocks, blocks
    in them, groups of 8 in those. inner: the same of gate and up."""

    order: str = ""
    a: float = 0.0
    b: float = 0.0
    refit: int = 0
    inside: str = ""
    inner: str = ""

    @classmethod
    def of(cls, text: str) -> "Variant":
        """From NAME=VALUE,..."""
        given = dict(part.split("=") for part in text.split(",") if part)
        return cls(**{f.name: type(f.default)(given[f.name]) for f in fields(cls) if f.name in given})


def keys(h: torch.Tensor, w: torch.Tensor, name: str) -> torch.Tensor:
    """A number for each column of w [rows, n] under h [n, n]. h: its mean square input; n: its mean square weight; hn:
    both; cond: what of its input is not told by the others'; step: root of n/h; randomN."""
    hh, n = h.diagonal().clamp_min(1e-12 * h.diagonal().mean()), w.square().mean(0).clamp_min(1e-20)
    if name.startswith("random"):
        return torch.rand(len(hh), generator=torch.Generator().manual_seed(int(name[6:])))
    if name == "cond":
        return 1 / torch.linalg.inv(h.double()).diagonal().float()
    return {"h": hh, "n": n, "hn": hh * n, "step": (n / hh).sqrt()}[name]


def sorted_by(key: torch.Tensor, sign: str) -> torch.Tensor:
    """Ascending for '+'."""
    return key.argsort(stable=True, descending=sign == "-")


def dealt(key: torch.Tensor, sizes: tuple[int, ...] = (256, 32, 8)) -> torch.Tensor:
    """Columns as cards are dealt, the largest first and to and fro: to superblocks, of those to blocks, of those to
    groups of 8, so that all have as many of the large and of the small ones."""
    hands = key.argsort(stable=True, descending=True)[None]
    for size in sizes:
        rounds = hands.unflatten(1, (size, -1)).clone()
        rounds[:, 1::2] = rounds[:, 1::2].flip(2)
        hands = rounds.mT.flatten(0, 1)
    return hands.flatten()


def grouped(h: torch.Tensor, size: int = 8) -> torch.Tensor:
    """Columns in eights: the most important one left, and those most correlated with it."""
    root = h.diagonal().clamp_min(1e-30).sqrt()
    near, left = (h / root / root[:, None]).abs(), root.clone()
    order: list[int] = []
    while len(order) < len(h):
        first = int(left.argmax())
        near_it = torch.where(left >= 0, near[first], -1.0)
        near_it[first] = 2.0
        some = near_it.topk(size).indices
        order += some.tolist()
        left[some] = -1
    return torch.tensor(order)


def within(key: torch.Tensor, sign: str, block: int) -> torch.Tensor:
    """An order of columns that keeps groups of 8, blocks and superblocks whole: each sorted within the larger."""
    order = torch.arange(len(key))
    for size, parent in ((8, block), (block, 256), (256, len(key))):
        if size >= parent:
            continue
        mean = key[order].view(-1, parent // size, size).mean(-1)
        by = mean.argsort(dim=1, stable=True, descending=sign == "-")
        order = order.view(-1, parent // size, size).gather(1, by[..., None].expand(-1, -1, size)).flatten()
    return order


def visited(how: Method, w: torch.Tensor, factor: Factor, order: torch.Tensor) -> np.ndarray:
    """As `encode_batch` of one matrix, gone through in an order of `within`, which factor is in."""
    with torch.inference_mode():
        state = encode_rows(how.fmt, finite(w[:, order])[None], factor, how.effort, how.backend)
        back, placed = order.argsort(), []
        for t in state.tensors:
            size = w.shape[1] // t.shape[-1]  # weights that one of its entries is of
            placed.append(t[..., back.view(-1, size)[:, 0] // size])
        return pack(how.finished(State(how.fmt, *placed)))[0]


def damped(h: Hessian, order: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The metric of the product, of neurons that are scaled and then put in order; of mean diagonal 1."""
    metric = (damp(h.matrix, h.tokens) * s * s[:, None])[order][:, order]
    return (metric / metric.diagonal().mean()).contiguous()


def gains(w: torch.Tensor, q: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """c that makes q · diag(c) nearest to w under the metric, [n]."""
    a, b = metric * (q.T @ q), ((w @ metric) * q).sum(0)
    ridge = 1e-4 * a.diagonal().mean()
    return torch.linalg.solve((a + ridge * torch.eye(len(a))).double(), (b + ridge).double()).float()


@dataclass(frozen=True)
class Down:
    """Down of an expert, encoded: packed bytes, the order of its neurons, their scales, its error (raw, damped)."""

    packed: np.ndarray
    order: torch.Tensor
    s: torch.Tensor
    error: tuple[float, float]


def encode_down(w: torch.Tensor, h: Hessian, qtype: str, v: Variant) -> Down:
    """w [d, n], its inputs' moments."""
    n = w.shape[1]
    gamma = unshrinking(GAMMA.get(qtype, 1.0), n, h.tokens)
    s = h.matrix.diagonal().clamp_min(1e-9 * h.matrix.diagonal().mean()) ** v.a * w.square().mean(0) ** v.b
    s = (s / s.log().mean().exp()).clamp(1 / LIMIT, LIMIT)
    order = torch.arange(n)
    if v.order == "group":
        order = grouped(h.matrix)
    elif v.order.startswith("even:"):
        order = dealt(keys(damped(h, order, torch.ones(n)), w / s, v.order[5:]))
    elif v.order:
        order = sorted_by(keys(damped(h, order, torch.ones(n)), w, v.order[:-1]), v.order[-1])
    how = Method.of(qtype, "normal", 1.0 if v.refit else gamma, "cpu")
    packed, metric = _encode(how, w, h, (order, s), v)
    for i in range(v.refit):
        q = torch.from_numpy(quants.dequantize(qtype, packed, n).copy())
        fitted = gains((w / s)[:, order], q, metric).clamp(0.5, 2)
        s = s.clone()
        s[order] *= fitted
        if i + 1 < v.refit:
            packed, metric = _encode(how, w, h, (order, s), v)
    if v.refit:
        s *= gamma  # on the columns, as on the superblocks' scales otherwise
    q = torch.from_numpy(quants.dequantize(qtype, packed, n).copy())
    delta = torch.empty_like(w)
    delta[:, order] = q * s[order]
    delta = delta / gamma - w
    errors = [float(((delta @ m) * delta).sum()) for m in (h.matrix, damp(h.matrix, h.tokens))]
    return Down(packed, order, s, (errors[0], errors[1]))


def _encode(how: Method, w, h: Hessian, change, v: Variant) -> tuple[np.ndarray, torch.Tensor]:
    order, s = change
    metric, moved = damped(h, order, s), (w / s)[:, order].contiguous()
    if v.inside:
        visit = within(keys(metric, moved, v.inside[:-1]), v.inside[-1], how.fmt.block)
        return visited(how, moved, factorize(metric[visit][:, visit][None]), visit), metric
    factor = factorize(metric[None])
    return encode_batch(how.qtype, moved[None], factor, effort=how.effort, gamma=how.gamma, device="cpu")[0], metric


def encode_inner(w: torch.Tensor, h: Hessian, qtype: str, v: Variant) -> np.ndarray:
    """Gate or up, w [n_ff, d]."""
    n = w.shape[1]
    how = Method.of(qtype, "normal", unshrinking(GAMMA.get(qtype, 1.0), n, h.tokens), "cpu")
    metric = damped(h, torch.arange(n), torch.ones(n))
    if v.inner:
        visit = within(keys(metric, w, v.inner[:-1]), v.inner[-1], how.fmt.block)
        return visited(how, w, factorize(metric[visit][:, visit][None]), visit)
    return encode_batch(qtype, w[None], factorize(metric[None]), gamma=how.gamma, device="cpu")[0]


# -- of models --------------------------------------------------------------------------------------------------------


class KeepingFile(FileEncoder):
    """The product's file, and the moments that its experts were encoded by: kept[layer][expert]."""

    kept: dict[int, dict[int, tuple[Hessian, Hessian]]]

    def watch(self, layer: int) -> "KeepingWriter":
        return KeepingWriter(layer, self)


class KeepingWriter(LayerWriter):
    def __init__(self, layer: int, file: KeepingFile):
        super().__init__(layer, file)
        self.ours = KeepingEncoder(layer, file, file.how.ours)
        self.ours.kept = file.kept.setdefault(layer, {})


class KeepingEncoder(LayerEncoder):
    kept: dict[int, tuple[Hessian, Hessian]]

    def take(self, expert: int, matrices: Projections, own: Hessian, down: Hessian) -> None:
        if self.shared is None:
            self.shared = self.moments["ffn_gate_inp"].hessians()[0]
        self.kept[expert] = blend(own, self.shared, self.how.pseudo_tokens * matrices[0].shape[1]), down
        super().take(expert, matrices, own, down)


class Bench:
    """A model, the product's file of it, the moments of its experts, and what judges."""

    def __init__(self, model: str, texts: tuple[Path, ...], out: Path, n: tuple[int, int], recipe: str):
        out.mkdir(parents=True, exist_ok=True)
        self.out = out
        self.source = CheckpointSource(open_weights(model), torch.device("cpu"), torch.float32)
        self.specs = {spec.name: spec for spec in family.specs(self.source.config)}
        self.plan = make_plan(list(self.specs.values()), Recipe.load(recipe), "llama.cpp", model="neurons")
        self.base, self.moments = out / "base" / "file.gguf", out / "moments.pt"
        if not self.moments.exists():
            self._make(chunks(self.source, texts[0], n[0]))
        self.kept = torch.load(self.moments, weights_only=False)
        self.tokens = {text.stem: chunks(self.source, text, n[1]) for text in texts[1:]}
        self.reference = {name: self._reference(name) for name in self.tokens}

    def _make(self, tokens: torch.Tensor) -> None:
        kept: dict = {}
        with self.writer(self.plan, self.base) as writer:
            file = KeepingFile(self.source, self.plan, writer, LayerOptions(EncoderOptions()))
            file.kept = kept
            measured = collect(self.source, tokens, turns=file.turns, watch=file.watch)
            encode_pending(
                self.source.checkpoint, self.plan, fit_importance(self.plan, measured), writer, GgmlEncoder()
            )
        torch.save(kept, self.moments)

    def writer(self, plan: Plan, path: Path):
        """Of a file that replaces what is there."""
        shutil.rmtree(path.parent, ignore_errors=True)
        path.parent.mkdir(parents=True)
        return open_writer(self.source.checkpoint, plan, Output(path))

    def _reference(self, name: str) -> torch.Tensor:
        path = self.out / f"hidden-{name}-{len(self.tokens[name])}.pt"
        if not path.exists():
            torch.save(final_hidden(self.source, self.tokens[name])[:, CHUNK // 2 : -1].flatten(0, 1).clone(), path)
        return torch.load(path)

    def experts(self) -> Iterator[tuple[int, int, Projections, Hessian, Hessian]]:
        """layer, expert, matrices, moments of gate's and up's inputs and of down's."""
        for layer, experts in self.kept.items():
            for expert, (inner, hidden) in experts.items():
                yield layer, expert, tuple(self.read(layer, role, expert) for role in ROUTED_ROLES), inner, hidden

    def read(self, layer: int, role: str, expert: int) -> torch.Tensor:
        """One matrix of the original."""
        spec = self.specs[f"blk.{layer}.{role}.weight"]
        rows = spec.shape[1]
        return family.read(self.source.checkpoint, self.source.config, spec, expert * rows, (expert + 1) * rows, "cpu")

    def variant(self, v: Variant, path: Path) -> tuple[float, float]:
        """Write it; geometric means of down's errors."""
        shutil.copy(self.base, path)
        base, file, errors = GGUFFile.open(self.base), GGUFFile.open(path), []
        for layer, expert, (gate, up, down), inner, hidden in self.experts():
            names = [f"blk.{layer}.{role}.weight" for role in ROUTED_ROLES]
            types = [file.tensors[name].qtype for name in names]
            done = encode_down(down, hidden, types[2], v)
            errors.append(done.error)
            rows = [base.matrix(name, expert)[done.order] for name in names[:2]]  # rows do not know of each other
            first = 0 if v.inner else 1 if bool((done.s != 1).any()) else 2  # that has changed
            moved = gate[done.order], (up * done.s[:, None])[done.order]
            rows[first:] = [encode_inner(w, inner, t, v) for w, t in zip(moved[first:], types[first:2], strict=True)]
            for name, packed in zip(names, [*rows, done.packed], strict=True):
                place(file, name, expert, packed)
        mean = np.log(np.array(errors)).mean(0)
        return float(np.exp(mean[0])), float(np.exp(mean[1]))

    def twin(self, v: Variant) -> Path:
        """The variant's experts in float32, and all else."""
        recipe, path = self.out / "exact.toml", self.out / "exact" / "file.gguf"
        recipe.write_text(EXACT)
        plan = make_plan(list(self.specs.values()), Recipe.load(str(recipe)), "llama.cpp", model="neurons")
        with self.writer(plan, path) as writer:
            encode_pending(self.source.checkpoint, plan, {}, writer, GgmlEncoder())
        types, file = GGUFFile.open(self.base), GGUFFile.open(path)
        for layer, expert, (gate, up, down), _, hidden in self.experts():
            done = encode_down(down, hidden, types.tensors[f"blk.{layer}.{ROUTED_ROLES[2]}.weight"].qtype, v)
            changed = gate[done.order], (up * done.s[:, None])[done.order], (down / done.s)[:, done.order]
            for role, w in zip(ROUTED_ROLES, changed, strict=True):
                place(file, f"blk.{layer}.{role}.weight", expert, w.contiguous().numpy().view(np.uint8))
        return path

    def kld(self, path: Path) -> dict[str, float]:
        """Of each text."""
        file = open_source(path, self.source.device, torch.float32)
        return {name: self._kld(file, name) for name in self.tokens}

    def _kld(self, file: Source, name: str) -> float:
        mine = final_hidden(file, self.tokens[name])[:, CHUNK // 2 : -1].flatten(0, 1)
        total = 0.0
        tiles = (head_tiles(s, s.head(), x) for s, x in ((self.source, self.reference[name]), (file, mine)))
        for p, q in zip(*tiles, strict=True):
            p, q = p.log_softmax(-1), q.log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(-1).double().sum())
        return total / len(mine)


def place(file: GGUFFile, name: str, expert: int, packed: np.ndarray) -> None:
    """One expert's bytes into the file."""
    tensor = file.tensors[name]
    with open(tensor.file, "r+b") as out:
        out.seek(tensor.offset + expert * packed.nbytes)
        out.write(np.ascontiguousarray(packed).tobytes())


@click.command()
@click.argument("model")
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--recipe", default="1.58bit", show_default=True)
@click.option("--total", default=128, show_default=True, help="Chunks of the first text.")
@click.option("--scored", default=40, show_default=True, help="Chunks of each other text.")
@click.option("--judged/--unjudged", default=True, help="KLD, or down's error alone.")
@click.option("--twin", is_flag=True)
@click.option("-v", "variants", multiple=True, help="NAME=VALUE,...")
@click.option("--out", type=click.Path(path_type=Path), required=True)
@torch.inference_mode()
def main(model, texts, recipe, total, scored, judged, twin, variants, out) -> None:
    """Print a line for each variant; all of them in OUT/neurons.jsonl, and what is there is not done again."""
    torch.set_num_threads(1)
    bench = Bench(model, texts, out, (total, scored), recipe)
    if twin:
        print("float32", variants[0], bench.kld(bench.twin(Variant.of(variants[0]))), flush=True)
        return
    log, base = out / "neurons.jsonl", None
    done = [json.loads(line)["variant"] for line in log.read_text().splitlines()] if log.exists() else []
    for text in [v for v in variants if v == "" or v not in done]:
        started, path = time.perf_counter(), out / "variant.gguf"
        error = bench.variant(Variant.of(text), path)
        base = base or error
        same = path.read_bytes() == bench.base.read_bytes()
        kld = bench.kld(path) if judged else {}
        row = {"variant": text, "error": error, "kld": kld, "product": same}
        with open(log, "a") as file:
            file.write(json.dumps(row) + "\n")
        figures = "  ".join(f"{name} {value:.4f}" for name, value in kld.items())
        errors = " ".join(f"{one / first:.4f}" for one, first in zip(error, base, strict=True))
        print(f"{text:36}  error {errors}  {figures}  {time.perf_counter() - started:.0f} s{' =' * same}", flush=True)


if __name__ == "__main__":
    main()
