"""How well calibration reached the routed experts, and what to do about those that it hardly reached."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.progress import say
from quantkit.tensors import ROUTED_ROLES, Importance, split_name

FEW, PLENTY = 1.0, 5.0  # tokens for each dimension of an expert's input (docs/results/encoders.md)


@dataclass(frozen=True)
class LayerCoverage:
    """Tokens that reached the experts of one layer. below: experts with fewer than the threshold. per_dim: tokens of
    the median expert for each dimension of gate and up's input; what error feedback learns depends on it."""

    layer: int
    least: int
    median: int
    most: int
    below: int
    per_dim: float


def coverage(imatrix: Mapping[str, Importance], threshold: int) -> list[LayerCoverage]:
    """One row per MoE layer, in order."""
    rows = []
    for name, entry in imatrix.items():
        role, layer = split_name(name)
        if role == ROUTED_ROLES[0] and layer is not None:
            counts, n_in = entry.counts, entry.in_sum2.shape[-1]
            median = float(np.median(counts))
            few = int((counts < threshold).sum())
            rows.append(LayerCoverage(layer, int(counts.min()), int(median), int(counts.max()), few, median / n_in))
    return sorted(rows, key=lambda row: row.layer)


def table(rows: list[LayerCoverage]) -> str:
    """The coverage table that `calibrate` prints."""
    head = f"{'layer':>5} {'fewest':>8} {'median':>8} {'most':>8} {'below':>6} {'per dim':>8}   tokens per expert"
    lines = (f"{r.layer:>5} {r.least:>8,} {r.median:>8,} {r.most:>8,} {r.below:>6} {r.per_dim:>8.1f}" for r in rows)
    return "\n".join([head, *lines])


def verdict(rows: list[LayerCoverage], n_tokens: int) -> str:
    """Whether so many tokens are enough for our encoders, and how many would be."""
    least = min(row.per_dim for row in rows)
    if least >= PLENTY:
        return f"{least:.1f} tokens for each dimension of an expert's input: plenty"
    more = math.ceil(n_tokens * PLENTY / max(least, PLENTY / 1000))
    what = "few" if least < FEW else "enough"
    return f"{least:.1f} tokens for each dimension of an expert's input: {what}; better up to about --tokens {more}"


def tokens_needed(rows: list[LayerCoverage], n_tokens: int, threshold: int) -> int:
    """Tokens with which the least used expert would likely reach the threshold, its share staying what it was.

    An expert that was never seen is taken to have been just missed (one token).
    """
    least = min((row.least for row in rows), default=threshold)
    return n_tokens if least >= threshold else math.ceil(n_tokens * threshold / max(1, least))


def report(imatrix: Mapping[str, Importance], n_tokens: int, threshold: int) -> None:
    """Say the coverage table, and a warning if experts fell short."""
    rows = coverage(imatrix, threshold)
    if not rows:
        return
    say(table(rows))
    say(verdict(rows, n_tokens))
    if short := sum(row.below for row in rows):
        needed = tokens_needed(rows, n_tokens, threshold)
        say(
            f"warning: {short} experts saw fewer than {threshold} tokens; they lean on their layer's mean statistics. "
            f"About {needed:,} tokens would reach them all (--tokens {needed})"
        )


def check_finite(imatrix: Mapping[str, Importance]) -> None:
    """QuantkitError naming the weight: one layer whose inputs overflow spoils all that follow."""
    for name, entry in imatrix.items():
        if not np.isfinite(entry.in_sum2).all():
            raise QuantkitError(
                f"{name}: inputs that are not finite, or too large to add up, reach this weight; the "
                "checkpoint's layers before it are damaged, or the text holds what the model cannot "
                "compute"
            )


def shrink(imatrix: Mapping[str, Importance], threshold: int) -> dict[str, Importance]:
    """Experts with fewer than `threshold` tokens are filled up to it with tokens of the layer's mean statistics.

    in_sum2 and counts stay those of so many tokens, so any reader of the imatrix sees the blend; llama-quantize would
    give an unseen expert ones. Experts above the threshold are untouched. QuantkitError if a sum is not finite.
    """
    out = dict(imatrix)
    for name, entry in imatrix.items():
        if not name.endswith(tuple(f".{role}.weight" for role in ROUTED_ROLES)) or not entry.counts.sum():
            continue
        missing = np.maximum(0, threshold - entry.counts).astype(np.float32)
        mean = entry.in_sum2.sum(0, dtype=np.float64) / entry.counts.sum(dtype=np.float64)
        with np.errstate(all="ignore"):  # the check below names the weight
            sums = entry.in_sum2 + missing[:, None] * mean.astype(np.float32)
        out[name] = Importance(sums, entry.counts + missing)
    check_finite(out)
    return out


def merge(first: Mapping[str, Importance], second: Mapping[str, Importance]) -> dict[str, Importance]:
    """Statistics of two disjoint texts together: sums and counts add."""
    return {
        name: Importance(first[name].in_sum2 + second[name].in_sum2, first[name].counts + second[name].counts)
        for name in first
    }
