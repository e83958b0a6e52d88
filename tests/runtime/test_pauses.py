"""Others' tokens in the middle of a prompt's piece: every engine, every way of its experts, the same bits."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quantkit.runtime import forms
from quantkit.runtime.engines import embedding, gpu_layers, graph
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.experts import native
from quantkit.runtime.generate import Engine
from quantkit.runtime.pauses import Aside, pause, pausing, wanted
from quantkit.runtime.sources.gguf import GGUFSource, GGUFWeights, open_gguf
from quantkit.runtime.sources.quantized import Quantized

WAYS = ("graph", "torch", "experts on the CPU", "shared out", "streamed", "some resident", "resident")
COSTS = {
    "experts on the CPU": Costs(0, 0, 1, 1, 1),
    "shared out": Costs(1, 0, 100, 1, 1),
    "streamed": Costs(1, 1, 0, 1, 1),
}


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=2)


def engine_of(way: str, weights: GGUFWeights, monkeypatch) -> Engine:
    monkeypatch.setattr(graph, "DENSE_ROWS", 1)
    monkeypatch.setattr(gpu_layers, "SENT_ROWS", 40)
    monkeypatch.setattr(embedding, "ROWS", 100)
    monkeypatch.setattr(native, "SHORT_EXPERTS", 3)
    if way == "graph":
        return open_engine(weights, 3, 300)
    if way == "torch":
        return TorchEngine(GGUFSource(weights, Quantized(weights)), 3, 300)
    engine = GpuEngine(weights, 3, 300, {"resident": 3, "some resident": 0.4}.get(way, 0))
    engine.prompts.costs = COSTS.get(way, COSTS["experts on the CPU"])
    engine.hot.held = True  # what is exchanged between two prompts would round differently
    return engine


@pytest.mark.parametrize("way", WAYS)
def test_tokens_between_the_parts_of_a_prompt(weights, monkeypatch, way):
    engine = engine_of(way, weights, monkeypatch)
    prompt, tokens = [0, *range(300, 420)], [50, 60, 70, 80]
    expected = engine.prefill(1, prompt, 0).clone()
    for slot in (0, 2):
        engine.prefill(slot, [0, 40 + slot], 0)
    alone = [engine.decode([0, 2], [token, token]).clone() for token in tokens]
    for slot in (0, 2):
        engine.prefill(slot, [0, 40 + slot], 0)
    beside: list[torch.Tensor] = []
    parts: list[str] = []

    def others(what: str) -> None:
        assert not wanted()
        parts.append(what)
        if len(beside) < len(tokens):
            beside.append(engine.decode([0, 2], [tokens[len(beside)]] * 2).clone())

    with pausing(others):
        found = engine.prefill(1, prompt, 0).clone()
    assert len(beside) == len(tokens)
    assert torch.equal(torch.stack(beside), torch.stack(alone))
    assert torch.equal(found, expected)
    assert torch.equal(engine.prefill(1, prompt, 0), expected)
    if isinstance(engine, GpuEngine):
        n = engine.config.n_layer
        assert parts[:2] == ["embedding"] * 2 and parts.count("embedding") == 2
        assert parts.count("attention") == parts.count("feed-forward") == n
        assert set(parts[2:]) - {"experts", "experts on the CPU"} == {"attention", "feed-forward"}


@pytest.mark.parametrize("way", WAYS)
def test_tokens_beside_a_prompt_of_one(weights, monkeypatch, way):
    """Which may be a step itself, that another one must not begin in."""
    engine = engine_of(way, weights, monkeypatch)
    for slot in (0, 1):
        engine.prefill(slot, [0, 40 + slot], 0)
    expected, alone = engine.prefill(1, [300], 2).clone(), engine.decode([0], [50]).clone()
    engine.prefill(0, [0, 40], 0)
    beside: list[torch.Tensor] = []

    def others(what: str) -> None:
        if not beside:
            beside.append(engine.decode([0], [50]).clone())

    with pausing(others):
        found = engine.prefill(1, [300], 2).clone()
        pause()
    assert torch.equal(found, expected)
    assert torch.equal(beside[0], alone)


def test_decoders_are_loaded_before_somebody_waits_for_them(weights, monkeypatch):
    """Of every type that a piece layer by layer dequantizes, in its dtype."""
    engine, unpacked = open_engine(weights, 1, 300), list[tuple[str, torch.dtype]]()
    unpack = weights.unpack

    def watched(name: str, data, out: torch.Tensor, *most: int) -> torch.Tensor:
        unpacked.append((weights.file.tensors[name].qtype, out.dtype))
        return unpack(name, data, out, *most)

    monkeypatch.setattr(weights, "unpack", watched)
    monkeypatch.setattr(graph, "DENSE_ROWS", 1)
    engine.prepare()
    ready = set(unpacked)
    unpacked.clear()
    engine.prefill(0, [0, *range(300, 420)], 0)
    tiles = {(qtype, dtype) for qtype, dtype in unpacked if dtype == engine.by_layers.tiled.dtype}
    assert tiles and tiles <= ready


def test_nobody_waits():
    asked: list[int] = []
    pause()
    with pausing(lambda _: asked.append(1)):
        pause()
        with pausing(None):
            pause()
            assert not wanted()
    pause()
    assert asked == [1] and not wanted()


def test_attention_lets_others_in_after_every_tile(monkeypatch):
    """A long text's is one part otherwise."""
    monkeypatch.setattr(forms, "QUERY_TILE", 32)
    draw = torch.Generator().manual_seed(0)
    shapes = (1, 100, 2, 16), (1, 100, 2, 8), (1, 300, 16), (1, 300, 8)
    given = [torch.randn(shape, generator=draw) for shape in shapes]
    asked: list[int] = []
    with pausing(lambda _: asked.append(1)):
        found = forms.absorbed(*given, 0.2)
    assert len(asked) == 4 and torch.equal(found, forms.absorbed(*given, 0.2))


def test_another_thread_rests_while_others_have_their_turn():
    """It goes on only afterwards, and is waited for with pauses, at the end too."""
    go, done, steps, turns = threading.Semaphore(0), threading.Semaphore(0), list[int](), list[str]()

    def work() -> int:
        for i in range(4):
            go.acquire()
            steps.append(i)
            done.release()
            pause()
        return len(steps)

    def others(what: str) -> None:
        turns.append(what)
        if len(turns) == 1:
            go.release(2)
            done.acquire()  # its part under way ends
            assert not done.acquire(timeout=0.05) and steps == [0]
        else:
            go.release()

    with ThreadPoolExecutor(1) as thread, pausing(others):
        aside = Aside(work, thread)
        with aside.resting():
            pause(what="experts")
            assert done.acquire(timeout=60)
            assert aside.result("the rest") == 4
        assert wanted()
    assert turns[0] == "experts" and set(turns[1:]) == {"the rest"}


def test_nobody_waits_for_another_thread():
    with ThreadPoolExecutor(1) as thread:
        aside = Aside(lambda: wanted(), thread)
        with aside.resting():
            pause()
            assert aside.result("nothing") is False
        failing = Aside(lambda: 1 // 0, thread)
        with pytest.raises(ZeroDivisionError):
            failing.result("nothing")
