"""What a request asks of single tokens: which may come, which end the answer, and how probable each was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from quantkit.errors import QuantkitError

F = np.float32
NOTHING = np.empty(0, np.int64)
BLOCK = 256
ROOM = 256  # tokens for which room is made at once


class Unanswerable(QuantkitError):
    """What a request asks for leaves no token that could come next."""


class Past:
    """What came before a token: its prompt, and what was made so far, a list that grows. at: where each token that came
    stands in `ids`; all as of the last `follow`."""

    def __init__(self, prompt: Sequence[int], made: list[int]):
        self.prompt, self.made, self.n = prompt, made, -1
        self.at = dict[int, int]()
        self._ids = self._counts = NOTHING

    def follow(self) -> None:
        """What was made since."""
        if self.n < 0:
            self.n, self._ids = 0, np.unique(np.array(self.prompt, np.int64))
            self._counts = np.zeros(len(self._ids), np.int64)
            self.at = {token: i for i, token in enumerate(self._ids.tolist())}
        for token in self.made[self.n :]:
            i = self.at.setdefault(token, len(self.at))
            if i == len(self._ids):
                more = np.zeros(ROOM, np.int64)
                self._ids, self._counts = np.concatenate((self._ids, more)), np.concatenate((self._counts, more))
            self._ids[i] = token
            self._counts[i] += 1
        self.n = len(self.made)

    @property
    def ids(self) -> np.ndarray:
        """Each token that came, once: int64."""
        return self._ids[: len(self.at)]

    @property
    def counts(self) -> np.ndarray:
        """How often each of them was made: int64."""
        return self._counts[: len(self.at)]

    def last(self, n: int) -> np.ndarray:
        """Where the last n tokens (-1: all) stand, each once: int64."""
        if not 0 <= n < len(self.prompt) + len(self.made):
            return np.arange(len(self.at))
        old = self.prompt[len(self.prompt) - max(0, n - len(self.made)) :]
        return np.array([self.at[token] for token in {*old, *(self.made[-n:] if n else ())}], np.int64)


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

    def apply(self, logits: np.ndarray, past: Past) -> None:
        """To the float32 logits [k] of the past's tokens, in place."""
        for by, last_n in ((self.repetition, -1), (self.repeat, self.last_n)):
            if by != 1:
                where = past.last(last_n)
                own = logits[where]
                logits[where] = np.where(own > 0, own / F(by), own * F(by))
        if self.frequency or self.presence:
            logits -= (self.frequency * past.counts + self.presence * (past.counts > 0)).astype(F)


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
        """Ids int64, and what is added to their logits, float32."""
        return np.array(list(self.bias), np.int64), np.array(list(self.bias.values()), F)

    def edits(self, logits: np.ndarray, past: Past, ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int64 [k]) that have other logits (float32 [k]) than those of the model, float32 [n_vocab], after
        what came before."""
        out = self._out(past.made, ends, len(logits))
        ids, added = self.biased
        values = logits[ids] + added
        if not self.penalties.none:
            past.follow()
            own, at = logits[past.ids], np.array([past.at.get(token, -1) for token in self.bias], np.int64)
            came = at >= 0
            own[at[came]] = values[came]
            self.penalties.apply(own, past)
            ids, values = np.concatenate((past.ids, ids[~came])), np.concatenate((own, values[~came]))
        return np.concatenate((ids, out)), np.concatenate((values, np.full(len(out), -np.inf, F)))  # bans come last

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
    def of(cls, logits: np.ndarray, token: int, n_best: int, total: float) -> "Chance":
        """From float32 logits [n_vocab]. total: the natural logarithm of the sum of their exponentials."""
        ids = likeliest(logits, n_best)
        best = zip(ids.tolist(), (logits[ids].astype(np.float64) - total).tolist(), strict=True)
        return cls(token, float(logits[token]) - total, tuple(best))

    @classmethod
    def each(cls, logits: torch.Tensor, tokens: Sequence[int], n_best: int) -> list["Chance"]:
        """Of several tokens, from float32 logits [n, n_vocab] before each."""
        total = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
        values, ids = logits.topk(min(n_best, logits.shape[1]))
        rows = zip(tokens, own[:, 0].tolist(), ids.tolist(), (values - total).tolist(), strict=True)
        return [cls(token, value, tuple(zip(*best, strict=True))) for token, value, *best in rows]


def likeliest(logits: np.ndarray, n: int) -> np.ndarray:
    """Ids int64 of the n largest of float32 logits [n_vocab], the largest first. (n blocks have something as large as
    the n-th of their maxima: nothing below that need be sorted.)"""
    n_blocks = len(logits) // BLOCK
    if not n:
        return NOTHING
    if n >= n_blocks:
        return np.argsort(-logits, kind="stable")[:n]
    maxima = logits[: n_blocks * BLOCK].reshape(n_blocks, BLOCK).max(1)
    ids = np.flatnonzero(logits >= np.partition(maxima, -n)[-n])
    return ids[np.argsort(-logits[ids], kind="stable")[:n]]
