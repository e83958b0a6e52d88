"""What a decoding step does between its products: Triton's kernels (interpreted on the CPU) against torch's twins."""

import dataclasses
import json

import pytest
import torch
from random_blocks import close, numbers

from quantkit import bundle
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import Activations, Where
from quantkit.runtime.engines import step
from quantkit.runtime.engines.step import Between, ByKernels, ByTorch

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def c() -> ModelConfig:
    tiny = json.loads((bundle.models_dir() / "tiny-r1" / "config.json").read_text())
    return dataclasses.replace(family.from_hf(tiny), n_head=5, kv_lora=64, qk_nope=96, qk_rope=16, v_head=64)


@pytest.fixture(params=DEVICES)
def both(request, c) -> tuple[Between, Between, str]:
    pytest.importorskip("triton")
    return ByKernels(c), ByTorch(c), request.param


def test_a_gpu_that_does_without_kernels_is_told(c, monkeypatch, caplog):
    """In one line, on a GPU; a CPU has never any."""
    for device, triton, config, says in (
        ("cpu", False, c, ""),
        ("cuda", False, c, "no Triton: a decoding step is computed by torch, its products too, slower"),
        ("cuda", True, dataclasses.replace(c, kv_lora=96), "no kernels for this model's widths: a decoding step is"),
        ("cuda", True, c, ""),
    ):
        if triton:
            pytest.importorskip("triton")
        caplog.clear()
        monkeypatch.setattr(step, "use_kernels", lambda kind, triton=triton: triton)
        between = step.between_of(config, torch.device(device))
        assert isinstance(between, ByTorch if says or device == "cpu" else ByKernels)
        assert [record.getMessage().startswith(says) for record in caplog.records] == [True] * bool(says)


def same(found: Activations, expected: torch.Tensor, error: float = 1e-5) -> bool:
    """Integers of 32 columns are within half of a 32,767th of their greatest."""
    exact = found.x.cpu().double().view(len(found.x), -1, 32)
    bound = exact.abs().amax(-1, keepdim=True) / 32767 * 0.51
    return close(found.x, expected, error) and bool(
        ((numbers(found).view(exact.shape) - exact).abs() <= bound + 1e-30).all()
    )


def test_gated(both):
    kernels, torch_, device = both
    gate, up = torch.randn(3, 1056, device=device), torch.randn(3, 1056, device=device)
    gate[1, 32:64] = 0
    gate[2, 5] = 1e4
    assert same(kernels.gated(gate, up), torch_.gated(gate, up).x)
    assert same(kernels.gated(gate), gate, 0)


def test_norm(both):
    kernels, torch_, device = both
    h, a, b, weight = (torch.randn(*shape, device=device) for shape in ((3, 288), (3, 288), (3, 288), (288,)))
    experts = torch.randn(12, 288, device=device), torch.rand(3, 4, device=device)
    for added, chosen in (((None, None), None), ((a, None), None), ((None, b), experts), ((a, b), experts)):
        found, expected = (which.norm(h, weight, added, chosen) for which in (kernels, torch_))
        assert close(found[0], expected[0], 1e-6) and same(found[1], expected[1].x)


@pytest.mark.parametrize("n_kv", [64, 4352])
def test_attention(both, c, n_kv):
    """Three of four slots, in any order, at positions in the first part of the cache, at its edges and in its last."""
    kernels, torch_, device = both
    rows = n_kv + 7
    slots, positions = torch.tensor([3, 0, 2], device=device), torch.tensor([n_kv - 1, 0, 31], device=device)
    angle = torch.rand(n_kv, c.qk_rope // 2, device=device) * 6
    turned = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
    where = Where(slots * rows + positions, slots, positions, turned)
    q = torch.randn(3, c.n_head * c.qk_head, device=device)
    kv, weight = torch.randn(3, c.kv_lora + c.qk_rope, device=device), torch.rand(c.kv_lora, device=device) + 0.5
    cache = torch.randn(4, rows, c.kv_lora + c.qk_rope, device=device).bfloat16()
    caches = [cache.clone(), cache.clone()]
    placed = [which.place(q, kv, weight, own, where) for which, own in zip((kernels, torch_), caches, strict=True)]
    assert same(placed[0][0], placed[1][0].x) and close(placed[0][1], placed[1][1], 1e-6)
    assert close(caches[0].float(), caches[1].float(), 2**-7)  # the interpreter cuts off
    assert torch.equal(caches[0][1], cache[1])
    query = torch.randn(3, c.n_head, c.kv_lora, device=device)
    found, expected = (which.attend(query, placed[0][1], caches[1], where, n_kv) for which in (kernels, torch_))
    assert same(found, expected.x, 1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_collect(device):
    pytest.importorskip("triton")
    from quantkit.runtime import step_kernels
    from quantkit.runtime.engines.gpu_layers import collect

    place = torch.randperm(20, device=device).view(5, 4)
    part, shares = torch.randn(7, 1100, device=device), torch.rand(5, 4, device=device)
    out = torch.randn(5, 1100, device=device)
    every = torch.zeros(20, 1100, device=device)
    every[6:13] = part
    expected = out + (every[place] * shares[..., None]).sum(1)
    if device == "cpu":
        plain = out.clone()
        collect(plain, part, place, shares, 6)
        assert close(plain, expected, 1e-6)
    step_kernels.collect(out, part, place, shares, 6)
    assert close(out, expected, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n", [3, 9])
def test_scores(device, n):
    """By a program each, and as a product of matrices."""
    pytest.importorskip("triton")
    from quantkit.runtime import route_kernels

    x, weights = torch.randn(n, 300, device=device), torch.randn(5, 300, device=device)
    assert close(route_kernels.scores(x, weights), x @ weights.T, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_to_the_host_and_back(device):
    """Rows longer than a program's width; flags beyond the rows stay as they are."""
    pytest.importorskip("triton")
    from quantkit.runtime import hand_over_kernels

    def pinned(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, pin_memory=device == "cuda")

    rows = (torch.randn(3, 1100), torch.rand(3, 6), torch.arange(18, dtype=torch.int32).view(3, 6))
    to = (pinned(3, 1100), pinned(3, 6), pinned(3, 6, dtype=torch.int32))
    flags, step = pinned(4, dtype=torch.int32), torch.tensor([77], device=device)
    hand_over_kernels.send(tuple(part.to(device) for part in rows), to, flags, step)
    back = torch.full((3, 1100), torch.nan, device=device)
    flag = pinned(1, dtype=torch.int32)
    flag[0] = 77
    hand_over_kernels.receive(to[0], back, flag, step)
    if device == "cuda":
        torch.cuda.synchronize()
    assert all(map(torch.equal, to, rows)) and flags.tolist() == [77, 77, 77, 0]
    assert torch.equal(back.cpu(), rows[0])
