"""Engines and the scheduler: the graph computes what torch does, and nobody's output depends on who else is served."""

import dataclasses
import threading
import time
from itertools import pairwise

import pytest
import torch
from mutations import Model

from quantkit.errors import QuantkitError
from quantkit.models.tokenizer import tokenize
from quantkit.runtime import generate as generation
from quantkit.runtime.engines import graph
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Sampling, generate, piece_at, sample, typical
from quantkit.runtime.sources.gguf import GGUFSource, GGUFWeights, open_gguf, open_source
from quantkit.runtime.sources.quantized import Quantized
from quantkit.runtime.stream import final_hidden, head_logits
from quantkit.serving.scheduler import Job, QueueFull, Scheduler

GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


@pytest.fixture(scope="module")
def layers(weights) -> GGUFSource:
    return GGUFSource(weights, Quantized(weights))


def kld(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("dense_rows", [1, 1000])
def test_graph_agrees_with_torch(weights, layers, monkeypatch, dense_rows):
    """Prompt in two pieces (both ways) and then tokens, past the first KV_STEP; slot 0 is left unused."""
    monkeypatch.setattr(graph, "DENSE_ROWS", dense_rows)
    text = tokenize(weights.tokenizer(), "The ship went down in the storm. " * 40)
    prompt, rest = [0, *text[:299]], text[299:330]
    logits: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
    for engine, found in zip((TorchEngine(layers, 2, 400), open_engine(weights, 2, 400)), logits, strict=True):
        engine.prefill(1, prompt[:200], 0)
        found.append(engine.prefill(1, prompt[200:], 200).clone())
        found.extend(engine.decode([1], [token])[0].clone() for token in rest)
    assert kld(*map(torch.stack, logits)) < 0.01  # 8-bit activations: see test_sources


def test_a_file_of_f32_is_computed_in_float32(made, tmp_path, monkeypatch):
    """Whatever the CPU multiplies faster: prompts layer by layer, and then tokens."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(graph, "DENSE_ROWS", 1)
    model = Model(next(made.glob("tiny-r1-*.gguf")))
    for name, tensor in model.tensors.items():
        if tensor.qtype != "F32":
            model.change(name, lambda t: t.with_values(t.values(), "F32"))
    path = model.write(tmp_path / "F32.gguf")
    engine, exact = open_engine(open_gguf(path, n_threads=1), 1, 400), open_source(path)
    tokens = [0, *tokenize(exact.tokenizer(), "The ship went down in the storm. " * 40)[:259]]
    rows = list[torch.Tensor]()
    engine.prefill(0, tokens[:-4], 0, lambda part: rows.append(part.clone()))
    rows += [engine.decode([0], [token]).clone() for token in tokens[-4:]]
    with torch.inference_mode():
        hidden = final_hidden(exact, torch.tensor([tokens]))[0]
        assert kld(head_logits(exact, exact.head(), hidden), torch.cat(rows)) < 1e-6
    assert open_engine(open_gguf(made / "tiny-r1-1.58bit.gguf"), 1, 400).by_layers.tiled.dtype == torch.bfloat16


def test_begin_forgets_what_stood_there(weights):
    engine = open_engine(weights, 1, 64)
    fresh = engine.prefill(0, [0, 50, 60, 70], 0).clone()
    engine.prefill(0, [0, 50, 300, 301, 302], 0)
    engine.decode([0], [99])
    assert torch.equal(engine.prefill(0, [0, 50, 60, 70], 0), fresh)


@pytest.mark.parametrize("slots", [[0, 1, 2, 3, 4], [4, 0, 2], [1, 2]])
def test_decoding_together_gives_the_same_bits(weights, slots):
    """Different lengths, orders and gaps between slots: each row equals the one computed alone, bit for bit."""
    engine = open_engine(weights, 5, 512)
    prompts = {slot: [0] + [40 + slot] * (3 + 90 * slot) for slot in slots}
    tokens = [100 + slot for slot in slots]
    for slot in slots:
        engine.prefill(slot, prompts[slot], 0)
    together = engine.decode(slots, tokens).clone()
    for row, slot, token in zip(together, slots, tokens, strict=True):
        engine.prefill(slot, prompts[slot], 0)
        assert torch.equal(engine.decode([slot], [token])[0], row)


def collect(scheduler: Scheduler, prompts: list[list[int]], n: int, how=GREEDY) -> list[list[int]]:
    found: list[list[int]] = [[] for _ in prompts]
    ends = [threading.Event() for _ in prompts]

    def emit(i: int):
        return lambda token, why: ends[i].set() if token is None else found[i].append(token)

    for i, prompt in enumerate(prompts):
        scheduler.submit(Job(prompt, n, how, emit(i)))
    assert all(end.wait(60) for end in ends)
    return found


def test_continuous_batching_equals_one_at_a_time(weights):
    """Twelve sequences over five slots: they join and leave at different steps."""
    prompts = [[0] + [30 + i, 60 + 7 * i] * (1 + 5 * i) for i in range(12)]
    alone = [list(generate(open_engine(weights, 1, 512), prompt, 8 + i, GREEDY)) for i, prompt in enumerate(prompts)]
    with Scheduler(open_engine(weights, 5, 512)) as scheduler:
        together = collect(scheduler, prompts, 19)
    assert [made[: 8 + i] for i, made in enumerate(together)] == alone
    assert len({tuple(made) for made in together}) > 6


def test_torch_engine_serves_several(layers):
    prompts = [[0, 50 + i, 60] for i in range(3)]
    with Scheduler(TorchEngine(layers, 3, 64)) as scheduler:
        assert all(len(made) == 6 for made in collect(scheduler, prompts, 6))


def served(engine: GraphEngine, monkeypatch, prompts: list[list[int]]) -> list[int]:
    """Whose piece was read, in order; the jobs come all at once and want one token."""
    slots: list[int] = []
    with monkeypatch.context() as patch, Scheduler(engine) as scheduler:
        compute = engine.prefill
        patch.setattr(engine, "prefill", lambda slot, *rest: slots.append(slot) or compute(slot, *rest))
        jobs = [Job(prompt, 1, GREEDY, lambda *_: None) for prompt in prompts]
        with scheduler.changed:  # it sees all of them or none
            for job in jobs:
                scheduler.submit(job)
        while not all(job.n_made for job in jobs):
            time.sleep(0.001)
    owner = {job.slot: i for i, job in enumerate(jobs)}
    return [owner[slot] for slot in slots]


def test_pieces_that_look_far_back_are_short(weights, monkeypatch):
    """By the position alone, so that a prompt is cut alike by `run` and by whoever shares the engine."""
    engine = open_engine(weights, 1, 512)
    r1 = {"d": 7168, "n_ff_exp": 2048, "n_used": 8, "n_shared": 1, "n_head": 128, "kv_lora": 512, "qk_rope": 64}
    assert generation.reach(dataclasses.replace(engine.config, **r1)) == 4269
    monkeypatch.setattr(generation, "reach", lambda _: 1000)
    assert [piece_at(engine, at) for at in (0, 1000, 1001, 2001, 4001, 10**6)] == [512, 512, 256, 128, 64, 64]
    monkeypatch.setattr(generation, "reach", lambda _: 64)
    sizes, compute = list[int](), engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda slot, ids, *rest: sizes.append(len(ids)) or compute(slot, ids, *rest))
    engine.piece = 128
    prompt = [0] + [50, 60, 70] * 100
    alone = list(generate(engine, prompt, 3, GREEDY))
    assert sizes == [128, 64, 64, 45]
    with Scheduler(engine) as scheduler:
        assert collect(scheduler, [prompt], 3) == [alone] and sizes[4:] == sizes[:4]


def test_prompts_take_turns(weights, monkeypatch):
    engine = open_engine(weights, 8, 512)
    engine.piece = 32
    long, short = [[0] + [50 + i] * 319 for i in range(3)], [[0, 60 + i, 70] for i in range(3)]
    order = served(engine, monkeypatch, [*long, *short])
    assert all(order.index(i) <= 3 for i in (3, 4, 5))  # they fit one piece together; one of a long one may come before
    rest = [i for i in order if i < 3]
    assert len(rest) == 30 and all(set(rest[i : i + 3]) == {0, 1, 2} for i in range(0, 24, 3))  # by turns
    order = served(engine, monkeypatch, [long[0], *([0] + [80 + i] * 31 for i in range(7))])
    assert [i == 0 for i in order[:14]].count(True) >= 6  # short ones without end take every second turn


def test_free_slots_go_to_short_ones_by_turns(weights, monkeypatch):
    """One slot: of six that wait, a short one passes the long ones, then who has waited longest has its turn."""
    engine = open_engine(weights, 1, 512)
    engine.piece = 32
    begun, compute = list[int](), engine.prefill

    def prefill(slot: int, ids: list[int], at: int, *rest) -> torch.Tensor:
        if not at:
            begun.append(ids[1] - 50)
        return compute(slot, ids, at, *rest)

    monkeypatch.setattr(engine, "prefill", prefill)
    jobs = [Job([0, 50 + i, *[60] * n], 1, GREEDY, lambda *_: None) for i, n in enumerate((99, 98, 97, 3, 2, 1))]
    with Scheduler(engine) as scheduler:
        with scheduler.changed:
            for job in jobs:
                scheduler.submit(job)
        while not all(job.n_made for job in jobs):
            time.sleep(0.001)
    assert begun == [5, 0, 4, 1, 3, 2]


def test_a_short_request_waits_for_two_pieces(weights, monkeypatch):
    """It comes while three long prompts are read; a fourth sequence is decoded meanwhile, a token for each piece."""
    engine = open_engine(weights, 5, 512)
    engine.piece, engine.config = 32, dataclasses.replace(engine.config, eos=-1)
    order, decoded = list[int](), list[int]()
    compute, decode = engine.prefill, engine.decode
    late = Job([0, 60, 70], 1, GREEDY, lambda *_: None)
    beside = Job([0, 61], 40, GREEDY, lambda *_: None)

    def prefill(slot: int, *rest):
        order.append(slot)
        if len(order) == 6:
            scheduler.submit(late)
        return compute(slot, *rest)

    monkeypatch.setattr(engine, "prefill", prefill)
    monkeypatch.setattr(engine, "decode", lambda slots, tokens: decoded.append(len(order)) or decode(slots, tokens))
    with Scheduler(engine) as scheduler:
        long = [Job([0] + [50 + i] * 319, 1, GREEDY, lambda *_: None) for i in range(3)]
        with scheduler.changed:
            for job in (beside, *long):
                scheduler.submit(job)
        while not all(job.n_made for job in (*long, late)):
            time.sleep(0.001)
    assert order.index(late.slot) <= 6 + 1
    assert all(b - a <= 2 for a, b in pairwise(decoded)) and len(decoded) >= 25


def test_scheduler_refuses_and_cancels(weights):
    engine = open_engine(weights, 1, 512)
    engine.config = dataclasses.replace(engine.config, eos=-1)  # no token ends a sequence
    with Scheduler(engine, queue_limit=1) as scheduler:
        ends: list[str] = []
        started = threading.Event()

        def job() -> Job:
            return Job(
                [0, 50],
                500,
                Sampling(temperature=1.5),
                lambda token, why: started.set() if token is not None else ends.append(why),
            )

        with pytest.raises(QuantkitError, match="do not fit a context of 512"):
            scheduler.submit(Job([0] * 20, 500, GREEDY, lambda *_: None))
        first, second = job(), job()
        scheduler.submit(first)
        assert started.wait(20)
        scheduler.submit(second)
        with pytest.raises(QueueFull):
            scheduler.submit(job())
        scheduler.cancel(second)
        scheduler.cancel(first)
    assert ends == ["cancelled"] * 2 and scheduler.slots.free == [0] and first.n_made < 500


def test_a_failing_step_ends_its_jobs_only(weights, monkeypatch, caplog):
    engine = open_engine(weights, 2, 64)
    with Scheduler(engine) as scheduler:
        monkeypatch.setattr(engine, "decode", lambda *_: 1 / 0)
        assert [len(made) for made in collect(scheduler, [[0, 50]], 5)] == [1]
        monkeypatch.undo()
        assert [len(made) for made in collect(scheduler, [[0, 50]], 5)] == [5]
    assert "ZeroDivisionError" in caplog.text


def test_generation_is_repeatable_and_seeded(weights):
    engine = open_engine(weights, 1, 64)

    def once(seed: int, **how) -> list[int]:
        return list(
            generate(engine, [0, 50, 60], 24, Sampling(**{"temperature": 1.5, "top_p": 1.0, "seed": seed} | how))
        )

    assert once(1) == once(1) != once(2)
    assert once(1, temperature=0) == once(2, temperature=0) == once(3, top_k=1)
    with pytest.raises(QuantkitError, match="64 prompt tokens do not fit"):
        next(generate(engine, [0] * 64, 1, GREEDY))


def test_sampling_keeps_only_what_it_should():
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0, -9.0]).repeat_interleave(400) + torch.rand(2000) * 1e-3
    p = logits.softmax(-1)

    def seen(**how) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        return {sample(logits, Sampling(temperature=1.0, **how), generator) for _ in range(300)}

    best = p.argsort(descending=True).tolist()
    assert seen(top_p=1.0, top_k=3) == set(best[:3])
    assert seen(top_p=1.0, min_p=0.5) <= set(best[:400])
    assert any(i >= 800 for i in seen(top_p=1.0))
    half = int((p[best].cumsum(0) < 0.5).sum()) + 1
    assert seen(top_p=0.5) <= set(best[:half])
    flat = torch.tensor([0.6, 0.1, 0.1, 0.1, 0.1]).log()  # entropy 1.23 nats: 0.51 of the surprise is nearest, not 2.30
    surprise = [(-float(x) - 1.2275) for x in flat]
    assert sorted(map(abs, surprise))[0] == pytest.approx(0.7167, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    drawn = {sample(flat, Sampling(1.0, 1.0, typical_p=0.5), generator) for _ in range(50)}
    assert drawn == {0} and {sample(flat, Sampling(1.0, 1.0), generator) for _ in range(200)} == set(range(5))


def test_typical_tokens_do_not_depend_on_threads():
    """Several choose where many sequences are decoded, each with one thread of torch's; few are left to all of them."""
    p = torch.randn(129280, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    before, found = torch.get_num_threads(), []
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            found.append(typical(p, 0.9))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found) and found[0].sum() == pytest.approx(1, abs=1e-3)
