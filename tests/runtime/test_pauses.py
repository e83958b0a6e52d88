"""Others' tokens in the middle of a prompt's piece: every engine, every way of its experts, the same bits."""

import pytest
import torch

from quantkit.runtime import forms
from quantkit.runtime.engines import gpu_layers, graph
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Engine
from quantkit.runtime.pauses import pause, pausing, wanted
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
    monkeypatch.setattr(gpu_layers, "SHORT_ROWS", 40)
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

    def others() -> None:
        assert not wanted()
        if len(beside) < len(tokens):
            beside.append(engine.decode([0, 2], [tokens[len(beside)]] * 2).clone())

    with pausing(others):
        found = engine.prefill(1, prompt, 0).clone()
    assert len(beside) == len(tokens)
    assert torch.equal(torch.stack(beside), torch.stack(alone))
    in_parts = way in ("experts on the CPU", "some resident")
    assert torch.equal(found, expected) or (in_parts and torch.allclose(found, expected, atol=1e-4))
    assert torch.equal(engine.prefill(1, prompt, 0), expected)


def test_nobody_waits():
    asked: list[int] = []
    pause()
    with pausing(lambda: asked.append(1)):
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
    with pausing(lambda: asked.append(1)):
        found = forms.absorbed(*given, 0.2)
    assert len(asked) == 4 and torch.equal(found, forms.absorbed(*given, 0.2))
