"""What a request asks of single tokens: which may come, which end the answer, and how probable each was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class TokenRules:
    """stop: ids that end the answer as EOS does. ignore_eos: EOS never comes. n_least: before so many tokens nothing
    ends the answer. bias: added to logits, by id. banned: sequences of ids that never are completed. n_logprobs: note
    each token's log probability and those of so many most probable ones (None: nothing)."""

    stop: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n_least: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: tuple[tuple[int, ...], ...] = ()
    n_logprobs: int | None = None

    def apply(self, logits: torch.Tensor, made: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
        """float32 logits [n_vocab] of the token after `made`, as they are if no rule concerns it."""
        out = set(ends) if self.ignore_eos else set()
        if len(made) < self.n_least:
            out |= {*ends, *self.stop}
        for ids in self.banned:
            if len(made) >= len(ids) - 1 and tuple(made[len(made) - len(ids) + 1 :]) == ids[:-1]:
                out.add(ids[-1])
        out = {token for token in out if 0 <= token < len(logits)}
        if not out and not self.bias:
            return logits
        logits = logits.clone()
        if self.bias:
            where = torch.tensor(list(self.bias), device=logits.device)
            logits[where] += torch.tensor(list(self.bias.values()), dtype=logits.dtype, device=logits.device)
        logits[list(out)] = -torch.inf
        return logits


@dataclass(frozen=True)
class Chance:
    """A token's natural log probability by the model, before any sampling rule, and (id, log probability) of the most
    probable ones, best first."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, n_best: int) -> "Chance":
        """From float32 logits [n_vocab]."""
        logprobs = logits.log_softmax(-1)
        values, ids = logprobs.topk(min(n_best, len(logits)))
        return cls(token, float(logprobs[token]), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
