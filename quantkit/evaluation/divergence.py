"""Perplexity and Kullback-Leibler divergence of a model from its reference, over tiles of the vocabulary.

Definitions as in llama-perplexity --kl-divergence: chunks start with BOS, the second half of each is scored; KLD is
sum p (log p - log q) with p the reference, in nats; RMS delta-p is over the probability of the true token, in percent.

Logits are never held: a slab of rows of the output matrix is read once, meets all scored tokens, and only running sums
stay (the maximum and sum of exponentials of both sides, and the reference-weighted sum of logit differences).
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
import torch

from quantkit.evaluation import student
from quantkit.models.config import ModelConfig
from quantkit.runtime.layers import rms_norm

Score = Literal["half", "all"]
Slab = Callable[[slice], torch.Tensor]
"""Rows of scored tokens -> float32 logits [rows, stop - start] of one slab of the vocabulary."""

VOCAB_SLAB = 8192  # rows of the output matrix held at once: 235 MB of R1's as float32
TILE_ELEMENTS = 1 << 22  # logits of one tile: 16 MB as float32, a few times that with temporaries
MOST_NATS = 300.0  # a token, of which a perplexity is told
LOG_KLD = (-7.0, 1.5, 0.25)  # histogram of log10 KLD: first edge, last edge, step


class Logits(Protocol):
    """Logits of n rows, produced slab by slab."""

    n: int
    device: torch.device

    def slab(self, start: int, stop: int) -> Slab:
        """Logits of vocabulary start:stop, for any rows."""
        ...


class Head(Protocol):
    """The end of a model: `runtime.sources` has it."""

    config: ModelConfig

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""
        ...

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the norm is taken of, [n, d], of hidden states [n, width]."""
        ...

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows start:stop of the output matrix, [stop - start, d]."""
        ...


class HeadLogits:
    """Logits of final hidden states [n, width], made with the source's norm and output matrix as they are asked for."""

    def __init__(self, source: Head, hidden: torch.Tensor) -> None:
        self.source, self.hidden, self.n, self.device = source, source.merge(hidden), len(hidden), hidden.device
        self.norm = source.output_norm()

    def part(self, rows: slice) -> "HeadLogits":
        """Those of some of the hidden states."""
        made = copy(self)
        made.hidden = self.hidden[rows]
        made.n = len(made.hidden)
        return made

    def slab(self, start: int, stop: int) -> Slab:
        """Reads rows start:stop of the output matrix now; they stay as long as what is returned."""
        weight, c = self.source.head_rows(start, stop), self.source.config

        def rows(which: slice) -> torch.Tensor:
            x = rms_norm(self.hidden[which].float(), self.norm, c.rms_eps)
            return (x.to(weight.dtype) @ weight.T).float()

        return rows


class HeldLogits:
    """Logits float32 [n, n_vocab] that are there already (a few tokens of an engine)."""

    def __init__(self, logits: torch.Tensor) -> None:
        self.logits, self.n, self.device = logits, len(logits), logits.device

    def slab(self, start: int, stop: int) -> Slab:
        """A view of columns start:stop."""
        return lambda which: self.logits[which, start:stop]


class Tally:
    """Running sums of n rows over tiles of the vocabulary. targets int64 [n]: the true next tokens."""

    def __init__(self, targets: torch.Tensor, device: torch.device | str = "cpu") -> None:
        n = len(targets)
        self.targets = targets.to(device)

        def row(value: float, dtype: torch.dtype = torch.float64) -> torch.Tensor:
            return torch.full((n,), value, dtype=dtype, device=device)

        self.max_p, self.max_q = row(-math.inf), row(-math.inf)
        self.sum_p, self.sum_q, self.cross = row(0), row(0), row(0)
        self.shift = row(math.nan, torch.float32)  # about the mean of p - q, so that `cross` sums small numbers
        self.top_p, self.top_q = row(-1, torch.int64), row(-1, torch.int64)
        self.true_p, self.true_q = row(math.nan), row(math.nan)

    def add(self, rows: slice, start: int, p: torch.Tensor, q: torch.Tensor) -> None:
        """Logits float32 [rows, k] of both sides for vocabulary start : start + k."""
        if start == 0:
            self.shift[rows] = (p - q).mean(-1)
        difference = (p - q).sub_(self.shift[rows, None])
        top, ids = p.max(-1)
        new = torch.maximum(self.max_p[rows], top)
        old = (self.max_p[rows] - new).exp()
        weight = (p - new.float()[:, None]).exp_()
        self.sum_p[rows] = self.sum_p[rows] * old + weight.sum(-1)
        self.cross[rows] = self.cross[rows] * old + weight.mul_(difference).sum(-1)
        self.top_p[rows] = torch.where(top > self.max_p[rows], ids + start, self.top_p[rows])
        self.max_p[rows] = new
        top, ids = q.max(-1)
        new = torch.maximum(self.max_q[rows], top)
        rest = (q - new.float()[:, None]).exp_().sum(-1)
        self.sum_q[rows] = self.sum_q[rows] * (self.max_q[rows] - new).exp() + rest
        self.top_q[rows] = torch.where(top > self.max_q[rows], ids + start, self.top_q[rows])
        self.max_q[rows] = new
        at = self.targets[rows] - start
        here = ((at >= 0) & (at < p.shape[1])).nonzero().squeeze(1)
        where = here + (rows.start or 0)
        self.true_p[where], self.true_q[where] = p[here, at[here]].double(), q[here, at[here]].double()

    def divergence(self) -> "Divergence":
        """What the sums come to, once every tile of the vocabulary was added."""
        log_p, log_q = self.max_p + self.sum_p.log(), self.max_q + self.sum_q.log()
        true_p, true_q = self.true_p - log_p, self.true_q - log_q
        # Rounding may leave -1e-8 where the two are equal.
        kld = (self.cross / self.sum_p + self.shift - (log_p - log_q)).clamp_min(0)
        values = (-true_q, -true_p, kld, self.top_p == self.top_q, true_q.exp() - true_p.exp())
        return Divergence(*(value.cpu() for value in values))


@dataclass(frozen=True)
class Divergence:
    """Per scored token, on the CPU, [n]: negative log-likelihoods, KLD, same top token, difference in probability."""

    nll: torch.Tensor
    nll_reference: torch.Tensor
    kld: torch.Tensor
    same_top: torch.Tensor
    delta_p: torch.Tensor

    def __getitem__(self, rows: torch.Tensor) -> "Divergence":
        return Divergence(*(getattr(self, field.name)[rows] for field in fields(self)))

    def summary(self, per_chunk: int | None = None) -> dict[str, Any]:
        """The figures that verify.json holds. kld_mean_error and ppl_error are standard errors over tokens, as
        llama-perplexity prints them.

        per_chunk: scored tokens of a chunk; then `ci95` holds 95 % intervals over chunks (tokens of one chunk are not
        independent): Student's t on chunk means, paired for the ratio of perplexities.
        """
        nll, reference, kld = (value.double() for value in (self.nll, self.nll_reference, self.kld))
        n = len(kld)
        ppl, error = _exp(float(nll.mean())), 1 / math.sqrt(max(1, n - 1))
        out = {
            "tokens": n,
            "ppl": ppl,
            "ppl_error": ppl * _std(nll) * error,
            "ppl_reference": _exp(float(reference.mean())),
            "ppl_ratio": _exp(float((nll - reference).mean())),
            "kld_mean": float(kld.mean()),
            "kld_mean_error": _std(kld) * error,
            "kld_median": float(kld.median()),
            "kld_p90": _percentile(kld, 0.9),
            "kld_p99": _percentile(kld, 0.99),
            "kld_max": float(kld.max()),
            "rms_dp": 100 * float(self.delta_p.double().square().mean().sqrt()),
            "top1_agreement": 100 * float(self.same_top.double().mean()),
        }
        if per_chunk is None:
            return out
        return out | {"ci95": self._intervals(per_chunk)}

    def _intervals(self, per_chunk: int) -> dict[str, list[float] | None]:
        def shaped(values: torch.Tensor, shape: Callable[[float], float]) -> list[float] | None:
            found = interval(values, per_chunk)
            return found and [shape(end) for end in found]

        return {
            "ppl": shaped(self.nll, _exp),
            "ppl_ratio": shaped(self.nll - self.nll_reference, _exp),
            "kld_mean": shaped(self.kld, lambda x: max(0.0, x)),
            "rms_dp": shaped(self.delta_p.square(), lambda x: 100 * math.sqrt(max(0.0, x))),
            "top1_agreement": shaped(self.same_top, lambda x: 100 * min(1.0, max(0.0, x))),
        }

    def histogram(self) -> dict[str, list[Any]]:
        """Tokens by log10 of their KLD: `edges` [k + 1] and `counts` [k]; what lies outside is in the end bins."""
        first, last, step = LOG_KLD
        edges = np.arange(first, last + step / 2, step)
        logs = np.clip(np.log10(np.maximum(self.kld.numpy(), 1e-30)), first, last)
        return {"edges": [round(float(edge), 6) for edge in edges], "counts": np.histogram(logs, edges)[0].tolist()}


def interval(values: torch.Tensor, per_chunk: int) -> list[float] | None:
    """The 95 % interval of the mean of values [n] of scored tokens, by the means of their chunks (Student's t); None of
    a single chunk."""
    means = values.double().view(-1, per_chunk).mean(1)
    if len(means) < 2:
        return None
    half = student.quantile(len(means) - 1, 0.975) * float(means.std()) / math.sqrt(len(means))
    return [float(means.mean()) - half, float(means.mean()) + half]


def difference(a: Divergence, b: Divergence, per_chunk: int) -> dict[str, dict[str, Any]]:
    """What b has more than a, of two models on the same tokens: `by`, and `ci95` over chunks, paired, which is narrower
    than that of either. kld: nats a token; top1: points of a hundred; nll: nats a token, the logarithm of the ratio of
    perplexities."""
    pairs = {
        "kld": b.kld - a.kld,
        "top1": 100 * (b.same_top.double() - a.same_top.double()),
        "nll": b.nll - a.nll,
    }
    return {key: {"by": float(v.double().mean()), "ci95": interval(v, per_chunk)} for key, v in pairs.items()}


def _exp(nats: float) -> float:
    """A perplexity, which a broken file may have beyond all numbers: told up to 10^130."""
    return math.exp(min(nats, MOST_NATS))


def _std(values: torch.Tensor) -> float:
    return float(values.std()) if len(values) > 1 else 0.0


def _percentile(values: torch.Tensor, share: float) -> float:
    return float(values.kthvalue(max(1, math.ceil(share * len(values)))).values)


def diverge(
    reference: Logits,
    model: Logits,
    targets: torch.Tensor,
    n_vocab: int,
    progress: Callable[[int], object] | None = None,
) -> Divergence:
    """Divergence of `model` from `reference` for rows whose true next tokens are targets int64 [n].

    Memory: one slab of each output matrix and one tile of logits, whatever n and the vocabulary.
    """
    if not reference.n == model.n == len(targets):
        raise ValueError(f"{reference.n} and {model.n} rows of logits for {len(targets)} targets")
    tally = Tally(targets, reference.device)
    step = max(1, TILE_ELEMENTS // min(VOCAB_SLAB, n_vocab))
    for start in range(0, n_vocab, VOCAB_SLAB):
        stop = min(start + VOCAB_SLAB, n_vocab)
        p, q = reference.slab(start, stop), model.slab(start, stop)
        for begin in range(0, len(targets), step):
            rows = slice(begin, min(begin + step, len(targets)))
            tally.add(rows, start, p(rows), q(rows).to(reference.device))
        if progress:
            progress(stop - start)
    return tally.divergence()


def first_scored(t: int, score: Score = "half") -> int:
    """Position whose next token is the first to be scored: a chunk's middle, as in llama-perplexity, or its BOS."""
    return t // 2 if score == "half" else 0


def scored(hidden: torch.Tensor, score: Score = "half") -> torch.Tensor:
    """Rows of hidden [n_chunk, t, d] whose next token is scored, [n, d]; a chunk's last predicts nothing in it."""
    t = hidden.shape[1]
    return hidden[:, first_scored(t, score) : t - 1].reshape(-1, hidden.shape[-1])


def scored_targets(targets: torch.Tensor, score: Score = "half") -> torch.Tensor:
    """The true tokens that follow those rows, int64 [n]."""
    return targets[:, first_scored(targets.shape[1], score) + 1 :].reshape(-1)
