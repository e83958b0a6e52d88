"""Nobody's tokens wait for the end of another one's prompt; and the client that measures it, scripts/bench/users.py."""

import argparse
import asyncio
import dataclasses
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quantkit.machine import one_thread_here
from quantkit.runtime.engines import graph
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving import http
from quantkit.serving import scheduler as scheduling
from quantkit.serving.gate import Gate
from quantkit.serving.scheduler import Clock, Job, Scheduler

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import users

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


@pytest.mark.parametrize(
    "step, part, longest",
    [
        (0.012, 0.004, 0.1),  # a step and many small parts fit
        (0.06, 0.01, 0.06 + 0.06),  # prompts get as long as a step
        (0.2, 0.005, 0.2 + 0.1),  # and no longer than the gap
        (0.01, 0.3, 0.31),  # a part that is longer than the gap: tokens after each
    ],
)
def test_when_tokens_are_due(step, part, longest):
    time = [0.0]
    clock = Clock(lambda: time[0])
    gaps, last = [], 0.0
    for i in range(400):
        if i % 100 == 0:
            clock.begin()
        time[0] += part
        if clock.due():
            begun = time[0]
            time[0] += step
            clock.decoded(begun)
            gaps.append(time[0] - last)
            last = time[0]
    assert max(gaps[2:]) <= longest + 1e-9  # nothing is known of the first
    assert min(gaps[2:]) >= step + max(part, min(step, 0.08) - 2 * part) - 1e-9


def test_tokens_come_within_a_piece(weights, monkeypatch):
    """A long prompt's single piece, layer by layer: somebody else's tokens in the middle of it; and both get what they
    get alone."""
    monkeypatch.setattr(graph, "DENSE_ROWS", 1)
    monkeypatch.setattr(scheduling, "GAP", 0.0)
    engine = open_engine(weights, 2, 512)
    engine.config = dataclasses.replace(engine.config, eos=-1)
    reading, within = [False], list[int]()
    compute, decode = engine.prefill, engine.decode

    def prefill(slot: int, ids: list[int], at: int):
        reading[0] = len(ids) > 2
        try:
            return compute(slot, ids, at)
        finally:
            reading[0] = False

    def counted(slots: list[int], tokens: list[int]):
        if reading[0]:
            within.append(len(slots))
        return decode(slots, tokens)

    monkeypatch.setattr(engine, "prefill", prefill)
    monkeypatch.setattr(engine, "decode", counted)

    def jobs() -> list[Job]:
        return [Job([0, 61], 40, GREEDY, lambda *_: None), Job([0, *range(300, 750)], 3, GREEDY, lambda *_: None)]

    def done(job: Job, n: int) -> None:
        end = time.monotonic() + 60
        while job.n_made < n:
            assert time.monotonic() < end
            time.sleep(0.001)

    with Scheduler(engine) as scheduler:
        alone = jobs()
        for job in alone:
            scheduler.submit(job)
            done(job, job.n_tokens)
        assert not within
        first, second = jobs()
        scheduler.submit(first)
        done(first, 1)
        scheduler.submit(second)
        done(first, 40)
        done(second, 3)
    assert len(within) >= 2 * engine.config.n_layer and set(within) == {1}
    assert [first.made, second.made] == [job.made for job in alone]


def test_threads_that_choose_tokens_leave_others_theirs():
    """An engine that is opened later computes in a thread that begins later."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(4, initializer=one_thread_here) as pool:
            found = list(pool.map(lambda _: time.sleep(0.01) or torch.get_num_threads(), range(16)))
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 3
        assert set(found) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def url(weights) -> Iterator[str]:
    engine = open_engine(weights, 9, 512)
    api = http.Api("tiny", weights.file.metadata, weights.tokenizer(), engine, http.Settings(), Gate())
    listener = http.bind("127.0.0.1", 0)
    server = http.server(api)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    server.should_exit = True
    thread.join(30)


def test_the_client_of_several_users(url, made):
    """Eight sequences: their tokens are drawn by several threads."""
    words = users.Words(str(next(made.glob("tiny-r1-*.gguf"))), 0)
    args = argparse.Namespace(prompt=16, tokens=12, stall=2, long=400)
    assert len(set(words.request(64, 1)["prompt"])) > 32
    found = asyncio.run(users.together(url, "none", words, 8, args))
    assert 0 < found["first"] <= found["last"] and found["gap"] > 0
    assert 0 < found["all"] < 2 * 8 * found["each"]  # who waits for the first token has a slower sum than its parts
    found = asyncio.run(users.stalled(url, "none", words, argparse.Namespace(**vars(args) | {"long": 300})))
    assert 0 < found["before"] and 0 < found["median"] <= found["gap"] <= found["first"] + 1
    answer = asyncio.run(users.ask(url, "none", words.request(16, 12), users.Answer()))
    assert answer.n_tokens == len(answer.times) == 12
    with pytest.raises(SystemExit, match="400"):
        asyncio.run(users.ask(url, "none", words.request(600, 12), users.Answer()))
