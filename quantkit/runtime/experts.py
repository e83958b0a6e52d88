"""Routed experts of the original checkpoint, an expert at a time: read, dequantized, multiplied, dropped."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F

Projections = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""gate [n_ff, d], up [n_ff, d], down [d, n_ff]."""


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
    """Experts read through a callback; the next expert is read while this one computes."""

    def __init__(self, read: Callable[[int], Projections], n_expert: int):
        self.read = read
        self.n_expert = n_expert
        self.observe: Callable[[ExpertVisit], None] | None = None

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor,
                 out: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
        """x and out (zeroed here; default float32) may live elsewhere than the weights: rows travel as needed."""
        out = torch.zeros(x.shape, device=x.device) if out is None else out.zero_()
        slot = torch.argsort(expert.flatten(), stable=True)  # tokens in order within an expert: sums are reproducible
        counts = torch.bincount(expert.flatten(), minlength=self.n_expert)
        bounds = [0, *counts.cumsum(0).tolist()]
        used = [e for e in range(self.n_expert) if bounds[e + 1] > bounds[e]]
        for e, (gate, up, down) in self._prefetched(used):
            mine = slot[bounds[e] : bounds[e + 1]]
            tokens = mine // expert.shape[1]
            rows, share = x[tokens.to(x.device)].to(gate.device), weight.flatten()[mine]
            hidden = F.silu(rows @ gate.T) * (rows @ up.T)
            if self.observe:
                self.observe(ExpertVisit(e, tokens, rows, hidden, share, (gate, up, down)))
            part = ((hidden @ down.T).float() * share[:, None]).to(out.dtype)
            out.index_add_(0, tokens.to(out.device), part.to(out.device))
        return out

    def _prefetched(self, experts: list[int]) -> Iterator[tuple[int, Projections]]:
        with ThreadPoolExecutor(1) as reader:
            ahead: Future | None = reader.submit(self.read, experts[0]) if experts else None
            for e, following in zip(experts, [*experts[1:], None], strict=True):
                weights = ahead.result()
                ahead = reader.submit(self.read, following) if following is not None else None
                yield e, weights
