"""The bit budget: one type per tensor, minimising predicted damage under limits on bytes. Pure arithmetic.

A multiple-choice knapsack. `allocate` walks the lower convex hulls of all tensors in the order of damage saved per
byte, which solves its linear relaxation exactly (Sinha and Zoltners 1979) and so gives the bound, then spends what is
left by exchanges. It says how far from the bound it is.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from quantkit.errors import QuantkitError

SOLVER = "lagrange"  # as plans record it


@dataclass(frozen=True)
class Option:
    """One type of one tensor. n_bytes: with padding. damage: predicted KL divergence at the output, nats a token."""

    qtype: str
    n_bytes: int
    damage: float


@dataclass(frozen=True)
class Item:
    """A tensor that a type is sought for. resident: it counts under the inner limit as well (what stays on the GPU)."""

    name: str
    options: tuple[Option, ...]
    resident: bool = False


@dataclass(frozen=True)
class Limits:
    """Bytes for all items together, and for the resident ones among them (None: no limit of their own)."""

    total: int
    resident: int | None = None


@dataclass(frozen=True)
class Allocation:
    """types: tensor -> qtype. damage: their sum. bound: no choice within the limits has less than this."""

    types: dict[str, str]
    n_bytes: int
    damage: float
    bound: float

    @property
    def gap(self) -> float:
        """How much less damage could be possible at most, as a share; 0 is optimal."""
        return max(0.0, self.damage - self.bound) / self.damage if self.damage > 0 else 0.0


class Infeasible(QuantkitError):
    """Even the smallest types do not fit. smallest: bytes that would."""

    def __init__(self, smallest: int, limit: int, what: str):
        super().__init__(f"{what}: the smallest types need {smallest:,} bytes, the limit is {limit:,}")
        self.smallest, self.limit, self.what = smallest, limit, what


def allocate(items: Sequence[Item], limits: Limits) -> Allocation:
    """The types with the least damage. Infeasible if the smallest ones do not fit."""
    resident = [item for item in items if item.resident]
    if limits.resident is not None:
        _check(resident, limits.resident, "tensors that stay on the GPU")
    _check(items, limits.total, "all tensors")
    whole = _lagrange(items, limits.total)
    if limits.resident is None or _bytes(resident, whole.types) <= limits.resident:
        return whole
    # Damage is convex along the hulls: if the free optimum breaks the inner limit, the optimum lies on that limit.
    inner = _lagrange(resident, limits.resident)
    outer = _lagrange([item for item in items if not item.resident], limits.total - inner.n_bytes)
    damage, bound = inner.damage + outer.damage, inner.bound + outer.bound
    return Allocation(inner.types | outer.types, inner.n_bytes + outer.n_bytes, damage, bound)


def pareto(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in both bytes and damage, fewest bytes first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (o.n_bytes, o.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept


def hull(options: Sequence[Option]) -> list[Option]:
    """The Pareto options on the lower convex hull: damage saved per byte falls from step to step."""
    kept: list[Option] = []
    for option in pareto(options):
        while len(kept) > 1 and _slope(kept[-2], kept[-1]) <= _slope(kept[-1], option):
            kept.pop()
        kept.append(option)
    return kept


def _slope(a: Option, b: Option) -> float:
    """Damage saved per byte from a to b."""
    return (a.damage - b.damage) / (b.n_bytes - a.n_bytes)


def _check(items: Sequence[Item], limit: int, what: str) -> None:
    smallest = sum(min(option.n_bytes for option in item.options) for item in items)
    if smallest > limit:
        raise Infeasible(smallest, limit, what)


def _bytes(items: Sequence[Item], types: dict[str, str]) -> int:
    return sum(o.n_bytes for item in items for o in item.options if o.qtype == types[item.name])


def _lagrange(items: Sequence[Item], limit: int) -> Allocation:
    choices = [pareto(item.options) for item in items]
    picked = [0] * len(items)
    left = limit - sum(options[0].n_bytes for options in choices)
    bound = None
    stopped: set[int] = set()
    for slope, i, rank, n_bytes in _steps(choices):
        if i in stopped:
            continue
        if n_bytes > left:
            if bound is None:  # the relaxation takes a fraction of this step, and is full
                bound = _damage(choices, picked) - slope * left
            stopped.add(i)
            continue
        picked[i], left = rank, left - n_bytes
    _exchange(choices, picked, left)
    damage = _damage(choices, picked)
    types = {item.name: options[p].qtype for item, options, p in zip(items, choices, picked, strict=True)}
    n_bytes = sum(options[p].n_bytes for options, p in zip(choices, picked, strict=True))
    return Allocation(types, n_bytes, damage, damage if bound is None else min(damage, bound))


def _steps(choices: Sequence[Sequence[Option]]) -> list[tuple[float, int, int, int]]:
    """Steps along all hulls, best first: damage saved per byte, tensor, rank of the option reached, bytes. Equal steps
    go to the earlier tensor."""
    steps = []
    for i, options in enumerate(choices):
        rank = {option: r for r, option in enumerate(options)}
        steps += [(_slope(a, b), i, rank[b], b.n_bytes - a.n_bytes) for a, b in pairwise(hull(options))]
    return sorted(steps, key=lambda step: (-step[0], step[1], step[2]))


def _damage(choices: Sequence[Sequence[Option]], picked: Sequence[int]) -> float:
    return sum(options[p].damage for options, p in zip(choices, picked, strict=True))


def _exchange(choices: Sequence[Sequence[Option]], picked: list[int], left: int) -> None:
    """Better use of the last bytes: raise one tensor, or lower one and raise another, while damage falls."""
    while True:
        moves = list(_moves(choices, picked))
        single = min((m for m in moves if m[2] <= left and m[3] < 0), key=lambda m: (m[3], m[2], m[0]), default=None)
        best: Better | None = (single[3], single[2], (single,)) if single else None
        pair = _best_pair(moves, left)
        if pair and (best is None or pair[0] < best[0]):
            best = pair
        if best is None:
            return
        left -= best[1]
        for i, rank, _, _ in best[2]:
            picked[i] = rank


Move = tuple[int, int, int, float]  # item, rank of its new option, change of bytes, change of damage
Better = tuple[float, int, tuple[Move, ...]]  # change of damage, change of bytes, the moves


def _moves(choices: Sequence[Sequence[Option]], picked: Sequence[int]) -> Iterator[Move]:
    for i, options in enumerate(choices):
        now = options[picked[i]]
        for rank, option in enumerate(options):
            if rank != picked[i]:
                yield i, rank, option.n_bytes - now.n_bytes, option.damage - now.damage


def _best_pair(moves: Sequence[Move], left: int) -> Better | None:
    """The lowering and the raising that together save most and fit; the raisings are sorted by bytes, with the best
    of every prefix for two different tensors (the lowered one may be one of them)."""
    raising = sorted((m for m in moves if m[2] > 0), key=lambda m: (m[2], m[3]))
    sizes = [m[2] for m in raising]
    prefix: list[tuple[Move, Move | None]] = []
    first: Move | None = None
    second: Move | None = None
    for move in raising:
        if first is None or move[3] < first[3]:
            if first is not None and first[0] != move[0]:
                second = first
            first = move
        elif move[0] != first[0] and (second is None or move[3] < second[3]):
            second = move
        prefix.append((first, second))
    best: Better | None = None
    for lower in (m for m in moves if m[2] < 0):
        at = bisect_right(sizes, left - lower[2]) - 1
        if at < 0:
            continue
        upper = next((m for m in prefix[at] if m is not None and m[0] != lower[0]), None)
        if upper is None:
            continue
        saved = lower[3] + upper[3]
        if saved < -1e-15 and (best is None or saved < best[0]):
            best = saved, lower[2] + upper[2], (lower, upper)
    return best
