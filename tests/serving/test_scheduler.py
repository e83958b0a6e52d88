"""Nobody's tokens wait for the end of another one's prompt; and the client that measures it, scripts/bench/users.py."""

import argparse
import asyncio
import dataclasses
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from quantkit.machine import one_thread_here
from quantkit.runtime.engines import graph
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Piece, Sampling, reach
from quantkit.runtime.pauses import launched
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving import clock as timing
from quantkit.serving import http
from quantkit.serving import scheduler as scheduling
from quantkit.serving.gate import Gate
from quantkit.serving.logits import TokenRules
from quantkit.serving.post import Post
from quantkit.serving.scheduler import Job, Scheduler

sys.path.append(str(Path(__file__).parents[2] / "scripts" / "bench"))
import users

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


def test_tokens_come_within_a_piece(weights, monkeypatch):
    """A long prompt's single piece, layer by layer: somebody else's tokens in the middle of it; and both get what they
    get alone."""
    monkeypatch.setattr(graph, "DENSE_ROWS", 1)
    monkeypatch.setattr(timing, "GAP", 0.0)
    engine = open_engine(weights, 2, 512)
    engine.config = dataclasses.replace(engine.config, eos=-1)
    reading, within = [False], list[int]()
    compute, decode = engine.prefill, engine.decode

    def prefill(slot: int, ids: list[int], *rest):
        reading[0] = len(ids) > 2
        try:
            return compute(slot, ids, *rest)
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


def test_short_prompts_are_read_in_one_pass(weights, monkeypatch):
    """By an engine that can, a longer one after them; somebody else's tokens come meanwhile, and all get what they get
    alone."""
    monkeypatch.setattr(scheduling, "TOGETHER", 100)
    monkeypatch.setattr(timing, "GAP", 0.0)
    engine = GpuEngine(weights, 5, 512, 3)
    engine.config = dataclasses.replace(engine.config, eos=-1)
    passes, within = list[list[int]](), [0]
    read, decode = engine.prefill_together, engine.decode

    def watched(pieces: list[Piece]):
        passes.append([len(piece.tokens) for piece in pieces])
        return read(pieces)

    def counted(slots: list[int], tokens: list[int]):
        within[0] += any("prefill_together" in frame.name for frame in traceback.extract_stack(limit=12))
        return decode(slots, tokens)

    monkeypatch.setattr(engine, "prefill_together", watched)
    monkeypatch.setattr(engine, "decode", counted)

    def job(n: int, rules: TokenRules, done: threading.Event) -> Job:
        prompt = [0, *(300 + (7 * n + i) % 400 for i in range(n - 1))]
        return Job(prompt, 4, GREEDY, lambda _, why: done.set() if why else None, rules)

    def answered(lengths: list[int]) -> list[Job]:
        ends = [threading.Event() for _ in lengths]
        jobs = [job(n, TokenRules(n_logprobs=0, of_prompt=n == 30), end) for n, end in zip(lengths, ends, strict=True)]
        with scheduler.changed:
            for each in jobs:
                scheduler.submit(each)
        assert all(end.wait(60) for end in ends)
        return jobs

    with Scheduler(engine) as scheduler:
        alone = [answered([n])[0] for n in (40, 20, 300, 30)]
        assert passes == [[40], [20], [300], [30]] and not within[0]
        passes.clear()
        begun = threading.Event()
        other = Job([0, 61], 300, GREEDY, lambda *_: begun.set())
        scheduler.submit(other)
        assert begun.wait(60)
        together = answered([40, 20, 300, 30])
        scheduler.cancel(other)
        short, far = (Job([0] * (n + 20), 1, GREEDY, lambda *_: None, done=n) for n in (0, 8 * reach(engine.config)))
        assert scheduler._batches([(short, 20), (short, 60)]) == [[(short, 20), (short, 60)]]
        assert scheduler._batches([(short, 20), (far, 20)]) == [[(short, 20)], [(far, 20)]]  # attention takes long
    assert passes[-2:] == [[20, 30, 40], [300]] and within[0] >= engine.config.n_layer
    assert [each.made for each in together] == [each.made for each in alone]
    for mine, own in zip(together, alone, strict=True):
        for name, n in (("chances", 4), ("heard", 29 if len(own.prompt) == 30 else 0)):
            found, wanted = ([c.logprob for c in getattr(each, name)] for each in (mine, own))
            assert len(found) == n and found == pytest.approx(wanted, abs=1e-3)


def test_an_engine_that_cannot_prepare_a_thread_answers(weights, monkeypatch, caplog):
    engine = GpuEngine(weights, 1, 64, 3)
    engine.config = dataclasses.replace(engine.config, eos=-1)

    def full() -> None:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(engine, "begin_here", full)
    done = threading.Event()
    with Scheduler(engine) as scheduler:
        job = Job([0, 61], 2, GREEDY, lambda _, why: done.set() if why else None)
        scheduler.submit(job)
        assert done.wait(60)
    assert job.n_made == 2 and "no memory left" in caplog.text


@pytest.mark.parametrize("by", ["its token", "what it asks to hear"])
def test_an_error_in_a_pass_over_several_ends_the_guilty_one(by, weights, monkeypatch):
    """They are read one by one then, and heard once; who is decoding goes on, and none of them waits for the next."""
    engine = GpuEngine(weights, 4, 512, 3)
    engine.config = dataclasses.replace(engine.config, eos=-1)
    passes, read = list[int](), engine.prefill_together
    monkeypatch.setattr(engine, "prefill_together", lambda pieces: passes.append(len(pieces)) or read(pieces))
    order, read_one = list[str](), engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *piece: order.append("read") or read_one(*piece))

    def jobs() -> list[Job]:
        rules = TokenRules(n_logprobs=0, of_prompt=True)
        return [Job([0, *range(300, 300 + n)], 4, GREEDY, lambda *_: None, rules) for n in (20, 30, 40)]

    def answered(some: list[Job]) -> list[str]:
        why = ["" for _ in some]
        ends = [threading.Event() for _ in some]

        def told(i: int, reason: str | None) -> None:
            if reason:
                why[i] = reason
                ends[i].set()

        with scheduler.changed:
            for i, job in enumerate(some):
                job.emit = lambda _, reason, i=i: told(i, reason)
                scheduler.submit(job)
        assert all(end.wait(60) for end in ends)
        return why

    def deaf(_: torch.Tensor) -> None:
        raise ZeroDivisionError

    with Scheduler(engine, tell=lambda: order.append("told")) as scheduler:
        alone = jobs()
        assert [answered([job]) for job in alone] == [["length"]] * 3
        passes.clear()
        begun = threading.Event()
        other = Job([0, 61], 400, GREEDY, lambda *_: begun.set())
        scheduler.submit(other)
        assert begun.wait(60)
        first, guilty, last = jobs()
        if by == "its token":
            guilty.prompt[5] = 10**6
        else:
            guilty.hear = deaf
        assert answered([first, guilty, last]) == ["length", "error", "length"]
        n_made = other.n_made
        assert answered(jobs()) == ["length"] * 3 and other.n_made > n_made
        scheduler.cancel(other)
    assert passes == [1, 3, 1, 1, 1, 3]
    assert "read read" not in " ".join(order)
    for mine, own in ((first, alone[0]), (last, alone[2])):
        assert mine.made == own.made and [c.logprob for c in mine.heard] == [c.logprob for c in own.heard]


def test_a_step_wakes_the_event_loop_once():
    async def received() -> tuple[list[list[int]], int]:
        loop, post = asyncio.get_running_loop(), Post()
        queues, wakes, call = [asyncio.Queue[int]() for _ in range(3)], [0], loop.call_soon_threadsafe

        def counted(*args):
            wakes[0] += 1
            return call(*args)

        loop.call_soon_threadsafe = counted

        def steps() -> None:
            post.send()
            for i in (1, 2):
                for queue in queues:
                    post.put(loop, queue, i)
                post.send()

        thread = threading.Thread(target=steps)
        thread.start()
        found = [
            [await asyncio.wait_for(queue.get(), 10) for _ in range(n)]
            for queue, n in zip(queues, (2, 2, 2), strict=True)
        ]
        thread.join()
        return found, wakes[0]

    assert asyncio.run(received()) == ([[1, 2]] * 3, 2)


class Counting:
    """`Engine`, but for the computing: the next number is the most probable token. launches: it says when a step is on
    its way."""

    def __init__(self, weights: GGUFWeights, launches: bool, seen: list[str]):
        self.config = dataclasses.replace(weights.config, eos=-1)
        self.n_slots, self.capacity, self.piece, self.launches, self.seen = 2, 64, 64, launches, seen

    def prefill(self, slot: int, tokens: list[int], begin: int, each=None) -> torch.Tensor:
        return self.decode([slot], tokens[-1:])[0]

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        self.seen.append("begin")
        if self.launches:
            launched()
        self.seen.append("end")
        return torch.nn.functional.one_hot(torch.tensor(tokens) + 1, self.config.n_vocab).float()


@pytest.mark.parametrize("launches", [False, True])
def test_tokens_are_told_while_the_next_step_is_computed(weights, launches):
    """Or at once, where an engine does not say when; the first and the last token wait for nothing."""
    seen, emitted, done = list[str](), list[str](), threading.Event()

    def emit(token: int | None, why: str | None) -> None:
        emitted.append(str(token or why))

    def tell() -> None:
        if emitted:
            seen.append("told " + " ".join(emitted))
            if "length" in emitted:
                done.set()
            emitted.clear()

    with Scheduler(Counting(weights, launches, seen), tell=tell) as scheduler:
        scheduler.submit(Job([0, 60], 4, GREEDY, emit))
        assert done.wait(30)
    step, told = ["begin", "end"], ["told 61", "told 62", "told 63"]
    if launches:
        expected = [*step, told[0], *step, "begin", told[1], "end", "begin", told[2], "end", "told 64 length"]
    else:
        expected = [*step, told[0], *step, told[1], *step, told[2], *step, "told 64 length"]
    assert seen == expected


def test_who_has_ended_hears_so_once(weights):
    """Also where others of the same step fail afterwards."""
    ends, done = list[str](), threading.Event()

    def emit(_: int | None, why: str | None) -> None:
        if why:
            ends.append(why)
            done.set()

    with Scheduler(Counting(weights, False, [])) as scheduler:
        job = Job([0, 60], 1, GREEDY, emit)
        scheduler.submit(job)
        assert done.wait(30)
        with scheduler._at_risk(job):
            raise ZeroDivisionError
    assert ends == ["length"]


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
    http.listen(listener)
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
