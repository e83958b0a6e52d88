"""What a request asks of single tokens: which may come, which end the answer, and how probable each was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from quantkit.errors import QuantkitError

F = np.float32
NOTHING = np.empty(0, np.int64)


class Unanswerable(QuantkitError):
    """What a request asks for leaves no token that could come next."""


class Past:
    """What came before a token: its prompt, and what was made so far, a list that grows. ids: each token once, int64,
    ascending; counts: how often it came in what was made; both as of the last `follow`."""

    def __init__(self, prompt: Sequence[int], made: list[int]):
        self.prompt, self.made, self.n = prompt, made, 0
        self.ids = self.counts = NOTHING

    def follow(self) -> None:
        """What was made since."""
        if not len(self.ids):
            self.ids = np.unique(np.array(self.prompt, np.int64))
            self.counts = np.zeros(len(self.ids), np.int64)
        for token in self.made[self.n :]:
            at = int(np.searchsorted(self.ids, token))
            if at == len(self.ids) or self.ids[at] != token:
                self.ids, self.counts = np.insert(self.ids, at, token), np.insert(self.counts, at, 0)
            self.counts[at] += 1
        self.n = len(self.made)

    def last(self, n: int) -> np.ndarray:
        """The last n tokens (-1: all), each once, int64, ascending."""
        if not 0 <= n < len(self.prompt) + len(self.made):
            return self.ids
        old = self.prompt[len(self.prompt) - max(0, n - len(self.made)) :]
        return np.unique(np.array([*old, *(self.made[-n:] if n else ())], np.int64))


@dataclass(frozen=True)
class Penalties:
    """Against tokens that came already. frequency, presence: subtracted from the logits of the answer's tokens, for
    each time, and once (OpenAI's, vLLM's). repetition: divides positive logits of tokens of prompt and answer, and
    multiplies negative ones (Keskar et al., CTRL, 2019; vLLM's name); repeat: the same for the last `last_n` tokens
    (-1: all; llama-server's name)."""

    frequency: float = 0.0
    presence: float = 0.0
    repetition: float = 1.0
    repeat: float = 1.0
    last_n: int = 64

    @property
    def none(self) -> bool:
        """Whether they change nothing."""
        return not (self.frequency or self.presence) and self.repetition == self.repeat == 1

    def apply(self, ids: np.ndarray, logits: np.ndarray, past: Past) -> None:
        """To the float32 logits [k] of tokens int64 [k], ascending, in place; those of `touched` are among them."""
        for by, last_n in ((self.repetition, -1), (self.repeat, self.last_n)):
            if by != 1:
                where = np.searchsorted(ids, past.last(last_n))
                own = logits[where]
                logits[where] = np.where(own > 0, own / F(by), own * F(by))
        if self.frequency or self.presence:
            came = past.counts > 0
            where = np.searchsorted(ids, past.ids[came])
            logits[where] -= (self.frequency * past.counts[came] + self.presence).astype(F)

    def touched(self, past: Past) -> np.ndarray:
        """Tokens that have other logits, ascending: int64."""
        if self.repetition != 1 or self.frequency or self.presence:
            return past.ids
        return past.last(self.last_n) if self.repeat != 1 else NOTHING


@dataclass(frozen=True)
class TokenRules:
    """stop: ids that end the answer as EOS does. ignore_eos: EOS never comes. n_least: before so many tokens nothing
    ends the answer. bias: added to logits, by id. banned: sequences of ids that never are completed. n_logprobs: note
    each token's log probability and those of so many most probable ones (None: nothing); of_prompt: the prompt's too,
    and EOS's if it ends the answer."""

    stop: frozenset[int] = frozenset()
    ignore_eos: bool = False
    n_least: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: tuple[tuple[int, ...], ...] = ()
    n_logprobs: int | None = None
    of_prompt: bool = False
    penalties: Penalties = Penalties()

    @cached_property
    def biased(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64, ascending, and what is added to their logits, float32."""
        ids = np.array(sorted(self.bias), np.int64)
        return ids, np.array([self.bias[i] for i in ids.tolist()], F)

    def edits(self, logits: np.ndarray, past: Past, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [k]) that have other logits (float32 [k]) than those of the model, float32 [n_vocab], after
        what came before."""
        out = self._out(past.made, ends, len(logits))
        ids, added = self.biased
        if self.penalties.none:  # what is banned comes last
            return np.concatenate((ids, out)), np.concatenate((logits[ids] + added, np.full(len(out), -np.inf, F)))
        past.follow()
        ids = np.unique(np.concatenate((ids, self.penalties.touched(past), out)))
        own = logits[ids]
        own[np.searchsorted(ids, self.biased[0])] += added
        self.penalties.apply(ids, own, past)
        own[np.searchsorted(ids, out)] = -np.inf
        return ids, own

    def _out(self, made: Sequence[int], ends: Sequence[int], n_vocab: int) -> np.ndarray:
        """Tokens that must not come now."""
        if not (self.ignore_eos or self.banned or len(made) < self.n_least):
            return NOTHING
        out = set(ends) if self.ignore_eos else set()
        if len(made) < self.n_least:
            out |= {*ends, *self.stop}
        for ids in self.banned:
            if len(made) >= len(ids) - 1 and tuple(made[len(made) - len(ids) + 1 :]) == ids[:-1]:
                out.add(ids[-1])
        return np.array([token for token in out if 0 <= token < n_vocab], np.int64)


@dataclass(frozen=True)
class Chance:
    """A token's natural log probability by the model, before any sampling rule (None: nothing stood before it), and
    (id, log probability) of the most probable ones, best first."""

    token: int
    logprob: float | None
    best: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, n_best: int, total: float) -> "Chance":
        """From float32 logits [n_vocab]. total: the natural logarithm of the sum of their exponentials."""
        values, ids = logits.topk(min(n_best, len(logits)))
        best = zip(ids.tolist(), (values.double() - total).tolist(), strict=True)
        return cls(token, float(logits[token]) - total, tuple(best))

    @classmethod
    def each(cls, logits: torch.Tensor, tokens: Sequence[int], n_best: int) -> list["Chance"]:
        """Of several tokens, from float32 logits [n, n_vocab] before each."""
        total = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
        values, ids = logits.topk(min(n_best, logits.shape[1]))
        rows = zip(tokens, own[:, 0].tolist(), ids.tolist(), (values - total).tolist(), strict=True)
        return [cls(token, value, tuple(zip(*best, strict=True))) for token, value, *best in rows]
