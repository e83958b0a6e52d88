"""Token by token: what an engine does, sampling, and the loop over both."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.runtime.bounds import BOUNDS, check

PROMPT_TOKENS = 512  # of one prompt that engines in torch compute at once
ROWS_TOLD = 64  # of a prompt whose logits are there at once: 33 MB with R1's vocabulary
HEADS = (2.0**-8, 2.0**-14, 0.0)  # of the most probable token: how probable those are that are sorted for top_p
DRAWN_TOGETHER = 1024  # tokens whose probabilities are summed before one of them is looked for
LEAST_PIECE, LEAST_REACH = 64, 512  # tokens, positions: shorter pieces are no faster
GREEDY_BELOW = 1e-5  # a temperature; what logits divided by it would be is beyond float32, or nearly
AHEAD = 32  # random numbers that are drawn at once: torch takes 5 µs for one
NONE_LEFT = "no token is left"
NOT_FINITE = "the logits are no finite numbers: nothing can be drawn from them"

Each = Callable[[torch.Tensor], None]
"""Told float32 logits [k, n_vocab] of a prompt's tokens, in order, ROWS_TOLD at most, valid until it returns."""


class Engine(Protocol):
    """A way to compute a model: n_slots sequences, each with a cache of its own for `capacity` tokens. Calls come from
    one thread at a time. piece: most tokens that `prefill` takes."""

    config: ModelConfig
    n_slots: int
    capacity: int
    piece: int

    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """Put tokens at positions begin, begin + 1, ... of a slot, forgetting what stood from there on; returns the
        last one's float32 logits [n_vocab], valid until the next call. each: is told those of all of them."""

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """Add one token to each of several slots, all in one step: float32 logits [n, n_vocab], valid until the next
        call."""


class Piece(NamedTuple):
    """Some of a prompt, as `Engine.prefill` takes it."""

    slot: int
    tokens: list[int]
    begin: int
    each: Each | None = None


@runtime_checkable
class Together(Protocol):
    """What engines can also do whose results depend on what is computed beside them by rounding anyway: read the bytes
    of experts once for several prompts."""

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As `Engine.prefill` of each piece, all of different slots, `Engine.piece` tokens at most in all: float32
        logits [n, n_vocab]."""

    def begin_here(self) -> None:
        """This thread will read the prompts: what libraries keep for each thread is made now, not while others wait."""


Opener = Callable[[int], Engine]
"""An engine for one sequence of at most so many tokens."""


def piece_at(engine: Engine, begin: int) -> int:
    """Tokens of a prompt that are computed at once from a position on. Attention takes most of the time beyond `reach`;
    there a piece is shorter by as much as it looks further back, so that others wait for it equally long wherever it
    stands. A function of the position alone: nobody's bits depend on who else is served."""
    n, far = engine.piece, reach(engine.config)
    while n > LEAST_PIECE and n * begin > engine.piece * far:
        n //= 2
    return n


def reach(config: ModelConfig) -> int:
    """Positions that a token looks back at in about the time of all that does not grow with them, by the number of
    multiplications: 4,269 for R1. Attention's own matrices count as half of the experts'."""
    experts = 3 * config.d * config.n_ff_exp * (config.n_used + config.n_shared)
    return max(LEAST_REACH, experts * 3 // 2 // (config.n_head * (2 * config.kv_lora + config.qk_rope)))


@dataclass(frozen=True)
class Sampling:
    """temperature 0 (below GREEDY_BELOW) is greedy. top_k: that many tokens (0: all); top_p: smallest set of tokens
    with that much probability; min_p: tokens at least that probable in relation to the most probable one; typical_p:
    as top_p, of those whose surprise is nearest the expected one. All apply together. QuantkitError for one beyond its
    BOUNDS."""

    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        for name, bounds in BOUNDS.items():
            check(getattr(self, name), bounds, f"{name} {getattr(self, name)}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, whatever the rest says."""
        return self.temperature < GREEDY_BELOW


class NoneLeft(QuantkitError):
    """What is asked for excludes every token."""


class Dice:
    """Uniform numbers in [0, 1), those that torch.rand would draw one by one."""

    def __init__(self, seed: int):
        self.generator, self.left = torch.Generator().manual_seed(seed), list[float]()

    def throw(self) -> float:
        """The next one."""
        if not self.left:
            self.left = torch.rand(AHEAD, dtype=torch.float64, generator=self.generator).tolist()[::-1]
        return self.left.pop()


class Ask(NamedTuple):
    """What is asked of a token. uniform: in [0, 1), which decides. ids int64 [k], values float32 [k]: of tokens that
    have other logits than the model's; where one stands twice, its last holds. allowed: uint8 [n_vocab], 0 where a
    token must not come; None: all may."""

    how: Sampling
    uniform: float
    ids: np.ndarray
    values: np.ndarray
    allowed: np.ndarray | None = None

    def edited(self, logits: np.ndarray) -> np.ndarray:
        """The logits that are drawn from, float32 [n_vocab]. NoneLeft if none is."""
        if not len(self.ids) and self.allowed is None:
            return logits
        own = logits.copy()
        own[self.ids] = self.values
        if self.allowed is not None:
            own[self.allowed == 0] = -np.inf
        if own.max() == -np.inf:
            raise NoneLeft(NONE_LEFT)
        return own


def sample(logits: torch.Tensor, how: Sampling, generator: torch.Generator) -> int:
    """One token from float32 logits [n_vocab]. QuantkitError if they are no numbers."""
    uniform = 0.0 if how.greedy else torch.rand((), dtype=torch.float64, generator=generator).item()
    return pick(logits.cpu().numpy(), how, uniform)


def pick(values: np.ndarray, how: Sampling, uniform: float) -> int:
    """The token that a number in [0, 1) means, of float32 logits [n_vocab]. In numpy, one thread: with R1's vocabulary
    torch's multinomial takes 2 ms and its sort 9, and its teams of threads, one for each thread that asks, get in each
    other's way. QuantkitError if they are no numbers."""
    best = int(values.argmax())  # the first that is no number, if there is one
    most = values[best]
    if not np.isfinite(most):
        raise QuantkitError(NOT_FINITE)
    if how.greedy:
        return best
    p = np.subtract(values, most)
    p /= np.float32(how.temperature)
    np.exp(p, out=p)  # the most probable one has 1
    if how.typical_p < 1:
        p = typical(torch.from_numpy(p / p.sum()), how.typical_p).numpy()
    ids = _kept(p, how)
    return draw(p, uniform) if ids is None else int(ids[draw(p[ids], uniform)])


def _kept(p: np.ndarray, how: Sampling) -> np.ndarray | None:
    """Ids that top_k, top_p and min_p leave of positive numbers [n_vocab] in proportion to probabilities; None: all."""
    ids = None
    if 0 < how.top_k < len(p):
        ids = _largest(p, how.top_k, np.partition(p, -how.top_k)[-how.top_k])
    if how.top_p < 1:
        best = p if ids is None else p[ids]  # top_p counts what top_k left, as in llama.cpp
        least, enough = best.max(), how.top_p * best.sum(dtype=np.float64)
        for factor in HEADS:  # few are sorted, if they have enough
            head = best[best >= least * np.float32(factor)] if factor else best
            if head.sum(dtype=np.float64) > enough:
                break
        head = np.sort(head)[::-1]
        n = min(int(np.searchsorted(np.cumsum(head, dtype=np.float64), enough)) + 1, len(head))
        among = _largest(best, n, head[n - 1])
        ids = among if ids is None else ids[among]
    if how.min_p > 0:
        least = np.float32(how.min_p) * p.max()
        ids = np.flatnonzero(p >= least) if ids is None else ids[p[ids] >= least]
    return ids


def _largest(p: np.ndarray, n: int, least: float) -> np.ndarray:
    """Ids, ascending, of the n largest numbers, the last of which is `least`; of several like that the first ones."""
    ids = np.flatnonzero(p >= least)
    if len(ids) > n:
        ids = np.delete(ids, np.flatnonzero(p[ids] == least)[n - len(ids) :])
    return ids


def draw(p: np.ndarray, uniform: float) -> int:
    """Where a number in [0, 1) falls among positive numbers laid end to end; never on a zero."""
    starts = np.arange(0, len(p), DRAWN_TOGETHER)
    blocks = np.add.reduceat(p, starts, dtype=np.float64)
    ends = np.cumsum(blocks)
    at = uniform * ends[-1]
    block = min(int(np.searchsorted(ends, at, side="right")), int(np.flatnonzero(blocks)[-1]))
    part = p[starts[block] : starts[block] + DRAWN_TOGETHER]
    within = np.cumsum(part, dtype=np.float64)
    i = np.searchsorted(within, max(at - (ends[block] - blocks[block]), 0.0), side="right")  # below by rounding
    return int(starts[block]) + min(int(i), int(np.flatnonzero(part)[-1]))


def typical(p: torch.Tensor, share: float) -> torch.Tensor:
    """Of probabilities [n_vocab], the smallest set with that much in all whose surprise is nearest the entropy, scaled
    to 1; the others 0 (locally typical sampling, Meister et al., TACL 2023)."""
    surprise = -p.clamp_min(torch.finfo(p.dtype).tiny).log()
    entropy = (p * surprise).cumsum(-1)[-1]  # the same by any number of threads, which torch's own sums are not
    order = (surprise - entropy).abs().argsort(stable=True)
    total = p[order].cumsum(-1)
    n = min(int((total < share).sum()) + 1, len(p))
    out = torch.zeros_like(p)
    out[order[:n]] = p[order[:n]] / total[n - 1]
    return out


def read(engine: Engine, prompt: list[int], begin: int = 0) -> torch.Tensor:
    """A prompt into slot 0, whose cache holds the first `begin` tokens, piece by piece: the last one's float32 logits
    [n_vocab]."""
    logits = torch.empty(0)
    while begin < len(prompt):
        n = piece_at(engine, begin)
        logits = engine.prefill(0, prompt[begin : begin + n], begin)
        begin += n
    return logits


def generate(engine: Engine, prompt: list[int], n_tokens: int, how: Sampling, begin: int = 0) -> Iterator[int]:
    """Up to n_tokens new tokens after the prompt (BOS included in it), ending at EOS; in slot 0, whose cache already
    holds the first `begin` tokens of the prompt. QuantkitError if the prompt and one more do not fit the context."""
    if len(prompt) >= engine.capacity:
        larger = "; --context gives a larger one" if engine.capacity < engine.config.n_context else ""
        raise QuantkitError(f"{len(prompt)} prompt tokens do not fit a context of {engine.capacity}{larger}")
    generator = torch.Generator().manual_seed(how.seed)
    logits = read(engine, prompt, begin)
    for left in reversed(range(min(n_tokens, engine.capacity - len(prompt)))):
        token = sample(logits, how, generator)
        if engine.config.is_end(token):
            return
        yield token
        if left:
            logits = engine.decode([0], [token])[0]
