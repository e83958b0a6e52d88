"""Routed experts of the original checkpoint, an expert at a time: read, dequantized, multiplied, dropped."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby

import torch

from quantkit import ranks
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.freed import return_freed
from quantkit.runtime.products import rounded_up
from quantkit.runtime.swiglu import swiglu
from quantkit.runtime.watch import ExpertVisit, Projections, Watcher
from quantkit.tensors import ROUTED_ROLES


def expert_names(layer: int) -> list[str]:
    """Of the three stacks of a layer's routed experts in a GGUF, in the order of `Projections`."""
    return [f"blk.{layer}.{role}.weight" for role in ROUTED_ROLES]


@dataclass(frozen=True)
class Turns:
    """How the experts of a layer are shared out.

    size: experts that one rank computes, and a watcher sees, together. ahead: experts that are read while one is
    looked at. shared: ranks take turns, so that each reads and watches its own only; else each computes all of them.
    """

    size: int = 1
    ahead: int = 1
    shared: bool = False


ALONE = Turns()


class StreamedExperts:
    """Experts read through a callback; the next ones are read while this one computes.

    Ranks that share them hand each other what comes out. All add it up in the order of experts, as one rank would: sums
    are the same to the bit. limit: as `swiglu` takes it.
    """

    def __init__(
        self, read: Callable[[int], Projections], n_expert: int, turns: Turns = ALONE, limit: float | None = None
    ):
        self.read, self.n_expert, self.turns, self.limit = read, n_expert, turns, limit

    def __call__(
        self,
        x: torch.Tensor,
        expert: torch.Tensor,
        weight: torch.Tensor,
        out: torch.Tensor | None = None,
        watcher: Watcher | None = None,
    ) -> torch.Tensor:
        """As `layers.LayerExperts`. x and out (zeroed here; default float32) may live elsewhere than the weights: rows
        travel as needed."""
        out = torch.zeros(x.shape, device=x.device) if out is None else out.zero_()
        n_ranks, rank = (ranks.count(), ranks.index()) if self.turns.shared else (1, 0)
        if n_ranks > 1:  # devices that round differently must not disagree about who sees which token
            expert, weight = (ranks.spread(t.contiguous(), 0) for t in (expert, weight))
        routes = Routes(expert, weight, self.n_expert)
        turns = [list(turn) for _, turn in groupby(routes.used, lambda e: e // self.turns.size)]
        mine = [e for turn in turns[rank::n_ranks] for e in turn]
        parts = self._compute(mine, x, routes, out.dtype, watcher)
        if n_ranks == 1:
            for e, part in zip(mine, parts, strict=True):
                routes.add(out, e, part)
            return_freed()  # also by a watcher that encoded them
            return out
        for first in range(0, len(turns), n_ranks):
            now = turns[first : first + n_ranks]
            own = torch.cat([next(parts) for _ in now[rank]]) if rank < len(now) else None
            for owner, turn in enumerate(now):
                sizes = [routes.counts[e] for e in turn]
                mine_now = own if owner == rank else None
                rows = weight.new_empty((sum(sizes), x.shape[1]), dtype=out.dtype) if mine_now is None else mine_now
                for e, part in zip(turn, ranks.spread(rows, owner).split(sizes), strict=True):
                    routes.add(out, e, part)
        return out

    def _compute(
        self, experts: list[int], x: torch.Tensor, routes: "Routes", dtype: torch.dtype, watcher: Watcher | None
    ) -> Iterator[torch.Tensor]:
        """Of each of these experts its rows' share of the sum, [m, d] in the dtype of the sum."""
        for e, matrices in zip(experts, read_ahead(self.read, experts, self.turns.ahead), strict=True):
            yield self._expert(e, matrices, x, routes, watcher).to(dtype)

    def _expert(
        self, e: int, matrices: Projections, x: torch.Tensor, routes: "Routes", watcher: Watcher | None
    ) -> torch.Tensor:
        """Its rows' share of the sum, float32 [m, d]."""
        tokens, share = routes.of(e)
        n, down = len(tokens), matrices[-1]
        rows = rounded_up(x[tokens.to(x.device)].to(down.device))
        hidden = inner(rows, matrices, self.limit)
        if watcher is not None:
            watcher.observe_expert(ExpertVisit(e, tokens, rows[:n], hidden[:n], share, matrices))
        return (hidden @ down.T)[:n].float() * share[:, None]


def inner(rows: torch.Tensor, matrices: Projections, limit: float | None) -> torch.Tensor:
    """What goes into an expert's down, [m, n_ff], of rows [m, d] of its input. limit: as `swiglu` has it."""
    gate, up, _ = matrices
    return swiglu(rows @ gate.T, rows @ up.T, limit)


class Routes:
    """Tokens by expert, from expert int64 [n, n_used] and weight float32 [n, n_used].

    counts: tokens of each expert. used: experts that have any.
    """

    def __init__(self, expert: torch.Tensor, weight: torch.Tensor, n_expert: int):
        self.n_used, self.weight = expert.shape[1], weight.flatten()
        slot = torch.argsort(expert.flatten(), stable=True)  # tokens in order within an expert: sums are reproducible
        self.counts: list[int] = torch.bincount(expert.flatten(), minlength=n_expert).tolist()
        self.slots = slot.split(self.counts)
        self.used = [e for e in range(n_expert) if self.counts[e]]

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens int64 [m] of an expert, and how much of its output goes to each, float32 [m]."""
        slots = self.slots[expert]
        return slots // self.n_used, self.weight[slots]

    def add(self, out: torch.Tensor, expert: int, part: torch.Tensor) -> None:
        """part [m, d], an expert's share, to out [n, d]."""
        tokens = self.slots[expert] // self.n_used
        out.index_add_(0, tokens.to(out.device), part.to(out.device))
