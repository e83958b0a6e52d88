"""A sequence to continue: what was asked for, and what became of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.runtime.generate import Ask, Dice, NoneLeft, Sampling
from quantkit.serving.grammar import Constraint
from quantkit.serving.logits import Chance, Past, TokenRules, Unanswerable

NO_TOKEN = "no token continues the answer: what else the request asks for contradicts its format"

Emit = Callable[[int | None, str | None], None]
"""Called in the scheduler's thread: (token, None) for each new token, then once (None, why it ended): `stop` (EOS),
`length`, `cancelled`, `refused` (by what the request asks for; `Job.refusal` says why) or `error`."""


@dataclass(eq=False)
class Job:
    """One sequence to continue. prompt: token ids with BOS; at most n_tokens new ones (0: it is only read). made: those
    so far, with their chances if the rules ask for them, both complete before a token is emitted. heard: chances of
    the prompt's second token and all that follow, ended: of the EOS that ended the answer, if the rules ask for them.
    reuse: whether it may begin with what a slot holds of its prompt already, and others with what it leaves; reused: so
    many tokens.
    """

    prompt: list[int]
    n_tokens: int
    how: Sampling
    emit: Emit
    rules: TokenRules = field(default_factory=TokenRules)
    cancelled: bool = False
    slot: int = -1
    done: int = 0  # prompt tokens in the cache
    made: list[int] = field(default_factory=list)
    chances: list[Chance] = field(default_factory=list)
    heard: list[Chance] = field(default_factory=list)
    ended: list[Chance] = field(default_factory=list)
    constraint: Constraint | None = None
    reuse: bool = False
    reused: int = 0
    refusal: str = ""

    def __post_init__(self) -> None:
        self.dice, self.past = Dice(self.how.seed), Past(self.prompt, self.made)

    @property
    def reuses(self) -> bool:
        """Whether tokens that a slot holds need not be computed; their log probabilities would be missing."""
        return self.reuse and not self.rules.of_prompt

    @property
    def n_made(self) -> int:
        """New tokens so far."""
        return len(self.made)

    @property
    def left(self) -> int:
        """Prompt tokens that are not in the cache."""
        return len(self.prompt) - self.done

    def hear(self, logits: torch.Tensor) -> None:
        """As `generate.Each`."""
        begin = len(self.heard) + 1
        following = self.prompt[begin : begin + len(logits)]  # the prompt's last token has none
        self.heard += Chance.each(logits[: len(following)], following, self.rules.n_logprobs or 0)

    def ask(self, logits: np.ndarray, ends: Sequence[int]) -> Ask:
        """What the next token is drawn by, from the model's float32 logits [n_vocab]."""
        allowed = self.constraint.allowed(len(logits)) if self.constraint else None
        uniform = 0.0 if self.how.greedy else self.dice.throw()
        return Ask(self.how, uniform, *self.rules.edits(logits, self.past, ends), allowed)

    def took(self, token: int | QuantkitError, ends: Sequence[int]) -> tuple[int, bool]:
        """The token that was drawn, and whether it ends the answer; raises why there is none."""
        if isinstance(token, NoneLeft):
            banned = f"{token}: what the request bans is the whole vocabulary"
            raise Unanswerable(banned if self.constraint is None else NO_TOKEN)
        if isinstance(token, QuantkitError):
            raise token
        if self.constraint is not None:
            self.constraint.take(token)
        return token, token in ends or token in self.rules.stop


class Drawn(NamedTuple):
    """A token. last: it ends the answer, and is not part of it."""

    token: int
    last: bool
    chance: Chance | None
