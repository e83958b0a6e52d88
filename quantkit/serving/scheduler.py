"""Continuous batching: one thread owns the engine; sequences join and leave between its steps.

A step is one piece of some unfinished prompt, with whole short ones beside it, then one token for every sequence whose
prompt is done (iteration-level scheduling of Orca, Yu et al., OSDI 2022; prompts in pieces as Sarathi, Agrawal et al.,
2023). Prompts take turns (`Turns`): a short one waits for two pieces of others at most.

A piece can take seconds, so tokens do not wait for its end: where an engine pauses within it, they are computed as soon
as going on would take too long, by the time that parts took before (`clock.Clock`). Pieces are cut as ever, so a
prompt's bits do not depend on who waits; on who is read in the same pass they do, by rounding (`generate.Together`).
"""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
import torch

from quantkit import machine, progress
from quantkit.errors import QuantkitError
from quantkit.runtime import draws
from quantkit.runtime.generate import Ask, Engine, Piece, Sampling, Together, piece_at
from quantkit.runtime.pauses import launching, pause, pausing
from quantkit.serving.clock import Clock
from quantkit.serving.jobs import Drawn, Job
from quantkit.serving.logits import NOTHING, Chance, Unanswerable
from quantkit.serving.slots import Slots

log = logging.getLogger(__name__)

TOGETHER = 1024  # tokens of several prompts that are read in one pass
EACH, SAMPLERS = 2, 8  # sequences whose tokens a thread draws, at least if there are more; so many threads at most
ANY = Ask(Sampling(temperature=0), 0.0, NOTHING, np.empty(0, np.float32))  # what is drawn for nobody


class QueueFull(QuantkitError):
    """More requests wait than allowed: try again later."""


Result = TypeVar("Result")


def tried(work: Callable[[], Result]) -> Result | Exception:
    """What it gives, or the error that it raised."""
    try:
        return work()
    except Exception as error:
        return error


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


class Scheduler:
    """Runs jobs on an engine. `submit` and `cancel` may be called from any thread; a context manager. tell: called in
    the scheduler's thread when what was emitted is to be passed on: before it waits or reads a prompt, else while the
    next step is computed, if the engine says when (`pauses.launched`). say: is told of long gaps, there too."""

    def __init__(
        self,
        engine: Engine,
        queue_limit: int = 256,
        tell: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = progress.say,
    ):
        self.engine, self.queue_limit, self.tell, self.say = engine, queue_limit, tell, say
        self.launches = False  # whether the engine says so
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.prompts: list[Job] = []  # of the running ones, those with unfinished prompts, the last served last
        self.admission, self.pieces = Turns(engine.piece), Turns(engine.piece)
        self.slots = Slots(engine.n_slots)
        self.clock = Clock()
        draws.warm_up(engine.config.n_vocab)
        self.n_drawing = min(SAMPLERS, machine.threads())
        self.samplers = ThreadPoolExecutor(self.n_drawing, "quantkit-sampler", machine.one_thread_here)
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
        if isinstance(self.engine, Together) and isinstance(error := tried(self.engine.begin_here), Exception):
            log.error("what prompts will need was not made before, and is when they come: %s", error)
        while self._admit():
            self._step()
        for job in [*self.running, *self.waiting]:
            self._end(job, "cancelled")
        self.tell()

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
            left = [job for job in jobs if job in self.running]  # others have heard of their end
            log.exception("a step failed; its %d sequences end", len(left))
            for job in left:
                self._end(job, "error")

    def _admit(self) -> bool:
        """Wait for work; give slots to waiting jobs. False: closed."""
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.waiting or self.running)
            gone = [job for job in self.waiting if job.cancelled]
            self.waiting = deque(job for job in self.waiting if not job.cancelled)
            while self.waiting and self.slots.free and not self.closed:
                job = self.admission.next(self.waiting)
                self.waiting.remove(job)
                self.slots.give(job)
                self.running.append(job)
                self.prompts.append(job)
        for job in gone + [job for job in self.running if job.cancelled]:
            self._end(job, "cancelled")
        if self.prompts or not self.running:
            self.tell()
        return not self.closed

    def _step(self) -> None:
        ready = [job for job in self.running if not job.left]
        chosen = self._to_read()
        self.clock.begin()
        for batch in self._batches(chosen):
            if not self._read(batch):  # one by one, the error ends those only that bring it about
                for each in batch:
                    self._read([each])
        self._decode([job for job in ready if job in self.running])
        if not self.prompts:
            self.clock.gaps.tell(self.say)

    def _let_others(self, what: str) -> None:
        """Between two parts of a prompt's work: tokens for those that are decoding, if it is time."""
        if self.clock.due(what):
            for job in [job for job in self.running if job.cancelled and not job.left]:
                self._end(job, "cancelled")
            self._decode([job for job in self.running if not job.left])
            self.tell()

    def _decode(self, ready: list[Job]) -> None:
        """One token for each."""
        if not ready:
            return
        begun = self.clock.now()
        with self._at_risk(*ready):
            with launching(self._launched):
                logits = self.engine.decode([job.slot for job in ready], [job.made[-1] for job in ready])
            self.tell()  # if it has not been launched after all
            self._continue(ready, logits)
        self.clock.decoded(begun)
        if not (self.launches and self.running):
            self.tell()

    def _launched(self) -> None:
        self.launches = True
        self.tell()

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

    def _read(self, batch: list[tuple[Job, int]]) -> bool:
        """So many tokens of their prompts, in one pass. False: one over several failed, and they are where they
        were."""
        waits = any(not other.left for other in self.running)
        with pausing(self._let_others if waits else None), self._at_risk(*(job for job, _ in batch)):
            several = len(batch) > 1
            logits = self._read_together(batch) if several else self.engine.prefill(*_piece(*batch[0]))[None]
            if logits is None:
                return False
            self._advance(batch, logits)
            pause(what="the end of a piece")
        self.tell()
        return True

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
        ready = list[int]()
        for i, (job, n) in enumerate(batch):
            self.prompts.remove(job)
            job.done += n
            if job.left:
                self.prompts.append(job)
            elif not job.n_tokens:
                self._end(job, "length")
            else:
                ready.append(i)
        if ready:
            self._continue([batch[i][0] for i in ready], logits[ready] if len(ready) < len(batch) else logits)

    def _continue(self, ready: Sequence[Job], logits: torch.Tensor) -> None:
        """A token for each, from its row of logits."""
        for job, found in zip(ready, self._drawn(ready, logits.cpu().numpy()), strict=True):
            with self._at_risk(job):
                if isinstance(found, Exception):
                    raise found
                self._take(job, found)

    def _drawn(self, ready: Sequence[Job], logits: np.ndarray) -> list[Drawn | Exception]:
        """Each one's next token, or the error that it gave. Of many by several threads: in R1's vocabulary it takes
        0.1 ms, and more with penalties or a grammar."""
        size = max(EACH, -(-len(ready) // self.n_drawing))
        parts = [slice(begin, begin + size) for begin in range(size, len(ready), size)]
        others = [self.samplers.submit(self._part, ready[part], logits[part]) for part in parts]
        found = self._part(ready[:size], logits[:size])
        return found + [each for other in others for each in other.result()]

    def _part(self, ready: Sequence[Job], logits: np.ndarray) -> list[Drawn | Exception]:
        ends = self.engine.config.ends
        asked = [tried(partial(job.ask, own, ends)) for job, own in zip(ready, logits, strict=True)]
        tokens = draws.tokens(logits, [ANY if isinstance(ask, Exception) else ask for ask in asked])
        rows = zip(ready, logits, asked, tokens, strict=True)
        return [
            ask if isinstance(ask, Exception) else tried(partial(self._found, job, own, token))
            for job, own, ask, token in rows
        ]

    def _found(self, job: Job, logits: np.ndarray, drawn: int | QuantkitError) -> Drawn:
        token, last = job.took(drawn, self.engine.config.ends)
        rules = job.rules
        if not (rules.of_prompt if last else rules.n_logprobs is not None):
            return Drawn(token, last, None)
        return Drawn(token, last, Chance.of(logits, token, rules.n_logprobs or 0, draws.log_total(logits)))

    def _take(self, job: Job, drawn: Drawn) -> None:
        if drawn.chance:
            (job.ended if drawn.last else job.chances).append(drawn.chance)
        if drawn.last:
            return self._end(job, "stop")
        job.made.append(drawn.token)
        job.emit(drawn.token, None)
        if job.n_made == job.n_tokens:
            self._end(job, "length")

    def _end(self, job: Job, why: str) -> None:
        if job in self.running:
            self.running.remove(job)
            self.prompts = [other for other in self.prompts if other is not job]
            self.slots.take_back(job, sound=why != "error")
        job.constraint = None  # its states may take 100 MB, and a request may have many answers
        job.emit(None, why)


def _piece(job: Job, n: int) -> Piece:
    """The next n tokens of its prompt."""
    return Piece(job.slot, job.prompt[job.done : job.done + n], job.done, job.hear if job.rules.of_prompt else None)
