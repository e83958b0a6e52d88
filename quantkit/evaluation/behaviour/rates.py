"""How often something happened, with intervals, and whether it happens more often than it did to the original."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.evaluation import student

Z = 1.959964  # of a two-sided 95 % interval
WORSE = 1e-3  # probability by chance below which a rate is called worse: about 20 of them are looked at


def wilson(bad: int, n: int) -> tuple[float, float]:
    """95 % interval of a rate (Wilson, JASA 1927)."""
    if not n:
        return 0.0, 1.0
    p, z2 = bad / n, Z * Z
    middle, half = p + z2 / (2 * n), Z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))


def by_chance(bad: int, n: int, bad_reference: int, n_reference: int) -> float:
    """Probability of so many of the bad ones or more among the n, if both had the same rate (Fisher's exact test, one
    side)."""
    both, total = bad + bad_reference, n + n_reference

    def log_comb(a: int, b: int) -> float:
        return math.lgamma(a + 1) - math.lgamma(b + 1) - math.lgamma(a - b + 1)

    whole = log_comb(total, n)
    terms = (
        math.exp(log_comb(both, k) + log_comb(total - both, n - k) - whole)
        for k in range(max(bad, n - (total - both)), min(n, both) + 1)
    )
    return min(1.0, sum(terms))


@dataclass(frozen=True)
class Rate:
    """Of one kind of failure. bad, bad_reference: of n continuations each; None: the original wrote none."""

    what: str
    mode: str
    bad: int
    n: int
    bad_reference: int
    n_reference: int

    @property
    def worse(self) -> bool:
        """Whether chance would hardly do that."""
        return by_chance(self.bad, self.n, self.bad_reference, self.n_reference) < WORSE

    def figures(self) -> dict[str, Any]:
        """For evaluate.json: rates in percent."""
        ours, theirs = wilson(self.bad, self.n), wilson(self.bad_reference, self.n_reference)
        return {
            "what": self.what,
            "mode": self.mode,
            "n": self.n,
            "rate": _percent(self.bad / self.n),
            "ci95": [_percent(edge) for edge in ours],
            "n_reference": self.n_reference,
            "rate_reference": _percent(self.bad_reference / self.n_reference),
            "ci95_reference": [_percent(edge) for edge in theirs],
            "by_chance": by_chance(self.bad, self.n, self.bad_reference, self.n_reference),
            "worse": self.worse,
        }


def _percent(share: float) -> float:
    return round(100 * share, 2)


def paired(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of their mean (Student's t)."""
    n = len(differences)
    if n < 2:
        return None
    mean = sum(differences) / n
    spread = math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    half = student.quantile(n - 1, 0.975) * spread
    return mean - half, mean + half
