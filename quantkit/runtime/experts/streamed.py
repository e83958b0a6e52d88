"""Routed experts of the original checkpoint, an expert at a time: read, dequantized, multiplied, dropped."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F

from quantkit import ranks
from quantkit.runtime.ahead import read_ahead

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [n_ff, d], up [n_ff, d], down [d, n_ff]."""
PARTS = ("gate", "up", "down")


def expert_names(layer: int) -> list[str]:
    """Of the three stacks of a layer's routed experts in a GGUF, in the order of `Projections`."""
    return [f"blk.{layer}.ffn_{part}_exps.weight" for part in PARTS]


@dataclass
class ExpertVisit:
    """What one expert saw: tokens int64 [m], x [m, d], hidden [m, n_ff] (input of down), routing weight float32 [m],
    and its matrices, which are gone after the visit."""

    expert: int
    tokens: torch.Tensor
    x: torch.Tensor
    hidden: torch.Tensor
    weight: torch.Tensor
    matrices: Projections


class StreamedExperts:
    """Experts read through a callback; the next ones (`ahead` of them) are read while this one computes.

    shared: ranks take turns with blocks of `block` experts, so that each reads and observes its own only, and hand each
    other what comes out. All add it up in the order of experts, as one rank would: sums are the same to the bit.
    """

    def __init__(self, read: Callable[[int], Projections], n_expert: int):
        self.read = read
        self.n_expert, self.ahead = n_expert, 1
        self.observe: Callable[[ExpertVisit], None] | None = None
        self.shared, self.block = False, 1

    def __call__(
        self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x and out (zeroed here; default float32) may live elsewhere than the weights: rows travel as needed."""
        out = torch.zeros(x.shape, device=x.device) if out is None else out.zero_()
        n_ranks, rank = (ranks.count(), ranks.index()) if self.shared else (1, 0)
        if n_ranks > 1:  # devices that round differently must not disagree about who sees which token
            expert, weight = (ranks.spread(t.contiguous(), 0) for t in (expert, weight))
        slot = torch.argsort(expert.flatten(), stable=True)  # tokens in order within an expert: sums are reproducible
        counts = torch.bincount(expert.flatten(), minlength=self.n_expert).tolist()
        slots = slot.split(counts)
        used = [e for e in range(self.n_expert) if counts[e]]
        blocks = [list(block) for _, block in groupby(used, lambda e: e // self.block)]
        mine = [e for block in blocks[rank::n_ranks] for e in block]
        visits = zip(mine, read_ahead(self.read, mine, self.ahead), strict=True)

        def add(e: int, part: torch.Tensor) -> None:
            tokens = slots[e] // expert.shape[1]
            out.index_add_(0, tokens.to(out.device), part.to(out.device))

        def compute() -> torch.Tensor:
            """Of the next expert of this rank: its rows' share of the sum, in the dtype of the sum."""
            e, (gate, up, down) = next(visits)
            tokens = slots[e] // expert.shape[1]
            rows, share = x[tokens.to(x.device)].to(gate.device), weight.flatten()[slots[e]]
            hidden = F.silu(rows @ gate.T) * (rows @ up.T)
            if self.observe:
                self.observe(ExpertVisit(e, tokens, rows, hidden, share, (gate, up, down)))
            return ((hidden @ down.T).float() * share[:, None]).to(out.dtype)

        for first in range(0, len(blocks), n_ranks):
            turn = blocks[first : first + n_ranks]
            if n_ranks == 1:
                for e in turn[0]:
                    add(e, compute())
                continue
            mine = torch.cat([compute() for _ in turn[rank]]) if rank < len(turn) else None
            for owner, block in enumerate(turn):
                sizes = [counts[e] for e in block]
                empty = mine is None or owner != rank
                rows = weight.new_empty((sum(sizes), x.shape[1]), dtype=out.dtype) if empty else mine
                for e, part in zip(block, ranks.spread(rows, owner).split(sizes), strict=True):
                    add(e, part)
        return out
