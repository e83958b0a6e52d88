"""The GPU's engine: on the CPU (no graphs, no Triton) against exact ones, and with `-m gpu` on the device."""

import json
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from quantkit import bundle
from quantkit.codecs import registry
from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.models.tokenizer import tokenize
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime import packed
from quantkit.runtime.engines import embedding, gpu, gpu_buffers, gpu_layers, gpu_memory, heat, warm_up
from quantkit.runtime.engines import step as steps
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_buffers import rows_of
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.prompts import Costs
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Engine, Piece, piece_at
from quantkit.runtime.native.library import native
from quantkit.runtime.pauses import pausing
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf, open_source

CPU, BUS = Costs(0, 0, 1, 1, 1), Costs(1, 1, 0, 1, 1)  # who computes a prompt's experts: the CPU; the GPU, all moved;
BOTH = Costs(1, 0, 100, 1, 1)  # half of those that are chosen each
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def weights(path) -> GGUFWeights:
    return open_gguf(path, n_threads=1)


def text(weights: GGUFWeights, n: int) -> list[int]:
    return [0, *tokenize(weights.tokenizer(), "The ship went down in the storm. " * 60)[: n - 1]]


def logits(engine: Engine, tokens: list[int]) -> torch.Tensor:
    """A prompt in two pieces, then tokens past the first KV_STEP; slot 0 is left unused. tokens: 270."""
    found = [engine.prefill(1, tokens[:130], 0).clone(), engine.prefill(1, tokens[130:250], 130).clone()]
    return torch.stack(found + [engine.decode([1], [token])[0].clone() for token in tokens[250:]])


def kld(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.fixture(scope="module")
def exact(path, weights) -> torch.Tensor:
    return logits(TorchEngine(open_source(path), 2, 300), text(weights, 270))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "gpu_layers, costs, error",
    [
        *((0, costs, 2e-3) for costs in (CPU, BOTH, BUS)),
        *((0.4, costs, 2e-3) for costs in (CPU, BOTH, BUS)),
        (1, BUS, 2e-3),
        (3, BUS, 1e-6),
    ],
)
def test_agrees_with_the_dequantized_file(path, weights, exact, monkeypatch, device, gpu_layers, costs, error):
    """Experts on the CPU (8-bit activations), moved, both, some of each layer in GPU memory, and all."""
    monkeypatch.setattr(heat, "LAYER_SECONDS", 0.0)  # such a small model is faster with whole layers
    engine = GpuEngine(open_gguf(path, device, n_threads=1), 2, 300, gpu_layers)
    assert len(engine.hot.layers) == (3 if gpu_layers == 0.4 else 0)
    engine.prompts.costs = costs
    assert kld(exact, logits(engine, text(weights, 270))) < (error if device == "cpu" else 2e-3)


def most_apart(device: str, gpu_layers: int) -> float:
    """KLD between logits of several rows at once and of each alone. On a GPU one row is multiplied as integers of 16
    bits, more as float16; experts on the CPU round activations to 8 bits, so that little differences grow."""
    if device == "cpu":
        return 1e-6
    return 5e-4 if gpu_layers == 3 else 5e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gpu_layers", [2, 3])
def test_several_sequences(path, device, gpu_layers):
    """Of different lengths, in any order of slots: each gets what it gets alone."""
    weights = open_gguf(path, device, n_threads=1)
    engine = GpuEngine(weights, 3, 300, gpu_layers)
    prompts = {slot: text(weights, n) for slot, n in ((0, 5), (1, 260), (2, 30))}
    for _ in range(2):  # on a GPU the second time with captured graphs
        for slot, prompt in prompts.items():
            engine.prefill(slot, prompt, 0)
        together = engine.decode([2, 0, 1], [50, 60, 70]).clone()
    for row, slot, token in zip(together, (2, 0, 1), (50, 60, 70), strict=True):
        engine.prefill(slot, prompts[slot], 0)
        assert kld(engine.decode([slot], [token]), row[None]) < most_apart(device, gpu_layers)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gpu_layers", [0, 3])
def test_prompts_are_read_together(path, device, gpu_layers):
    """Beginnings and another one's next piece, with all of their logits or not: as each alone, and decoding goes on."""
    engine = GpuEngine(open_gguf(path, device, n_threads=1), 4, 300, gpu_layers)
    tokens, told = text(engine.weights, 270), [[], []]
    # On a GPU one token alone goes through integers of 16 bits, beside many through bfloat16 (0.0025 on an H200);
    # experts on the CPU round activations to 8 bits (0.0020).
    most = 5e-3 if device == "cuda" or not gpu_layers else 1e-6
    pieces = [
        Piece(2, tokens[:90], 0, lambda rows: told[0].append(rows.clone())),
        Piece(0, tokens[130:140], 130),
        Piece(3, tokens[7:8], 0, lambda rows: told[1].append(rows.clone())),
    ]
    for _ in range(2):
        engine.prefill(0, tokens[:130], 0)
        found = engine.prefill_together(pieces).clone()
    after = engine.decode([0, 2, 3], [50, 60, 70]).clone()
    alone = list[torch.Tensor]()
    for slot, some, begin, _ in pieces:
        engine.prefill(0, tokens[:130], 0)
        each = list[torch.Tensor]()
        alone.append(engine.prefill(slot, some, begin, lambda rows, each=each: each.append(rows.clone())).clone())
        if slot:
            assert kld(torch.cat(each), torch.cat(told[slot == 3][-len(each) :])) < most
    assert kld(torch.stack(alone), found) < most
    engine.prefill(0, tokens[:130], 0)
    engine.prefill(0, tokens[130:140], 130)
    assert kld(engine.decode([0, 2, 3], [50, 60, 70]), after) < most


@pytest.mark.parametrize("device", DEVICES)
def test_short_prompts_are_a_step(path, device):
    """Of two sequences, one of which goes on: all logits are those of the exact file, also of what is decoded next."""
    engine = GpuEngine(open_gguf(path, device, n_threads=1), 3, 300, 3)
    other = TorchEngine(open_source(path), 3, 300)
    assert engine.by_steps
    tokens, told = text(engine.weights, 200), []
    for one in (engine, other):
        one.prefill(1, tokens[:100], 0)
    pieces = [
        Piece(1, tokens[100:120], 100, lambda rows: told.append(rows.clone())),
        Piece(2, tokens[:30], 0, None),
    ]
    most = 1e-4 if device == "cuda" else 1e-6
    for _ in range(3):  # on a GPU from the second time on by a captured graph
        told.clear()
        last = engine.prefill_together(pieces).clone()
        each = list[torch.Tensor]()
        expected = [other.prefill(1, tokens[100:120], 100, lambda rows, each=each: each.append(rows.clone())).clone()]
        expected.append(other.prefill(2, tokens[:30], 0).clone())
        assert kld(torch.cat(each), torch.cat(told)) < most and kld(torch.stack(expected), last) < most
    found, expected = (one.decode([2, 1], [5, 6]).clone() for one in (engine, other))
    assert kld(expected, found) < most


def test_it_says_that_experts_are_reached_by_copies(path, caplog):
    """Where the GPU cannot wait for the CPU itself, which is slower."""
    engine = GpuEngine(open_gguf(path, "cpu", n_threads=1), 1, 64, 1)
    on_gpu, sizes = np.ones((3, 16), bool), np.zeros(3, np.int64)
    with caplog.at_level("INFO"):
        engine.on_gpu = True
        engine._say(on_gpu, sizes)
        assert "CUDA_LAUNCH_BLOCKING" not in caplog.text
        on_gpu[1] = False
        engine._say(on_gpu, sizes)
    assert "CUDA_LAUNCH_BLOCKING" in caplog.text


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("gpu_layers", [1, 3])
def test_rows_that_are_too_many(path, device, gpu_layers):
    """Five sequences in a step of six rows: each gets what it gets alone, and so does the next step."""
    engine = GpuEngine(open_gguf(path, device, n_threads=1), 6, 64, gpu_layers)
    assert rows_of(5) == 6
    # Text, whose experts are chosen by margins: of tokens at random one is nearly another's equal, and 0.5 apart.
    tokens = text(engine.weights, 60)
    prompts = [tokens[7 * slot : 10 + 8 * slot] for slot in range(5)]
    after = [tokens[10 + 8 * slot : 13 + 8 * slot] for slot in range(5)]
    for slot in range(5):
        engine.prefill(slot, prompts[slot], 0)
    slots, found = [3, 0, 4, 1, 2], []
    for step in range(3):  # on a GPU the second one with a captured graph
        found.append(engine.decode(slots, [after[slot][step] for slot in slots]).clone())
    for row, slot in enumerate(slots):
        engine.prefill(slot, prompts[slot], 0)
        for step in range(3):
            alone = engine.decode([slot], [after[slot][step]])
            assert kld(alone, found[step][row : row + 1]) < most_apart(device, gpu_layers)


def test_through_mapped_memory(weights, monkeypatch):
    """By the kernels that write and read the host's memory, interpreted, answered by compiled code alone or by Python:
    the same bits as by copies."""
    pytest.importorskip("triton")
    engine = GpuEngine(weights, 2, 300, 0)
    engine.prefill(0, text(weights, 8), 0)
    engine.prefill(1, text(weights, 12), 0)
    found = []
    for mapped in (False, True, True):
        engine.buffers.mapped, engine.length = mapped, [8, 12]
        found.append(engine.decode([1, 0], [300, 301]).clone())
        if mapped:
            assert native() is None or all(engine.buffers.exchanges.values())
            monkeypatch.setattr(engine.buffers, "_exchange", lambda *_: None)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert (engine.buffers.seen[1:, :2] == engine.buffers.step).all()  # layer 0 is dense


def test_no_memory_for_graphs(weights, monkeypatch, capsys):
    """The step that was computed counts; later ones are computed without a graph."""
    engine = GpuEngine(weights, 1, 64, 3)
    engine.prefill(0, text(weights, 8), 0)
    usual = engine.decode([0], [300]).clone()

    def full(key) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine.length, engine.captures = [8], True
    monkeypatch.setattr(engine, "_capture", full)
    assert torch.equal(engine.decode([0], [300]), usual) and not engine.steps
    assert "not enough GPU memory" in " ".join(capsys.readouterr().err.split())


def test_a_step_is_captured_when_it_comes_again(weights, monkeypatch):
    """Not at once: whoever waits for its tokens would wait for both."""
    engine, done = GpuEngine(weights, 2, 600, 3), list[str]()
    engine.captures = True

    def capture(key) -> None:
        done.append("captured")
        engine.steps[key] = [("graph", [])]

    monkeypatch.setattr(engine, "_capture", capture)
    monkeypatch.setattr(engine, "_replay", lambda step: done.append("replayed"))
    monkeypatch.setattr(engine, "_pieces", lambda *key: iter([done.append("computed")][:0]))
    for slots, length in (([0], 8), ([0], 9), ([0], 10), ([0, 1], 8), ([0], 300), ([0, 1], 8), ([0], 301)):
        engine.length[:] = [length] * 2
        engine.decode(slots, [300] * len(slots))
    again = ["captured", "replayed"]
    assert done == ["computed", *again, "replayed", "computed", "computed", *again, *again]


def test_an_engine_warms_up_for_the_longest_pieces(weights, monkeypatch):
    """At the beginning, behind a piece of the beginning, at the context's end; and it is as new afterwards."""
    engine, seen = GpuEngine(weights, 3, 2048, 3), list[tuple[int, int]]()
    engine.piece, attend = 512, warm_up.attention
    expected = engine.prefill(0, text(weights, 12), 0).clone()

    def attention(h, layer, c, cache, pieces):
        seen.append((pieces.pieces[0].begin, len(h)))
        return attend(h, layer, c, cache, pieces)

    monkeypatch.setattr(warm_up, "attention", attention)
    warm_up.warm_up(engine)
    last = piece_at(engine, 2048)
    assert seen == [(0, 512), (512, piece_at(engine, 512)), (2048 - last, last)]
    assert engine.length == [0, 0, 0] and torch.equal(engine.prefill(0, text(weights, 12), 0), expected)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_embedding_of_a_prompt(weights, monkeypatch, kernel):
    """By parts, of a type with a kernel and of one without: what `embed` gives."""
    monkeypatch.setattr(embedding, "ROWS", 7)
    monkeypatch.setattr(embedding.registry, "in_groups", lambda qtype: kernel)
    ids, c = text(weights, 20), weights.config
    expected = weights.embed(torch.tensor([ids]), torch.empty(1, 20, c.d))
    embed, asked = embedding.Embedding(weights), list[str]()
    with pausing(asked.append):
        found = embed(ids)
    assert torch.equal(found, expected[0]) and asked == ["embedding"] * 3
    with pytest.raises(QuantkitError, match=str(c.n_vocab)):
        embed([0, c.n_vocab])


@pytest.mark.gpu
@pytest.mark.parametrize("n_layers", [0, 3])
def test_a_gpu_without_triton(path, exact, monkeypatch, n_layers):
    """Nothing is captured, as torch's products wait for the GPU, and no prompt is a step."""
    for module in (packed, gpu, gpu_buffers, gpu_layers, steps):
        monkeypatch.setattr(module, "use_kernels", lambda kind: False)
    monkeypatch.setattr(packed, "_every", packed._every.__wrapped__)  # what is kept may be for kernels
    weights = open_gguf(path, "cuda", n_threads=1)
    engine = GpuEngine(weights, 2, 300, n_layers)
    assert kld(exact, logits(engine, text(weights, 270))) < 5e-3
    assert not (engine.steps or engine.by_steps or engine.buffers.mapped)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_an_error_of_the_cpu_ends_the_step_only(path, compiled):
    """The GPU waits for the CPU's experts in the middle of a graph: not for those that will never come."""
    engine = GpuEngine(open_gguf(path, "cuda", n_threads=1), 1, 64, 0)
    engine.prefill(0, list(range(8)), 0)
    usual = [engine.decode([0], [300]).clone() for engine.length[0] in (8, 8)][1]
    layer = engine.layers[-1]
    experts, layer.on_cpu, engine.length[0] = layer.on_cpu, Broken(compiled), 8
    with pytest.raises(ZeroDivisionError):
        engine.decode([0], [300])
    layer.on_cpu, engine.length[0] = experts, 8
    assert torch.equal(engine.decode([0], [300]), usual)


class Broken:
    """Experts that cannot be computed, by one call of compiled code or by Python."""

    def __init__(self, compiled: bool):
        self.compiled = compiled

    def wake(self) -> None:
        pass

    def exchange(self, _):
        return self if self.compiled else None

    def __call__(self, *_) -> torch.Tensor:
        raise ZeroDivisionError


def test_what_was_launched_ends_with_the_step(weights, monkeypatch):
    """After an error, or an interruption, of the CPU the GPU is waited for, which waits for nothing any more: what the
    next step sends is not taken for this one's."""
    engine, done = GpuEngine(weights, 1, 64, 0), list[object]()
    buffers, last = engine.buffers, len(engine.layers) - 1
    graph = SimpleNamespace(replay=lambda: done.append("launched"))
    step = [(graph, [gpu.Wait("receive", last)]), (graph, []), (graph, [gpu.Wait("end", -1)])]
    engine.layers[last].on_cpu, buffers.mapped = Broken(True), True
    monkeypatch.setattr(engine, "_kept", lambda key: step)
    monkeypatch.setattr(buffers, "_rest", lambda: done.append(buffers.told[:, 0].tolist()))
    with pytest.raises(ZeroDivisionError):
        engine.decode([0], [300])
    assert done == ["launched", "launched", [buffers.step] * len(engine.layers)]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "_replay", lambda step: None)
        patch.setattr(buffers, "logits", Mock(side_effect=KeyboardInterrupt))
        engine.decode([0], [300])
    assert done[3:] == [[buffers.step] * len(engine.layers)]


def test_a_prompt_of_one_token(weights):
    engine = GpuEngine(weights, 1, 300, 3)
    alone = engine.prefill(0, [0], 0).clone()
    engine.prefill(0, text(weights, 40), 0)
    assert torch.equal(engine.prefill(0, [0], 0), alone)


def test_types_without_kernel(weights, monkeypatch, caplog):
    """Their experts stay on the CPU, other matrices are kept dequantized."""
    usual = logits(GpuEngine(weights, 2, 300, 0), text(weights, 270))
    in_groups = registry.in_groups
    monkeypatch.setattr(registry, "in_groups", lambda name: name not in ("IQ1_S", "Q4_K") and in_groups(name))
    engine = GpuEngine(weights, 2, 300, 9)
    assert "its experts stay on the CPU" in caplog.text and "kept as" in caplog.text
    assert kld(usual, logits(engine, text(weights, 270))) < 2e-3


def test_a_broken_transfer_ends_the_prompt_only(weights, monkeypatch):
    engine = GpuEngine(weights, 1, 300, 0)
    engine.prompts.costs = BUS
    tokens = text(weights, 140)
    good = engine.prefill(0, tokens, 0).clone()
    ring, move = engine.ring, engine.ring._move
    monkeypatch.setattr(ring, "_move", lambda i, *rest: 1 / 0 if i == 2 else move(i, *rest))
    with pytest.raises(ZeroDivisionError):
        engine.prefill(0, tokens, 0)
    monkeypatch.undo()
    assert torch.equal(engine.prefill(0, tokens, 0), good)


@pytest.mark.parametrize("costs", [BOTH, BUS])
def test_made_in_inference_mode(weights, costs):
    """As verification does: the threads that move and compute experts are not in that mode by themselves."""
    found, tokens = [], text(weights, 140)
    for inside in (True, False):
        with torch.inference_mode(inside):
            engine = GpuEngine(weights, 1, 300, 0)
            engine.prompts.costs = costs
            found.append(engine.prefill(0, tokens, 0))
    assert torch.equal(*found)


def test_gpu_layers_without_gpu(weights):
    with pytest.raises(QuantkitError, match="--gpu-layers 3: needs a GPU"):
        open_engine(weights, 1, 64, 3)
    with pytest.raises(QuantkitError, match="--gpu-layers 40%: needs a GPU"):
        open_engine(weights, 1, 64, 0.4)


def test_r1_fits_in_14_gb():
    """Weights of the 1.58-bit recipe but for routed experts, a cache of 8,192 tokens, and a piece's workspace."""
    c = family.from_hf(json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text()))
    plan = make_plan(family.specs(c), Recipe.load("1.58bit"), "llama.cpp", "r1")
    parts = gpu_memory.fixed_bytes({tensor.name: tensor for tensor in plan.tensors}, c, 8192)
    print(parts, {n: gpu_memory.workspace(c, n) for n in gpu_memory.PIECES})
    assert sum(parts.values()) + gpu_memory.workspace(c, gpu_memory.PIECES[-1]) + gpu_memory.SPARE < 14e9
