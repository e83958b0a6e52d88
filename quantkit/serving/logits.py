"""What a request asks of single tokens: which may come, which end the answer, and how probable each was."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

from quantkit.errors import QuantkitError


class Unanswerable(QuantkitError):
    """What a request asks for leaves no token that could come next."""


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

    def apply(self, logits: torch.Tensor, prompt: Sequence[int], made: Sequence[int]) -> None:
        """To float32 logits [n_vocab], in place."""
        for by, last_n in ((self.repetition, -1), (self.repeat, self.last_n)):
            seen = _last(prompt, made, last_n) if by != 1 else []
            if seen:
                where = torch.tensor(seen, device=logits.device).unique()
                own = logits[where]
                logits[where] = torch.where(own > 0, own / by, own * by)
        if made and (self.frequency or self.presence):
            where, counts = torch.tensor(made, device=logits.device).unique(return_counts=True)
            logits[where] -= self.frequency * counts + self.presence


def _last(prompt: Sequence[int], made: Sequence[int], n: int) -> list[int]:
    if n < 0:
        return [*prompt, *made]
    return [*(prompt[-(n - len(made)) :] if n > len(made) else ()), *(made[-n:] if n else ())]


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

    def apply(
        self, logits: torch.Tensor, prompt: Sequence[int], made: Sequence[int], ends: Sequence[int]
    ) -> torch.Tensor:
        """float32 logits [n_vocab] of the token after `prompt` and `made`, as they are if no rule concerns it, else a
        copy on the CPU."""
        out = set(ends) if self.ignore_eos else set()
        if len(made) < self.n_least:
            out |= {*ends, *self.stop}
        for ids in self.banned:
            if len(made) >= len(ids) - 1 and tuple(made[len(made) - len(ids) + 1 :]) == ids[:-1]:
                out.add(ids[-1])
        out = {token for token in out if 0 <= token < len(logits)}
        if not out and not self.bias and self.penalties.none:
            return logits
        logits = torch.from_numpy(logits.cpu().numpy().copy())  # torch would wake all of its threads for so little
        if self.bias:
            where = torch.tensor(list(self.bias), device=logits.device)
            logits[where] += torch.tensor(list(self.bias.values()), dtype=logits.dtype, device=logits.device)
        self.penalties.apply(logits, prompt, made)
        logits[list(out)] = -torch.inf
        return logits


@dataclass(frozen=True)
class Chance:
    """A token's natural log probability by the model, before any sampling rule (None: nothing stood before it), and
    (id, log probability) of the most probable ones, best first."""

    token: int
    logprob: float | None
    best: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, logits: torch.Tensor, token: int, n_best: int) -> "Chance":
        """From float32 logits [n_vocab]."""
        return cls.each(logits[None], [token], n_best)[0]

    @classmethod
    def each(cls, logits: torch.Tensor, tokens: Sequence[int], n_best: int) -> list["Chance"]:
        """Of several tokens, from float32 logits [n, n_vocab] before each."""
        total = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None]) - total
        values, ids = logits.topk(min(n_best, logits.shape[1]))
        rows = zip(tokens, own[:, 0].tolist(), ids.tolist(), (values - total).tolist(), strict=True)
        return [cls(token, value, tuple(zip(*best, strict=True))) for token, value, *best in rows]
