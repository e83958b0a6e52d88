"""Products by tensor cores (interpreted on the CPU) against ggml's decoders."""

import pytest
import torch
from random_blocks import close, random_blocks

from quantkit.codecs.registry import CODECS, in_groups
from quantkit.runtime.activations import Activations
from quantkit.runtime.packed import Choice, Packed

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ERROR = 1e-3  # of the greatest: eleven bits of weights and activations


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qtype", [name for name in CODECS if in_groups(name)])
def test_products(qtype, device):
    """One matrix, whose last tile is not whole; chosen ones and others beside, none for some pairs."""
    pytest.importorskip("triton")
    from quantkit.runtime import kernels, tile_kernels

    data, values = random_blocks(qtype, (3, 70), 768, most=10)
    data, values = data.to(device), values.to(device)
    x = torch.randn(5, 768, device=device) * 100
    halves, wide = tile_kernels.halves(x), True
    alone = tile_kernels.products(kernels.matrices(qtype, data[:1], 768, wide), halves)
    assert close(alone, x @ values[0].T, ERROR)
    ids = torch.tensor([2, 0, -1, 1, 2, 2, 0, 1, 1, -1], dtype=torch.int32, device=device)
    other = data.flip(0).contiguous()
    runs = tile_kernels.runs(ids, 3)._replace(share=2)
    both = tile_kernels.products(kernels.matrices(qtype, data, 768, wide, other), halves, runs, other)
    rows = x.repeat_interleave(2, 0)
    for found, of in zip(both, (values, values.flip(0)), strict=True):
        expected = torch.einsum("poi,pi->po", of[ids.clamp_min(0).long()], rows) * (ids >= 0)[:, None]
        assert close(found, expected, ERROR) and not found[ids < 0].any()


@pytest.mark.parametrize("device", DEVICES)
def test_many_tokens(device, monkeypatch):
    """More tokens of a matrix than a program takes, experts without any; sums in several parts."""
    pytest.importorskip("triton")
    from quantkit.runtime import kernels, tile_kernels

    data, values = random_blocks("Q4_K", (5, 16), 512, most=10)
    data, values = data.to(device), values.to(device)
    x = torch.randn(40, 512, device=device)
    chosen = torch.tensor([0, 3, 4], device=device)[torch.randint(0, 3, (40, 2), device=device)]
    chosen[:, 0] = 3
    order = chosen.flatten().argsort(stable=True)
    ends = torch.bincount(chosen.flatten(), minlength=5).cumsum(0).int()
    runs = tile_kernels.sorted_runs(order.int(), ends, 2)
    assert runs.tokens == 16 < int((chosen == 3).sum())
    matrices = kernels.matrices("Q4_K", data, 512, True)
    expected = torch.einsum("poi,pi->po", values[chosen.flatten()[order]], x[order // 2])
    found = []
    for busy in (1, 264):
        monkeypatch.setattr(tile_kernels, "BUSY", busy)
        found.append(tile_kernels.products(matrices, tile_kernels.halves(x), runs))
        assert close(found[-1], expected, ERROR)
    again = tile_kernels.products(
        matrices, tile_kernels.halves(x), tile_kernels.runs(chosen.flatten().int(), 5)._replace(share=2)
    )
    assert close(again[order], expected, ERROR)


@pytest.mark.parametrize("device", DEVICES)
def test_largest_and_smallest(device):
    """Activations far beyond float16, rows of zeros, weights below its smallest normal number."""
    pytest.importorskip("triton")
    from quantkit.runtime import kernels, tile_kernels

    data, values = random_blocks("Q8_0", (1, 16), 256, most=1e-4)
    x = torch.randn(4, 256) * torch.tensor([1e8, 1e-8, 0, 1])[:, None]
    found = tile_kernels.products(
        kernels.matrices("Q8_0", data.to(device), 256, True), tile_kernels.halves(x.to(device))
    )
    for row, expected in zip(found.cpu(), x @ values[0].T, strict=True):
        assert close(row, expected, ERROR)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)])
def test_experts_as_by_torch(device):
    """gate, up and down of sorted pairs, and a step's choice, against the same on the CPU."""
    made = [random_blocks("Q4_K", (6, n_out), n_in, most=1) for n_out, n_in in ((512, 256), (512, 256), (256, 512))]
    cpu = [Packed("Q4_K", data, values.shape[-1], torch.float32) for data, values in made]
    gpu = [Packed("Q4_K", data.to(device), values.shape[-1], torch.bfloat16) for data, values in made]
    x, ids = torch.randn(9, 256), torch.randint(0, 6, (9, 2))
    expected = [matrix.chosen(Activations(x), Choice(ids.flatten().int())) for matrix in cpu[:2]]
    hidden = torch.nn.functional.silu(expected[0]) * expected[1]
    y = cpu[2].chosen(Activations(hidden), Choice(ids.flatten().int()))
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=6).cumsum(0).int()
    found = gpu[0].experts(*gpu[1:], x.to(device), order.to(device), ends.to(device), 2)
    assert close(found, y[order], 2e-3)
    choice = gpu[0].choice(ids.int().to(device))
    assert choice.runs is not None
    for one, both in zip(expected, gpu[0].beside(gpu[1], Activations(x.to(device)), choice), strict=True):
        assert close(both, one, ERROR)
