"""Continuous batching: one thread owns the engine; sequences join and leave between its steps.

A step is one piece of some unfinished prompt, with whole short ones beside it, then one token for every sequence whose
prompt is done (iteration-level scheduling of Orca, Yu et al., OSDI 2022; prompts in pieces as Sarathi, Agrawal et al.,
2023). Prompts take turns (`Turns`): a short one waits for two pieces of others at most.

A piece can take seconds, so tokens do not wait for its end: where an engine pauses within it, they are computed as soon
as going on would take them beyond GAP, by the time that parts took before (`Clock`). Pieces are cut as ever, so a
prompt's bits do not depend on who waits; on who is read in the same pass they do, by rounding (`generate.Together`).
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.runtime.generate import Engine, Piece, Sampling, Together, piece_at, sample
from quantkit.runtime.pauses import pause, pausing
from quantkit.serving.grammar import Constraint
from quantkit.serving.logits import Chance, TokenRules, Unanswerable

log = logging.getLogger(__name__)

GAP = 0.1  # seconds between two tokens of a sequence while prompts of others are read, if the machine allows it
MARGIN = 0.1  # of GAP, for what is not foreseen
TOGETHER = 1024  # tokens of several prompts that are read in one pass
MANY, SAMPLERS = 4, 8  # sequences from which on several threads choose their tokens; so many threads

Emit = Callable[[int | None, str | None], None]
"""Called in the scheduler's thread: (token, None) for each new token, then once (None, why it ended): `stop` (EOS),
`length`, `cancelled`, `refused` (by what the request asks for; `Job.refusal` says why) or `error`."""


class QueueFull(QuantkitError):
    """More requests wait than allowed: try again later."""


@dataclass(eq=False)
class Job:
    """One sequence to continue. prompt: token ids with BOS; at most n_tokens new ones (0: it is only read). made: those
    so far, with their chances if the rules ask for them, both complete before a token is emitted. heard: chances of
    the prompt's second token and all that follow, ended: of the EOS that ended the answer, if the rules ask for them.
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
    refusal: str = ""
    generator: torch.Generator = field(default_factory=torch.Generator)

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

    def choose(self, logits: torch.Tensor, ends: Sequence[int]) -> int:
        """The next token, from float32 logits [n_vocab]."""
        allowed = self.rules.apply(logits, self.prompt, self.made, ends)
        if allowed is not logits and allowed.numpy().max() == -torch.inf:
            raise Unanswerable("no token is left: what the request bans is the whole vocabulary")
        if self.constraint is None:
            return sample(allowed, self.how, self.generator)
        token = sample(self.constraint.apply(allowed), self.how, self.generator)
        self.constraint.take(token)
        return token


class Turns:
    """Whose turn it is, among prompts of very different lengths: who has waited longest, but a short one may pass,
    every second time. So short ones need not wait for long ones, and without end do not take more than half. short:
    tokens of a prompt that may pass."""

    def __init__(self, short: int) -> None:
        self.short = short
        self.passed = False  # whether the last turn went past who had waited longest

    def next(self, jobs: Sequence[Job]) -> Job:
        """jobs: at least one, who has waited longest first."""
        oldest, shortest = jobs[0], min(jobs, key=lambda job: job.left)
        self.passed = not self.passed and shortest is not oldest and shortest.left <= self.short
        return shortest if self.passed else oldest


class Clock:
    """When the sequences that are decoding must have their next tokens, while prompts are read. now: seconds."""

    def __init__(self, now: Callable[[], float] = time.perf_counter):
        self.now = now
        self.tokens = self.seen = now()  # when they had the last; when a part of a prompt ended
        self.step = self.part = 0.0  # seconds of the last step of decoding; of parts, as of late

    def begin(self) -> None:
        """Prompts are read from here on."""
        self.seen = self.now()

    def due(self) -> bool:
        """A part of a prompt is done: whether tokens come before another one. Where a step of decoding takes more than
        half of GAP, prompts get as long as it does, and no longer than GAP."""
        now = self.now()
        self.part = max(now - self.seen, self.part / 2)
        self.seen = now
        gap = GAP * (1 - MARGIN)
        return now + self.part - self.tokens > max(gap - self.step, min(gap, self.step))

    def decoded(self, begun: float) -> None:
        """Tokens are there, of a step that began then."""
        self.tokens = self.seen = self.now()
        self.step = self.tokens - begun


class Scheduler:
    """Runs jobs on an engine. `submit` and `cancel` may be called from any thread; a context manager. held: within it
    the tokens of a step are emitted."""

    def __init__(
        self,
        engine: Engine,
        queue_limit: int = 256,
        held: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ):
        self.engine, self.queue_limit, self.held = engine, queue_limit, held
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.prompts: list[Job] = []  # of the running ones, those with unfinished prompts, the last served last
        self.admission, self.pieces = Turns(engine.piece), Turns(engine.piece)
        self.free = list(range(engine.n_slots))
        self.clock = Clock()
        self.samplers = ThreadPoolExecutor(
            min(SAMPLERS, machine.threads()), "quantkit-sampler", machine.one_thread_here
        )
        self.closed = False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._loop, name="quantkit-scheduler", daemon=True)
        self.thread.start()

    def __enter__(self) -> "Scheduler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, job: Job) -> None:
        """Queue a job. QueueFull: too many wait; QuantkitError: it can never fit the context."""
        if not job.prompt:
            raise QuantkitError("the prompt is empty")
        if len(job.prompt) + job.n_tokens > self.engine.capacity:
            raise QuantkitError(
                f"{len(job.prompt)} prompt tokens and {job.n_tokens} new ones do not fit a context of "
                f"{self.engine.capacity}"
            )
        job.generator.manual_seed(job.how.seed)
        with self.changed:
            if self.closed:
                raise QuantkitError("the scheduler is closed")
            if len(self.waiting) >= self.queue_limit:
                raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again later")
            self.waiting.append(job)
            self.changed.notify()

    def cancel(self, job: Job) -> None:
        """The job ends before its next token. Harmless if it has ended."""
        with self.changed:
            job.cancelled = True
            self.changed.notify()

    def close(self) -> None:
        """End all jobs as cancelled after the step under way, and the thread."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()
        self.samplers.shutdown()

    def _loop(self) -> None:
        while self._admit():
            self._step()
        for job in [*self.running, *self.waiting]:
            self._end(job, "cancelled")

    @contextlib.contextmanager
    def _at_risk(self, *jobs: Job) -> Iterator[None]:
        """An error ends those jobs; whatever it was, other requests must be served on."""
        try:
            yield
        except Unanswerable as error:
            for job in jobs:
                job.refusal = str(error)
                self._end(job, "refused")
        except Exception:
            log.exception("a step failed; its %d sequences end", len(jobs))
            for job in jobs:
                self._end(job, "error")

    def _admit(self) -> bool:
        """Wait for work; give slots to waiting jobs. False: closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.waiting or self.running)
            gone = [job for job in self.waiting if job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            while self.waiting and self.free and not self.closed:
                job = self.admission.next(self.waiting)
                self.waiting.remove(job)
                self.free.sort()  # low slots first: neighbours in memory are cheaper to batch
                job.slot = self.free.pop(0)
                self.running.append(job)
                self.prompts.append(job)
        for job in gone + [job for job in self.running if job.cancelled]:
            self._end(job, "cancelled")
        return not self.closed

    def _step(self) -> None:
        ready = [job for job in self.running if not job.left]
        chosen = self._to_read()
        self.clock.begin()
        for batch in self._batches(chosen):
            waits = any(not other.left for other in self.running)
            with pausing(self._let_others if waits else None):
                self._read(batch)
        self._decode([job for job in ready if job in self.running])

    def _let_others(self) -> None:
        """Between two parts of a prompt's work: tokens for those that are decoding, if it is time."""
        if self.clock.due():
            for job in [job for job in self.running if job.cancelled and not job.left]:
                self._end(job, "cancelled")
            self._decode([job for job in self.running if not job.left])

    def _decode(self, ready: list[Job]) -> None:
        """One token for each."""
        if not ready:
            return
        begun = self.clock.now()
        with self._at_risk(*ready):
            logits = self.engine.decode([job.slot for job in ready], [job.made[-1] for job in ready])
            self._continue(list(zip(ready, logits, strict=True)))
        self.clock.decoded(begun)

    def _to_read(self) -> list[tuple[Job, int]]:
        """Whose prompts are read in this step, and how many tokens of each: somebody's piece, and what is left of
        others while it fits a piece with that. The shortest goes first."""
        if not self.prompts:
            return []
        first = self.pieces.next(self.prompts)
        chosen = [(first, min(first.left, piece_at(self.engine, first.done)))]
        room = self.engine.piece - chosen[0][1]
        for job in sorted(self.prompts, key=lambda job: job.left):
            if job is not first and job.left <= min(room, piece_at(self.engine, job.done)):
                chosen.append((job, job.left))
                room -= job.left
        return sorted(chosen, key=lambda each: self._cost(*each))

    def _cost(self, job: Job, n: int) -> int:
        """How many tokens at a prompt's beginning take about as long as its next n."""
        return n * self.engine.piece // piece_at(self.engine, job.done)

    def _batches(self, chosen: list[tuple[Job, int]]) -> list[list[tuple[Job, int]]]:
        """Those that are read in one pass, in order: short ones as far as none of them waits long for the others."""
        batches, room = list[list[tuple[Job, int]]](), 0
        for job, n in chosen:
            cost = self._cost(job, n)
            if isinstance(self.engine, Together) and cost <= room:
                batches[-1].append((job, n))
            else:
                batches.append([(job, n)])
                room = TOGETHER
            room -= cost
        return batches

    def _read(self, batch: list[tuple[Job, int]]) -> None:
        """So many tokens of their prompts, of several in one pass. After an error in it they are read one by one: it
        ends those only that bring it about."""
        if len(batch) == 1 or (logits := self._read_together(batch)) is None:
            for job, n in batch:
                with self._at_risk(job):
                    self._advance([(job, n)], self.engine.prefill(*_piece(job, n))[None])
                    pause()
        else:
            with self._at_risk(*(job for job, _ in batch)):
                self._advance(batch, logits)
                pause()

    def _read_together(self, batch: list[tuple[Job, int]]) -> torch.Tensor | None:
        """Logits after each one's tokens, of one pass; None if it failed, and nothing is kept of it."""
        assert isinstance(self.engine, Together)
        heard = [len(job.heard) for job, _ in batch]
        try:
            return self.engine.prefill_together([_piece(job, n) for job, n in batch])
        except Exception:
            log.exception("a pass over %d prompts failed; they are read one by one", len(batch))
            for (job, _), n in zip(batch, heard, strict=True):
                del job.heard[n:]
            return None

    def _advance(self, batch: list[tuple[Job, int]], logits: torch.Tensor) -> None:
        """So many tokens of each are read; logits of the last."""
        ready = list[tuple[Job, torch.Tensor]]()
        for (job, n), own in zip(batch, logits, strict=True):
            self.prompts.remove(job)
            job.done += n
            if job.left:
                self.prompts.append(job)
            elif not job.n_tokens:
                self._end(job, "length")
            else:
                ready.append((job, own))
        self._continue(ready)

    def _continue(self, ready: Sequence[tuple[Job, torch.Tensor]]) -> None:
        """A token for each, from its logits."""
        tokens = self._chosen(ready)
        with self.held():
            for (job, own), token in zip(ready, tokens, strict=True):
                with self._at_risk(job):
                    self._take(job, own, token())

    def _chosen(self, ready: Sequence[tuple[Job, torch.Tensor]]) -> list[Callable[[], int]]:
        """Each one's next token, or the error that it gave. Of many by several threads: in R1's vocabulary it takes
        0.1 to 0.3 ms, with penalties or a grammar more."""
        if len(ready) < MANY:
            return [partial(self._sampled, *each) for each in ready]
        return [self.samplers.submit(self._sampled, *each).result for each in ready]

    def _sampled(self, job: Job, logits: torch.Tensor) -> int:
        return job.choose(logits, self.engine.config.ends)

    def _take(self, job: Job, logits: torch.Tensor, token: int) -> None:
        if token in self.engine.config.ends or token in job.rules.stop:
            if job.rules.of_prompt:
                job.ended.append(Chance.of(logits, token, job.rules.n_logprobs or 0))
            return self._end(job, "stop")
        if job.rules.n_logprobs is not None:
            job.chances.append(Chance.of(logits, token, job.rules.n_logprobs))
        job.made.append(token)
        job.emit(token, None)
        if job.n_made == job.n_tokens:
            self._end(job, "length")

    def _end(self, job: Job, why: str) -> None:
        if job in self.running:
            self.running.remove(job)
            self.prompts = [other for other in self.prompts if other is not job]
            self.free.append(job.slot)
        job.constraint = None  # its states may take 100 MB, and a request may have many answers
        job.emit(None, why)


def _piece(job: Job, n: int) -> Piece:
    """The next n tokens of its prompt."""
    return Piece(job.slot, job.prompt[job.done : job.done + n], job.done, job.hear if job.rules.of_prompt else None)
