"""Single experts in GPU memory: which ones at first, and that exchanging them changes nothing but who computes."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import load_imatrix, save_imatrix
from quantkit.models.tokenizer import tokenize
from quantkit.runtime.activations import Activations
from quantkit.runtime.engines import heat, hot
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_layers import chosen
from quantkit.runtime.engines.gpu_load import calibrated
from quantkit.runtime.engines.gpu_memory import Able, kept_experts
from quantkit.runtime.engines.heat import Heat, best, hottest
from quantkit.runtime.engines.prompts import Costs, n_moved, places
from quantkit.runtime.engines.stacks import Stacks
from quantkit.runtime.engines.step import ByTorch
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.packed import Packed
from quantkit.runtime.sources.gguf import open_gguf, open_source
from quantkit.tensors import Importance

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def path(made) -> Path:
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def exact(path):
    return open_source(path)


def kld(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def opened(path: Path, monkeypatch, device: str = "cpu", share: float = 0.3) -> GpuEngine:
    """With some experts of every layer, the same whatever calibration says: the first ones."""
    with monkeypatch.context() as patch:
        patch.setattr("quantkit.runtime.engines.gpu.calibrated", lambda *_: None)
        return GpuEngine(open_gguf(path, device, n_threads=1), 3, 200, share)


def consistent(engine: GpuEngine) -> bool:
    """Tables of both sides, frames and what they hold."""
    found = []
    for i, layer in engine.hot.layers.items():
        table = layer.table.cpu().tolist()
        found.append(table == engine.hot.tables_host[i].tolist())
        found += [table[e] == frame for frame, e in enumerate(layer.experts) if e >= 0]
        found.append(sum(frame >= 0 for frame in table) == sum(e >= 0 for e in layer.experts))
        found.append(np.flatnonzero(engine.hot.here[i]).tolist() == sorted(e for e in layer.experts if e >= 0))
        for stack, matrix in zip(layer.stacks, layer.matrices, strict=True):
            data = matrix.data.cpu().numpy()
            found += [(data[frame] == stack.data[e]).all() for frame, e in enumerate(layer.experts) if e >= 0]
    return all(found)


class Exactly:
    """Experts on the CPU without rounding of activations: then every step must be the exact file's."""

    def __init__(self, engine: GpuEngine, stacks: Stacks):
        data = [(stack.qtype, torch.from_numpy(stack.data.copy()), stack.n_in, torch.float32) for stack in stacks]
        self.matrices, self.between = tuple(Packed(*parts) for parts in data), ByTorch(engine.config)

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = chosen(Activations(x), self.matrices, self.between, ids.int().clamp_min(-1))
        return (y.view(*weight.shape, -1) * weight[..., None]).sum(1)

    def wake(self) -> None: ...

    def exchange(self, _) -> None: ...


@pytest.mark.parametrize("device", DEVICES)
def test_exchanged_while_decoding(path, exact, monkeypatch, device):
    """Three sequences of different lengths, prompts in between; every step's logits are those of the exact file."""
    engine, other = opened(path, monkeypatch, device), TorchEngine(exact, 3, 200)
    for layer in engine.hot.layers:
        engine.layers[layer].on_cpu = Exactly(engine, engine.layers[layer].stacks)
    engine.prompts.costs = Costs(0, 0, 1, 1, 1)
    monkeypatch.setattr(hot, "BACKGROUND", 1.0)  # or so few tokens would exchange little
    text = tokenize(exact.tokenizer(), "The ship went down in the storm, and nobody came home. " * 20)
    worst, rates, begun = 0.0, [], 0
    for step in range(60):
        if step in (0, 30):  # the second time while something may be on its way
            for slot, n in enumerate((3, 20, 40)):
                found, expected = (one.prefill(slot, text[:n], 0).clone() for one in (engine, other))
                worst = max(worst, kld(expected[None], found[None]))
        slots, tokens = [2, 0, 1], text[50 + step : 53 + step]
        found, expected = (one.decode(slots, tokens).clone() for one in (engine, other))
        worst = max(worst, kld(expected, found))
        if engine.hot.moving is not None:
            begun += 1
            assert any(-1 in layer.experts for layer in engine.hot.layers.values())
            if step % 3:
                engine.hot.settle()
        assert engine.hot.moving is not None or consistent(engine)
        rates.append((engine.hot.hits, engine.hot.chosen))
    engine.hot.settle()
    assert worst < (1e-5 if device == "cpu" else 1e-2) and consistent(engine)
    assert begun > 5 and engine.hot.moved >= begun
    first, last = rates[9], np.subtract(rates[-1], rates[39])
    assert last[0] / last[1] > first[0] / first[1]  # it learns what this text chooses


def test_bytes_moved_are_bounded(path, monkeypatch):
    engine = opened(path, monkeypatch)
    size = engine.hot.buffer.numel() / hot.AT_ONCE
    for i in range(80):
        engine.decode([0], [50 + i])
        engine.hot.settle()
        missed = engine.hot.chosen - engine.hot.hits
        assert engine.hot.moved * size <= hot.BACKGROUND * missed * size
    assert engine.hot.moved


def test_prompts_hold_the_frames_still(path, monkeypatch):
    engine = opened(path, monkeypatch)
    monkeypatch.setattr(hot, "BACKGROUND", 100.0)
    with engine.hot.still():
        for i in range(20):
            engine.decode([0], [50 + i])
    assert engine.hot.moving is None and not engine.hot.moved and not engine.hot.chosen
    for _ in range(10):
        engine.decode([0], [70])
    assert engine.hot.moving is not None or engine.hot.moved


def test_a_copy_that_fails_is_said_and_decoding_goes_on(path, exact, monkeypatch, caplog):
    engine, other = opened(path, monkeypatch), TorchEngine(exact, 1, 200)
    monkeypatch.setattr(hot, "BACKGROUND", 100.0)
    monkeypatch.setattr(engine.hot, "_move", lambda _: 1 / 0)
    found, expected = [], []
    for i in range(12):
        for one, rows in ((engine, found), (other, expected)):
            rows.append(one.prefill(0, [50], 0).clone() if i == 0 else one.decode([0], [50 + i])[0].clone())
        engine.hot.settle()
    assert "not exchanged any more: division by zero" in caplog.text and caplog.text.count("exchanged") == 1
    assert kld(torch.stack(expected), torch.stack(found)) < 0.02 and not engine.hot.moved
    assert any(-1 in layer.experts for layer in engine.hot.layers.values())  # it stays without
    found, expected = (one.prefill(0, list(range(50, 90)), 0).clone() for one in (engine, other))
    assert kld(expected[None], found[None]) < 0.05


def test_the_hottest_come_first():
    shares = np.array([[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    sizes = np.array([10, 20])
    assert hottest(shares, sizes, 45).tolist() == [[True, False, False, False], [True, False, False, False]]
    assert hottest(shares, sizes, 45, 1).tolist() == [[True] * 4, [False] * 4]
    assert not hottest(shares, sizes, 5).any()


def test_whole_layers_where_waiting_costs_more_than_experts():
    """A layer of which half is missing waits for the CPU all the same."""
    even, sizes, visits = np.full((4, 8), 1 / 8), np.full(4, 10), np.full(4, 1e-3)
    assert best(even, sizes, 8, 160, visits / 5).tolist() == [[True] * 8] * 2 + [[False] * 8] * 2
    assert best(even, sizes, 8, 160, 10 * visits).tolist() == [[True] * 4 + [False] * 4] * 4
    skewed = np.tile([0.3, 0.3, 0.2, 0.1, 0.04, 0.02, 0.02, 0.02], (4, 1))
    assert best(skewed, sizes, 8, 160, visits).tolist() == [[True] * 4 + [False] * 4] * 4
    assert best(None, sizes, 8, 165, visits).tolist() == [[True] * 4 + [False] * 4] * 4  # the first, to learn more
    assert best(None, sizes, 8, 320, visits).all()


def test_what_is_asked_for_must_fit():
    able = Able(np.full(4, 10), 8, 160, np.full(4, 1e-3))
    assert kept_experts(0.5, able, None).sum() == 16 and kept_experts(0.25, able, None).sum() == 8
    assert kept_experts(1, able, None).sum() == 8 and kept_experts(0, able, None).sum() == 0
    with pytest.raises(QuantkitError, match=r"--gpu-layers 75%: .* are free: at most 50%"):
        kept_experts(0.75, able, None)
    with pytest.raises(QuantkitError, match=r"--gpu-layers 3: .* are free: at most 2"):
        kept_experts(3, able, None)
    assert not kept_experts("auto", Able(able.sizes, 8, None, able.visits), None).any()
    none = able.visits[:0]  # no layer that the GPU can multiply, and no memory left
    assert kept_experts(0.5, Able(np.zeros(0, np.int64), 8, -5, none), None).shape == (0, 8)


def test_heat_forgets():
    found = Heat(np.full((1, 4), 0.25), 2)
    here, layers = np.array([[True, True, False, False]]), np.array([0])
    assert found.swaps(here, layers, 4) == []
    for _ in range(50):
        found.add(layers, np.array([[0, 3]]), 1)
    assert found.swaps(here, layers, 4) == [(0, 1, 3)] and found.swaps(here, layers, 0) == []
    for _ in range(heat.HALF_LIFE * 16):
        found.add(layers, np.array([[1, 2]]), 1)
    assert found.swaps(here, layers, 4) == [(0, 0, 2)]
    assert found.choices[0, 3] < 2 < found.choices[0, 2]


def test_counts_beside_the_file(path, made, tmp_path, caplog):
    c, first = open_gguf(path).config, "blk.1.ffn_gate_exps.weight"
    shares = calibrated(path, c)
    counts = load_imatrix(made / "imatrix.gguf")[0][first].counts
    np.testing.assert_allclose(shares[1], counts / counts.sum(), rtol=1e-6)
    assert shares[0].sum() == 0 and not caplog.text
    alone = tmp_path / "alone.gguf"
    alone.symlink_to(path)
    assert calibrated(alone, c) is None and "no imatrix.gguf beside alone.gguf: the first experts" in caplog.text
    other = {first: Importance(np.ones((3, 4), np.float32), np.ones(3, np.float32))}
    save_imatrix(tmp_path / "imatrix.gguf", other, datasets=["x"], chunk_count=1, chunk_size=1)
    assert calibrated(alone, c) is None and "another model's" in caplog.text
    (tmp_path / "imatrix.gguf").write_bytes(b"no GGUF at all")
    assert calibrated(alone, c) is None and "imatrix.gguf: " in caplog.text


def test_who_computes_a_prompt(path, monkeypatch, caplog):
    """By costs alone: few tokens the CPU, many the GPU, and both where that is sooner."""
    caplog.set_level(logging.INFO)
    engine = opened(path, monkeypatch)
    assert "takes the CPU" in caplog.text and "the bus" in caplog.text
    prompts = engine.prompts
    prompts.costs = Costs(visit=1, row=0.1, move=1.5, beside=20, slower=1.2)
    found = [prompts.moves_all(n) for n in range(2, 200)]
    assert found == sorted(found) and True in found and False in found
    rows = np.array([9, 4, 2, 1, 1])
    assert n_moved(rows, 10, prompts.costs) == 0  # the slow bus saves too little
    assert n_moved(rows, 10, prompts.costs._replace(beside=1)) == 3
    assert n_moved(rows, 10, prompts.costs._replace(beside=1e-9)) == 5
    assert n_moved(rows[:0], 10, prompts.costs) == 0
    assert places(5, [3, -1, 0]).tolist() == [2, 3, 3, 0, 3]
