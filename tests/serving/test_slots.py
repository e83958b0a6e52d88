"""A conversation goes on from what its slot holds of it."""

import dataclasses
import json
import logging
import random
import threading
import zlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from server import Running

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Each, Piece, Sampling
from quantkit.runtime.pauses import pause
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving import clock, slots
from quantkit.serving.jobs import Job
from quantkit.serving.logits import TokenRules
from quantkit.serving.scheduler import Scheduler
from quantkit.serving.slots import LEAST, Slots

GREEDY = Sampling(temperature=0)
LONG = [0, *range(300, 300 + 3 * LEAST)]


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


@pytest.fixture(scope="module")
def running(weights):
    server = Running(weights, n_slots=2)
    yield server
    server.wait_idle()
    server.stop()


def job(prompt: list[int], reuse: bool = True, **more) -> Job:
    return Job(prompt, 8, GREEDY, lambda *_: None, reuse=reuse, **more)


def used(slots: Slots, prompt: list[int], reuse: bool = True, sound: bool = True) -> tuple[int, int]:
    """Slot, tokens that were there; the prompt has been read afterwards."""
    made = job(prompt, reuse)
    slots.give(made)
    found = made.slot, made.done
    made.done = len(prompt)
    slots.take_back(made, sound)
    return found


def test_a_conversation_finds_its_slot_again():
    slots = Slots(3)
    other = [0, *range(500, 500 + 3 * LEAST)]
    assert used(slots, LONG) == (0, 0)
    assert used(slots, other) == (1, 0)  # a held conversation is left alone while there is room
    assert used(slots, [0, 1, 2]) == (2, 0) == used(slots, [0, 1, 2, 3])  # few tokens are no reason
    assert used(slots, [*LONG, 7, 8]) == (0, len(LONG))
    assert used(slots, [*LONG, 7, 8]) == (0, len(LONG) + 1)  # the last one's logits are wanted
    assert used(slots, LONG, reuse=False) == (2, 0)
    assert used(slots, [*other, 9]) == (1, len(other))


def test_a_beginning_in_common_costs_no_conversation_its_place():
    slots, system = Slots(2), LONG[: LEAST + 1]
    assert used(slots, [*system, *range(300, 300 + 2 * LEAST)]) == (0, 0)
    assert used(slots, [*system, 5, 6]) == (1, 0)  # that is less than half of the other
    assert used(slots, [*system, 6, 7]) == (1, len(system))
    assert used(slots, [0, 1, 2]) == (0, 0)  # whose turn has come


def test_who_takes_nothing_leaves_nothing():
    """So nobody finds out what was asked, and a conversation keeps its place whatever else is read."""
    slots = Slots(2)
    used(slots, LONG)
    other = [0, *range(500, 500 + 3 * LEAST)]
    assert used(slots, other, reuse=False) == (1, 0) == used(slots, other, reuse=False)
    assert used(slots, [*other, 7]) == (1, 0)
    assert used(slots, [*LONG, 7]) == (0, len(LONG))


def test_nothing_is_known_of_a_slot_after_an_error():
    slots = Slots(1)
    used(slots, LONG, sound=False)
    assert used(slots, [*LONG, 7]) == (0, 0)


def test_the_next_turn_reads_what_is_new(weights, monkeypatch):
    """And is answered as without; so are log probabilities of the prompt, whose logits nobody kept."""
    engine = open_engine(weights, 2, 512)
    read = list[tuple[int, int]]()
    compute = engine.prefill

    def prefill(slot: int, tokens: list[int], begin: int, *rest):
        read.append((begin, len(tokens)))
        return compute(slot, tokens, begin, *rest)

    monkeypatch.setattr(engine, "prefill", prefill)

    def answered(each: Job) -> list[int]:
        end = threading.Event()
        each.emit = lambda _, why: end.set() if why else None
        scheduler.submit(each)
        assert end.wait(60)
        return each.made

    with Scheduler(engine) as scheduler:
        turn = [*LONG, *answered(job(LONG)), 61, 62]
        told = job(turn, rules=TokenRules(n_logprobs=0, of_prompt=True))
        alone = answered(told)
        assert read == [(0, len(LONG)), (0, len(turn))] and len(told.heard) == len(turn) - 1
        assert answered(job(turn)) == alone and read[-1] == (len(turn) - 1, 1)
        assert answered(job([*turn, 63])) and read[-1] == (len(turn), 1)
        assert answered(job(turn, reuse=False)) == alone and read[-1] == (0, len(turn))


class Chained:
    """An engine without a model: a token follows from all that its slot's cache holds. Now and then it fails, and
    leaves rubbish: of several prompts in one pass only where it should have computed. strayed: it was asked to go on
    from what is not there."""

    piece, capacity, n_slots = 32, 512, 3

    def __init__(self, config, dice: random.Random):
        self.config, self.dice, self.strayed = config, dice, False
        self.caches = [list[int]() for _ in range(self.n_slots)]

    def follows(self, tokens: list[int]) -> int:
        """Seldom the end."""
        return zlib.crc32(np.array(tokens, np.int32).tobytes()) % 40

    def begin_here(self) -> None:
        """Nothing to prepare."""

    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        return self.prefill_together([Piece(slot, tokens, begin, each)])[0]

    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        for piece in pieces:
            self.strayed |= len(self.caches[piece.slot]) < piece.begin
            del self.caches[piece.slot][piece.begin :]
        pause(what="half of it")
        self._fail([piece.slot for piece in pieces], spoils=len(pieces) == 1)
        for piece in pieces:
            self.caches[piece.slot] += piece.tokens
            if piece.each:
                piece.each(self._logits([self.caches[piece.slot]] * len(piece.tokens)))
        return self._logits([self.caches[piece.slot] for piece in pieces])

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        self._fail(slots, spoils=True)
        for slot, token in zip(slots, tokens, strict=True):
            self.caches[slot].append(token)
        return self._logits([self.caches[slot] for slot in slots])

    def _fail(self, slots: list[int], spoils: bool) -> None:
        if self.dice.random() < 0.01:
            for slot in slots:
                self.caches[slot] = [1] * len(self.caches[slot]) if spoils else self.caches[slot] + [1]
            raise RuntimeError("by design")

    def _logits(self, texts: list[list[int]]) -> torch.Tensor:
        ids = torch.tensor([self.follows(text) for text in texts])
        return torch.nn.functional.one_hot(ids, self.config.n_vocab).float()


@pytest.mark.parametrize("seed", range(3))
def test_a_slot_holds_what_is_believed_of_it(weights, monkeypatch, seed):
    """Conversations go on, are cut and begun again, several at a time, and jobs end in all ways there are: whatever
    slots held, each token follows from its own prompt."""
    monkeypatch.setattr(slots, "LEAST", 8)
    monkeypatch.setattr(clock, "GAP", 0.0)
    monkeypatch.setattr(logging.getLogger("quantkit.serving.scheduler"), "disabled", True)
    dice = random.Random(seed)
    engine = Chained(dataclasses.replace(weights.config, eos=7), random.Random(seed + 100))
    texts, ended, room = [[0]], list[tuple[Job, str]](), threading.Semaphore(6)

    def asked() -> Job:
        text = dice.choice(texts[-8:])
        prompt = text[: dice.randint(1, len(text))] if dice.random() < 0.3 else text
        prompt = prompt[:300] + [dice.randrange(50, 60) for _ in range(dice.randint(0, 40))]
        rules = TokenRules(n_logprobs=0, of_prompt=True) if dice.random() < 0.1 else TokenRules()

        def emit(_: int | None, why: str | None) -> None:
            if why:
                ended.append((made, why))
                texts.append(made.prompt + made.made)
                room.release()

        made = Job(prompt, dice.randint(0, 60), GREEDY, emit, rules, reuse=dice.random() < 0.9)
        return made

    with Scheduler(engine) as scheduler:
        for _ in range(300):
            assert room.acquire(timeout=60)
            job = asked()
            scheduler.submit(job)
            if dice.random() < 0.1:
                scheduler.cancel(job)
        for _ in range(6):
            assert room.acquire(timeout=60)
    assert not engine.strayed and {why for _, why in ended} == {"stop", "length", "cancelled", "error"}
    assert sum(job.reused > 0 for job, _ in ended) > 50
    for job, why in ended:
        text = list(job.prompt)
        for token in job.made:
            assert token == engine.follows(text)
            text.append(token)
        assert why != "stop" or engine.follows(text) == 7


def test_clients_are_told_and_may_refuse(running):
    ask = {"prompt": [0, *range(200, 400)], "max_tokens": 4, "temperature": 0}

    def cached(**more) -> int:
        status, answer = running.post(json.dumps(ask | more).encode(), "/v1/completions")
        assert status == 200, answer
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() == 200 == cached(seed=-1) == cached(seed=7, cache_prompt=True)
    assert cached(cache_salt="mine", cache_prompt=True) == 0 == cached(cache_salt="mine")
    assert cached(cache_prompt=False) == 0 == cached(seed=7) == cached(echo=True, logprobs=0)
    lines = running.ask("GET", "/metrics")[2].decode().splitlines()
    assert "quantkit_cached_tokens_total 600" in lines
