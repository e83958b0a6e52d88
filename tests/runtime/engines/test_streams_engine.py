"""DeepSeek-V4 token by token: whatever pieces a text comes in, what is computed is what transformers' model computes of
the whole text."""

from collections.abc import Iterable
from functools import cache

import pytest
import torch
from v4_models import T, made

from quantkit.errors import QuantkitError, out_of_memory
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime import compressed, compressed_cache
from quantkit.runtime.engines.streams import StreamsEngine
from quantkit.runtime.generate import Sampling, generate
from quantkit.runtime.pauses import pausing
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.serving.scheduler import Job, Scheduler

pytestmark = pytest.mark.skipif(not hf.available(), reason="needs transformers")
MODELS = [((0, 4, 128), 512), ((4,), 16)]  # the second chooses 16 of 80 entries


@pytest.fixture(scope="module", params=MODELS, ids=["all", "choosing"])
def small(request):
    return made(*request.param)


@pytest.fixture(scope="module")
def engine(small) -> StreamsEngine:
    made = StreamsEngine(CheckpointSource(Checkpoint.open(small.folder)), 3, T)
    for layer in made.layers:  # so small that every token need not decode its experts anew
        layer.experts.read = cache(layer.experts.read)
    return made


def read(engine: StreamsEngine, tokens: list[int], sizes: Iterable[int], slot: int = 0, begin: int = 0) -> torch.Tensor:
    """Logits of all tokens from `begin` on, [n, n_vocab], in pieces of these sizes, and then one by one."""
    rows: list[torch.Tensor] = []
    for n in sizes:
        engine.prefill(slot, tokens[begin : begin + n], begin, lambda logits: rows.append(logits.clone()))
        begin += n
    rows += [engine.decode([slot], [token]).clone() for token in tokens[begin:]]
    return torch.cat(rows)


@pytest.mark.parametrize(
    "sizes",
    [[T], [128, 128, 64], [3, 1, 130, 5, 120, 61], [1], [126, 3, 127]],
    ids=lambda sizes: "-".join(map(str, sizes)),
)
def test_pieces_are_the_whole_text(engine, small, sizes):
    found = divergence(small.logits[0], read(engine, small.tokens[0].tolist(), sizes))
    print(f"pieces of {sizes}, then one by one: KLD from transformers {found:.1e}")
    assert found < 1e-6


@pytest.mark.parametrize("begin", [0, 2, 127, 128, 131, 259, 300, T - 1])
def test_a_text_can_go_on_otherwise_from_anywhere(engine, small, begin):
    """Back over borders of blocks, after another text stood there, in one piece and one by one."""
    tokens = small.tokens[0].tolist()
    read(engine, tokens[:begin] + [5] * (T - begin), [T])
    for sizes, end in (([T], T), ([2], begin + 20)):
        assert divergence(small.logits[0, begin:end], read(engine, tokens[:end], sizes, begin=begin)) < 1e-6


def test_keys_that_nobody_reads_again_are_dropped(engine, small, monkeypatch, capsys):
    """The same bits as with all of them; and where a text is taken back further than they reach, the same text."""
    monkeypatch.setattr(compressed_cache, "KEPT", 96)
    few = StreamsEngine(engine.source, 1, T)
    few.layers = engine.layers
    assert {cache.keys.shape[1] for cache in few.slots[0].caches} == {128}
    tokens = small.tokens[0].tolist()
    for sizes in ([T], [126, 3, 127], [200, 90]):
        assert torch.equal(read(few, tokens, sizes), read(engine, tokens, sizes))
    assert "computed again" not in capsys.readouterr().err  # another text is not the same one taken back
    computed, hidden = list[int](), few._hidden
    monkeypatch.setattr(few, "piece", 100)
    monkeypatch.setattr(few, "_hidden", lambda kept, ids: computed.append(len(ids[0])) or hidden(kept, ids))
    for begin, from_start in ((300, False), (131, True), (290, False)):
        computed.clear()
        assert divergence(small.logits[0, begin:], read(few, tokens, [T - begin], begin=begin)) < 1e-6
        assert (sum(computed) == T) == from_start and sum(computed) <= (T if from_start else T - begin + 131), computed
    read(few, tokens, [T])

    def stopped(kept, ids):
        if few.slots[0].caches[0].length:  # behind the first piece of what is computed again
            raise KeyboardInterrupt
        return hidden(kept, ids)

    monkeypatch.setattr(few, "_hidden", stopped)
    with pytest.raises(KeyboardInterrupt):
        read(few, tokens, [T - 131], begin=131)
    monkeypatch.setattr(few, "_hidden", hidden)
    assert divergence(small.logits[0, 131:], read(few, tokens, [T - 131], begin=131)) < 1e-6


def test_sequences_do_not_disturb_each_other(engine, small):
    """Of different lengths, decoded together."""
    tokens = small.tokens[0].tolist()
    lengths = {2: 250, 0: 3, 1: 126}
    for slot, n in lengths.items():
        engine.prefill(slot, tokens[:n], 0)
    rows: list[torch.Tensor] = []
    for i in range(6):
        rows.append(engine.decode([*lengths], [tokens[n + i] for n in lengths.values()]).clone())
    for found, n in zip(torch.stack(rows, 1), lengths.values(), strict=True):
        assert divergence(small.logits[0, n : n + 6], found) < 1e-6


def test_tokens_between_the_parts_of_a_prompt(engine, small, monkeypatch):
    """After every tile of attention, those of the indexer's scores too, not at the end of a layer; the same bits."""
    monkeypatch.setattr(compressed, "QUERY_TILE", 64)
    monkeypatch.setattr(compressed, "SCORE_ELEMENTS", 1 << 16)
    tokens, c = small.tokens[0].tolist(), engine.config
    expected = engine.prefill(1, tokens, 0).clone()
    asked, beside = list[int](), list[torch.Tensor]()

    def begun() -> None:
        for slot, n in ((0, 3), (2, 126)):
            engine.prefill(slot, tokens[:n], 0)

    def step(i: int) -> torch.Tensor:
        return engine.decode([0, 2], [tokens[3 + i], tokens[126 + i]]).clone()

    def others(_: str) -> None:
        asked.append(1)
        if len(beside) < 20:
            beside.append(step(len(beside)))

    begun()
    alone = [step(i) for i in range(20)]
    begun()
    with pausing(others):
        assert torch.equal(engine.prefill(1, tokens, 0), expected)
    assert torch.equal(torch.stack(beside), torch.stack(alone))
    tiles, choosing = -(-T // 64), c.indexer.top_k < T // 4
    assert len(asked) >= c.n_layer * (2 + tiles) + 2 * choosing


def test_an_interrupted_step_is_computed_again(engine, small, monkeypatch):
    tokens = small.tokens[0].tolist()
    read(engine, tokens[:200], [200])
    with monkeypatch.context() as patch:
        last = engine.layers[-1]
        patch.setattr(last, "feed", None)
        patch.setattr(last, "experts", None)  # ends the step after all caches took the token
        with pytest.raises(AssertionError):
            engine.decode([0], [7])
        patch.setattr(last, "kv", None)  # and before the last one did
        with pytest.raises(TypeError):
            engine.decode([0], [7])
    assert divergence(small.logits[0, 200:], read(engine, tokens, [], begin=200)) < 1e-6


def test_served_text_is_that_of_one_at_a_time(engine, small):
    tokens, how = small.tokens[0].tolist(), Sampling(temperature=0)
    prompts = [tokens[:n] for n in (5, 130, 40, 9)]
    alone = [list(generate(engine, prompt, 5, how)) for prompt in prompts]
    found: list[list[int]] = [[] for _ in prompts]
    ends: list[str | None] = []

    def emit(i: int):
        return lambda token, why: ends.append(why) if token is None else found[i].append(token)

    with Scheduler(engine) as scheduler:
        for i, prompt in enumerate(prompts):
            scheduler.submit(Job(prompt, 5, how, emit(i)))
        while len(ends) < len(prompts):
            scheduler.thread.join(0.01)
    assert found == alone and set(ends) == {"length"}


def test_a_context_has_an_end(engine, small):
    tokens = small.tokens[0].tolist()
    engine.prefill(0, tokens, 0)
    for call in (lambda: engine.decode([0], [5]), lambda: engine.prefill(0, [5], T)):
        with pytest.raises(QuantkitError, match=f"{T + 1} tokens do not fit a context of {T}"):
            call()


def test_a_context_beyond_memory_ends_before_the_first_prompt(small):
    with pytest.raises(RuntimeError) as caught:
        StreamsEngine(CheckpointSource(Checkpoint.open(small.folder)), 1, 10**13)
    assert out_of_memory(caught.value) == "memory"
