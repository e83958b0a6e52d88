"""A conversation goes on from what its slot holds of it."""

import json
import threading

import pytest
from server import Running

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
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
        alone = answered(job(turn, reuse=False))
        assert read == [(0, len(LONG)), (0, len(turn))]
        assert answered(job(turn)) == alone and read[-1] == (len(turn) - 1, 1)
        assert answered(job([*turn, 63])) and read[-1] == (len(turn), 1)
        told = job(turn, rules=TokenRules(n_logprobs=0, of_prompt=True))
        answered(told)
        assert read[-1] == (0, len(turn)) and len(told.heard) == len(turn) - 1


def test_clients_are_told_and_may_refuse(running):
    ask = {"prompt": [0, *range(200, 400)], "max_tokens": 4, "temperature": 0}

    def cached(**more) -> int:
        status, answer = running.post(json.dumps(ask | more).encode(), "/v1/completions")
        assert status == 200, answer
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    cached()
    assert cached() == 200 == cached(seed=-1) == cached(seed=7, cache_prompt=True)
    assert cached(cache_prompt=False) == 0 == cached(seed=7) == cached(echo=True, logprobs=0)
    lines = running.ask("GET", "/metrics")[2].decode().splitlines()
    assert "quantkit_cached_tokens_total 600" in lines
