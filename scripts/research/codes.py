"""Whether the codes of routed experts can move while a file is recovered: the whole model in memory.

    python scripts/research/codes.py MODEL BASE.gguf CALIB.txt EVAL.txt OTHER.txt --gradients DIR \\
        -v "" -v "share=0.002" -v "share=0.01,mult=3" -v "latent=0.03"

A variant sets fields of `Moving`, or of recovery.py's `Tuning`. After each step's gradient, every group of 8 weights is
offered the entry of its codebook that lowers `g·δ + ½ mult κ a_r s² δᵀ H δ` most (g: the KLD's gradient at the decoded
weights; κ a_r H: of the Fisher information, as two-sided encoding has it, diagonal in rows and in groups), and the
`share` of all groups with the largest predicted gain take it (PV-tuning, arXiv 2405.14852, moves those of the largest
update). Scales and shifts of blocks stay, so sizes and types do. `latent`: instead, each weight has a latent value that
Adam moves at this rate, and codes are the nearest to it (straight-through).
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import click
import torch
import torch.nn.functional as F
from encoder_proxy import final
from recovery import MICRO, Bench, Free, Tuning, Weights, _move

from quantkit.codecs.bits import negative
from quantkit.codecs.registry import FORMATS, codec
from quantkit.encoding.hessian import blocks, damp
from quantkit.encoding.outputs import LayerOutputs
from quantkit.formats.gradients import DOWN, INNER
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.tensors import ROUTED_ROLES

RECOVERED = Tuning(what="norms+router+mats+dm+d", opt="factored")
CELLS = 1 << 28  # groups times entries that are weighed at once


@dataclass(frozen=True)
class Moving:
    """share: of all groups, that move in a step at most, falling as the rate does. mult: of the curvature. first, last:
    parts of the steps between which codes move; every: so many steps. kept: of the codes' gradient from the steps
    before (a momentum, which a large model has no room for). latent: rate. tune: codes only, if 0. rows: 1 if only the
    best group of each row may move. trials: a step's moves that do not lower the KLD of its own text are taken back,
    and a quarter of them tried, so often at most. rate: if given, the curvature is not that of the Fisher information
    but Adam's, √(mean square of the gradient, by rows and columns) / (rate std), and groups are ranked in its units."""

    share: float = 0.0
    mult: float = 1.0
    first: float = 0.0
    last: float = 1.0
    every: int = 1
    kept: float = 0.0
    latent: float = 0.0
    tune: int = 1
    rows: int = 0
    trials: int = 0
    rate: float = 0.0

    @classmethod
    def of(cls, text: str) -> tuple["Moving", Tuning]:
        """From NAME=VALUE,..."""
        given = dict(part.split("=") for part in text.split(",") if part)
        mine = {f.name: type(f.default)(given.pop(f.name)) for f in fields(cls) if f.name in given}
        rest = {name: type(getattr(RECOVERED, name))(value) for name, value in given.items()}
        return cls(**mine), replace(RECOVERED, **rest)


class Stack:
    """The codes of one stack of experts. v [E, R, n/8, 8]; s, o [E, R, n/8]; metric [E, n/8, 8, 8]: the blocks of H;
    weight [E, R]: κ a_r."""

    def __init__(self, qtype: str, packed: torch.Tensor, n_in: int, metric: torch.Tensor, weight: torch.Tensor):
        e, r, _ = packed.shape
        found, self.shape, self.metric, self.weight = codec(qtype), (e, r, n_in), metric, weight
        groups = found.unpack(found.parts(packed.reshape(-1, found.block.itemsize)))
        offset = groups.offset if isinstance(groups.offset, torch.Tensor) else torch.zeros_like(groups.scale)
        self.v = groups.v.view(e, r, n_in // 8, 8).to(torch.int8)
        self.s, self.o = (t.reshape(e, r, n_in // 8).float() for t in (groups.scale, offset))
        self.book = codebook(qtype).to(packed.device)
        self.inverse = torch.linalg.inv(metric)
        self.latent = None

    def values(self) -> torch.Tensor:
        """Decoded, [E, R, n]."""
        return (self.v * self.s[..., None] + self.o[..., None]).flatten(2)

    def plain(self, rate: float) -> None:
        """The metric becomes that of equal weights, for a gradient of mean square 1: moves of rate standard deviations
        cost half of what they gain."""
        self.metric = torch.eye(8, device=self.s.device).expand_as(self.metric)
        self.inverse, self.weight = self.metric, torch.ones_like(self.weight) / (rate * self.values().std())

    def offers(self, gradient: torch.Tensor, mult: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The best entry of each group, int32, and the predicted gain [E, R, n/8]."""
        gains, entries = torch.empty_like(self.s), torch.empty_like(self.s, dtype=torch.int32)
        for e in range(self.shape[0]):
            g, s = gradient[e].unflatten(-1, (-1, 8)), self.s[e]
            stiff = (mult * self.weight[e][:, None] * s * s).clamp_min(1e-30)
            v = self.v[e].float()
            move = torch.einsum("rgi,gij->rgj", g * (s / stiff)[..., None], self.inverse[e])
            entries[e], gain = self.nearest(e, v - move, v)
            gains[e] = gain * stiff
        return entries, gains

    def nearest(self, e: int, target: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of expert e, for targets [R, n/8, 8] in units of v: entries, and by how much they are nearer than v."""
        metric, book = self.metric[e], self.book
        own = 0.5 * torch.einsum("ki,gij,kj->gk", book, metric, book)
        pulled = torch.einsum("rgi,gij->grj", target, metric)
        now = torch.einsum("rgi,rgi->gr", v, (0.5 * torch.einsum("rgi,gij->rgj", v, metric) - pulled.transpose(0, 1)))
        best, cost = [], []
        for part, half in zip(*(t.split(max(1, CELLS // (len(v) * len(book)))) for t in (pulled, own)), strict=True):
            found = torch.baddbmm(half[:, None], part, book.T.expand(len(part), -1, -1), alpha=-1).min(-1)
            best.append(found.indices.int())
            cost.append(found.values)
        return torch.cat(best).T, (now - torch.cat(cost)).T


def normed(g: torch.Tensor) -> torch.Tensor:
    """[E, R, n] by the roots of its mean squares over rows times those over columns."""
    square = g.square() + 1e-38
    rows, columns = square.mean(2, keepdim=True), square.mean(1, keepdim=True)
    return g * (square.mean((1, 2), keepdim=True) / (rows * columns)).sqrt()


def codebook(qtype: str) -> torch.Tensor:
    """All that a group of 8 can be, float32 [entries, 8]."""
    grid = torch.from_numpy(FORMATS[qtype].grid)
    signs = FORMATS[qtype].signs
    if signs == "grid":
        return grid
    masks = torch.arange(256)
    if signs == "even":
        masks = masks[torch.tensor([int(m).bit_count() % 2 == 0 for m in masks])]
    return (grid[:, None] * negative(masks[None])[0][None]).reshape(-1, 8)


def stacks(base: Path, config, stats: dict, folder: Path, n_derived: int, device: torch.device) -> dict[str, Stack]:
    """Of all routed experts. folder: gradients of the original for n_derived tokens, samples counted."""
    file, found = open_gguf(base, torch.device("cpu")).file, {}
    for i in range(config.n_layer):
        if not config.is_moe(i):
            continue
        outputs = LayerOutputs(folder, i, 0.5, device)
        for role in ROUTED_ROLES:
            tensor = file.tensors[f"blk.{i}.{role}.weight"]
            e, r, n = tensor.shape
            down = role == ROUTED_ROLES[-1]
            key = DOWN if down else INNER
            assert outputs.knows(key, e, r if down else 2 * r)
            rows = outputs.gradients.experts[key]
            each = [float(rows.of(x).float().square().sum()) / (rows.of(x).shape[1] * n_derived) for x in range(e)]
            kappa = torch.tensor(each, device=device)
            kappa = kappa.clamp_min(0.1 * float(kappa.mean()))
            part = slice(r, 2 * r) if role == ROUTED_ROLES[1] else slice(0, r)
            rows_weight = torch.stack([outputs.expert(key, x).diagonal()[part] + 0.3 for x in range(e)])
            kind = f"blk.{i}.{'ffn_down_exps' if down else 'ffn_gate_exps'}"
            metric = torch.stack([_metric(stats.get((f"{kind}.{x}", "norm")), n, device) for x in range(e)])
            packed = torch.from_numpy(file.data(f"blk.{i}.{role}.weight").copy()).view(e, r, -1).to(device)
            found[f"blk.{i}.{role}"] = Stack(tensor.qtype, packed, n, metric, kappa[:, None] * rows_weight)
    return found


def _metric(hessian, n: int, device: torch.device) -> torch.Tensor:
    if hessian is None or hessian.matrix is None:
        return torch.eye(8, device=device).expand(n // 8, 8, 8)
    matrix = damp(hessian.matrix, hessian.tokens) / hessian.matrix.diagonal().mean()
    return blocks(matrix.to(device)[None])[0]


class Codes:
    """Codes that move. Keeps `free.base` at what they decode to."""

    def __init__(self, found: dict[str, Stack], free: Free, how: Moving, steps: int):
        self.found, self.free, self.how, self.steps = found, free, how, steps
        self.gradient = {name: torch.zeros(stack.shape, device=stack.s.device) for name, stack in found.items()}
        self.moved, self.log = 0, []
        self.second = {name: torch.zeros_like(t) for name, t in self.gradient.items()} if how.latent else {}

    def add(self, name: str, g: torch.Tensor) -> None:
        """Of one part of a step."""
        self.gradient[name] += g

    @torch.no_grad()
    def step(self, step: int, decay: float, kld: float, measure: Callable[[], float]) -> None:
        """kld: of the step's text, before; `measure` says what it is now."""
        how = self.how
        if how.latent:
            self._latent(step, decay)
        elif how.share and how.first <= step / self.steps < how.last and (step + 1) % how.every == 0:
            self._offer(how.share * decay, kld, measure)
        for t in self.gradient.values():
            t.mul_(how.kept)

    def _offer(self, share: float, kld: float, measure: Callable[[], float]) -> None:
        offers = {}
        for name, stack in self.found.items():
            gradient = self.gradient[name]
            if self.how.rate:
                gradient = normed(gradient)
                stack.plain(self.how.rate)
            offers[name] = stack.offers(gradient, self.how.mult)
        if self.how.rows:
            offers = {name: (t, gain * (gain == gain.amax(-1, keepdim=True))) for name, (t, gain) in offers.items()}
        gains = torch.cat([gain.flatten() for _, gain in offers.values()])
        for _ in range(1 + self.how.trials):
            before = {name: (stack.v.clone(), self.free.base[name]) for name, stack in self.found.items()}
            best, count = gains.topk(max(1, int(share * len(gains)))).values.clamp_min(1e-20), self.moved
            for name, (entries, gain) in offers.items():
                self._take(name, entries, gain >= best[-1])
            now = measure() if self.how.trials else 0.0
            self.log.append((self.moved - count, float(best.sum()), kld - now))
            if now < kld:
                return
            self.moved = count
            for name, stack in self.found.items():
                stack.v, self.free.base[name] = before[name]
            share /= 4

    def _take(self, name: str, entries: torch.Tensor, moves: torch.Tensor) -> None:
        stack = self.found[name]
        moves = moves.contiguous()
        stack.v[moves] = stack.book[entries[moves].long()].to(torch.int8)
        self.moved += int(moves.sum())
        self.free.base[name] = stack.values()

    def _latent(self, step: int, decay: float) -> None:
        for name, stack in self.found.items():
            g, square = self.gradient[name], self.second[name]
            if stack.latent is None:
                stack.latent, stack.first = stack.values(), torch.zeros_like(g)
                stack.unit = stack.latent.std()
            stack.first.lerp_(g, 0.1)
            square.lerp_(g * g, 0.05)
            u = (stack.first / (1 - 0.9 ** (step + 1))) / ((square / (1 - 0.95 ** (step + 1))).sqrt() + 1e-12)
            stack.latent -= self.how.latent * decay * stack.unit * u
            for e in range(stack.shape[0]):
                s = torch.where(stack.s[e] == 0, torch.ones_like(stack.s[e]), stack.s[e])
                target = (stack.latent[e].unflatten(-1, (-1, 8)) - stack.o[e][..., None]) / s[..., None]
                entries, _ = stack.nearest(e, target, stack.v[e].float())
                new = stack.book[entries.long()].to(torch.int8)
                self.moved += int((new != stack.v[e]).any(-1).sum())
                stack.v[e] = new
            self.free.base[name] = stack.values()


def tune(config, free: Free, codes: Codes, w: Weights, ids: torch.Tensor, how: Tuning) -> Weights:
    """As recovery.py's, and codes move with the rest."""
    with torch.no_grad():
        target = torch.cat([final(config, w, part) for part in ids.split(MICRO)])
    names = list(free.delta)
    first, second = ([torch.zeros_like(free.delta[n]) for n in names] for _ in range(2))
    generator, order = torch.Generator().manual_seed(0), torch.empty(0, dtype=torch.long)
    for step in range(how.steps):
        if len(order) < how.batch:
            order = torch.cat([order, torch.randperm(len(ids), generator=generator)])
        pick, order = order[: how.batch], order[how.batch :]
        total = 0.0
        for part in pick.split(MICRO):
            made = free.weights()
            for name in codes.found:
                made[name] = made[name] if made[name].requires_grad else made[name].detach().requires_grad_()
                made[name].retain_grad()
            apart = made | {name: made[name].unbind(0) for name in codes.found}
            with torch.no_grad():
                p = F.log_softmax(target[part] @ w["output"].T, -1)
            q = F.log_softmax(final(config, apart, ids[part]) @ made["output"].T, -1)
            loss = F.kl_div(q, p, log_target=True, reduction="sum") / (len(pick) * ids.shape[1])
            loss.backward()
            total += float(loss)
            for name in codes.found:
                codes.add(name, made[name].grad)
        decay = 0.5 * (1 + math.cos(math.pi * step / how.steps))
        codes.step(step, decay, total, lambda: _divergence(config, free.weights(), w, ids[pick], target[pick]))  # noqa: B023
        with torch.no_grad():
            for i, name in enumerate(names if codes.how.tune else []):
                rate = how.lr * decay * (how.dlr if free.kind[name] == "scale" else 1)
                _move(free.delta[name], first[i], second[i], rate, step, how)
    return {name: t.detach() for name, t in free.weights().items()}


@torch.no_grad()
def _divergence(config, made: Weights, w: Weights, ids: torch.Tensor, target: torch.Tensor) -> float:
    total = 0.0
    for part, aim in zip(ids.split(MICRO), target.split(MICRO), strict=True):
        p = F.log_softmax(aim @ w["output"].T, -1)
        q = F.log_softmax(final(config, made, part) @ made["output"].T, -1)
        total += float(F.kl_div(q, p, log_target=True, reduction="sum"))
    return total / ids.numel()


@click.command()
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("base", type=click.Path(exists=True, path_type=Path))
@click.argument("texts", nargs=-1, required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--gradients", "folder", required=True, type=click.Path(exists=True, path_type=Path))
@click.option("--derived", default=64 * 512 * 3, show_default=True, help="Tokens times samples of the gradients.")
@click.option("-v", "variants", multiple=True, help="NAME=VALUE,...")
@click.option("--total", default=256, show_default=True, help="Chunks of the first text.")
@click.option("--scored", default=107, show_default=True, help="Chunks of each other text.")
def main(
    model: Path,
    base: Path,
    texts: tuple[Path, ...],
    folder: Path,
    derived: int,
    variants: tuple[str, ...],
    total: int,
    scored: int,
) -> None:
    """Print a line for each variant; the last figure is of 32 chunks of the text that it was tuned on."""
    bench = Bench(model, base, texts, total, scored)
    bench.judged["tuned on"] = bench.tokens[:32]
    bench.show("base", bench.q, 0)
    for text in variants:
        (moving, how), started = Moving.of(text), time.perf_counter()
        free = Free(bench.q, bench.w, bench.types, how)
        codes = Codes(stacks(base, bench.config, bench.stats, folder, derived, bench.device), free, moving, how.steps)
        made = tune(bench.config, free, codes, bench.w, bench.tokens, how)
        if codes.log:
            print(
                "moved, predicted, gained:",
                *(f"{n} {a:.5f} {b:.5f}," for n, a, b in codes.log[:: 1 + len(codes.log) // 8]),
            )
        groups = sum(stack.s.numel() for stack in codes.found.values())
        label = f"{text} loose, {codes.moved / groups:.4f} moves a group"
        bench.show(label, made, time.perf_counter() - started)
        bench.encode_again(free, made)
        bench.show(text, made, time.perf_counter() - started)


if __name__ == "__main__":
    main()
