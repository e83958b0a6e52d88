"""Products by tensor cores (interpreted on the CPU) against ggml's decoders."""

from importlib.util import find_spec

import pytest
import torch
from random_blocks import close, random_blocks

from quantkit.codecs.registry import CODECS, in_groups
from quantkit.runtime import packed
from quantkit.runtime.activations import Activations
from quantkit.runtime.packed import Choice, Packed

CASES = [("tile", name) for name in CODECS if in_groups(name)]
if find_spec("triton"):
    from quantkit.codecs import triton_wide
    from quantkit.runtime import kernels, mma_kernels, run_kernels, tile_kernels

    CASES += [("mma", name) for name in triton_wide.WIDE]
    WAYS = {"tile": tile_kernels, "mma": mma_kernels}
else:
    pytest.skip("no Triton", allow_module_level=True)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ERROR = 2e-3  # of the greatest: eleven bits of activations, scales, and weights of one or two terms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("way", "qtype"), CASES)
def test_products(way, qtype, device):
    """One matrix, whose last tile is not whole; chosen ones and others beside, none for some pairs."""
    n_in = 768 if way == "tile" else 256
    data, values = random_blocks(qtype, (3, 70 if way == "tile" else 20), n_in, most=10)
    data, values = data.to(device), values.to(device)
    x = torch.randn(5, n_in, device=device) * 100
    halves = run_kernels.halves(x)
    matrices = kernels.matrices(qtype, data[:1], n_in, True)
    assert way == "tile" or mma_kernels.able(matrices, 8)
    assert close(WAYS[way].products(matrices, halves), x @ values[0].T, ERROR)
    ids = torch.tensor([2, 0, -1, 1, 2, 2, 0, 1, 1, -1], dtype=torch.int32, device=device)
    other = data.flip(0).contiguous()
    runs = run_kernels.runs(ids, 3)._replace(share=2)
    both = WAYS[way].products(kernels.matrices(qtype, data, n_in, True, other), halves, runs, other)
    rows = x.repeat_interleave(2, 0)
    for found, of in zip(both, (values, values.flip(0)), strict=True):
        expected = torch.einsum("poi,pi->po", of[ids.clamp_min(0).long()], rows) * (ids >= 0)[:, None]
        assert close(found, expected, ERROR) and not found[ids < 0].any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["tile", "mma"])
def test_many_tokens(way, device, monkeypatch):
    """More tokens of a matrix than a program takes, experts without any; sums in several parts."""
    data, values = random_blocks("Q4_K", (5, 16), 512, most=10)
    data, values = data.to(device), values.to(device)
    x = torch.randn(30, 512, device=device)
    chosen = torch.tensor([0, 3, 4], device=device)[torch.randint(0, 3, (30, 2), device=device)]
    chosen[:, 0] = 3
    order = chosen.flatten().argsort(stable=True)
    ends = torch.bincount(chosen.flatten(), minlength=5).cumsum(0).int()
    runs, halves = run_kernels.sorted_runs(order.int(), ends, 2), run_kernels.halves(x)
    assert runs.tokens == 16 < int((chosen == 3).sum())
    matrices = kernels.matrices("Q4_K", data, 512, True)
    expected = torch.einsum("poi,pi->po", values[chosen.flatten()[order]], x[order // 2])
    for busy in (1, 264):
        monkeypatch.setattr(WAYS[way], "BUSY", busy)
        assert close(WAYS[way].products(matrices, halves, runs), expected, ERROR)
    runs = run_kernels.runs(chosen.flatten().int(), 5)._replace(share=2)
    assert close(WAYS[way].products(matrices, halves, runs)[order], expected, ERROR)
    alone = kernels.matrices("Q4_K", data[:1], 512, True)
    assert close(WAYS[way].products(alone, halves), x @ values[0].T, ERROR)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", ["tile", "mma"])
def test_largest_and_smallest(way, device):
    """Activations far beyond float16, rows of zeros, weights below its smallest normal number."""
    data, values = random_blocks("Q8_0", (1, 16), 256, most=1e-4)
    x = torch.randn(4, 256) * torch.tensor([1e8, 1e-8, 0, 1])[:, None]
    matrices = kernels.matrices("Q8_0", data.to(device), 256, True)
    found = WAYS[way].products(matrices, run_kernels.halves(x.to(device)))
    for row, expected in zip(found.cpu(), x @ values[0].T, strict=True):
        assert close(row, expected, ERROR)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_in", [96, 160, 1408])
@pytest.mark.parametrize("qtype", ["Q4_0", "Q8_0"])
def test_rows_that_are_no_multiple_of_256(qtype, n_in, device):
    """Of types with blocks of 32, as DeepSeek-V2-Lite has them; activations that are a part of wider rows."""
    data, values = random_blocks(qtype, (2, 20), n_in, most=10)
    matrix, x = Packed(qtype, data.to(device), n_in, torch.float32), torch.randn(3, n_in + 8, device=device)[:, 8:]
    runs = run_kernels.runs(torch.tensor([1, 0, 1], dtype=torch.int32, device=device), 2)
    expected = torch.stack([values[i] @ row for i, row in zip((1, 0, 1), x.cpu(), strict=True)])
    assert close(matrix._tiles(run_kernels.halves(x), runs), expected, ERROR)


@pytest.mark.parametrize(("n", "k", "n_matrices", "sorts"), [(1, 8, 4, False), (2, 3, 13, False), (2, 3, 12, True)])
def test_when_pairs_are_sorted(monkeypatch, n, k, n_matrices, sorts):
    """Never those of one token, of which every product is by integers; of others where matrices are chosen often."""
    monkeypatch.setattr(packed, "use_kernels", lambda kind: True)
    assert (packed.choice_of(torch.zeros(n, k, dtype=torch.int32), n_matrices).runs is not None) == sorts


@pytest.mark.parametrize("device", DEVICES)
def test_every_matrix_in_order_is_as_if_it_was_chosen(device):
    for n in (2, 9, 70):
        every = run_kernels.every(5, n, torch.device(device))
        chosen = run_kernels.runs(torch.arange(5, dtype=torch.int32, device=device).repeat(n), 5)
        used, rest = chosen.table.split([len(every.table), len(chosen.table) - len(every.table)])
        assert torch.equal(every.order, chosen.order) and torch.equal(every.table, used) and not rest[:, 2].any()
        assert every[2:] == chosen[2:] and every.table.dtype == every.order.dtype == torch.int32


@pytest.mark.parametrize("device", DEVICES)
def test_experts_as_by_torch(device, monkeypatch):
    """gate, up and down of sorted pairs, and a step's choice, against the same by torch."""
    made = [random_blocks("Q8_0", (4, n_out), n_in, most=1) for n_out, n_in in ((32, 256), (32, 256), (16, 32))]
    cpu = [Packed("Q8_0", data, values.shape[-1], torch.float32) for data, values in made]
    gpu = [Packed("Q8_0", data.to(device), values.shape[-1], torch.bfloat16) for data, values in made]
    x, ids = torch.randn(5, 256), torch.randint(0, 4, (5, 2))
    expected = [matrix.chosen(Activations(x), Choice(ids.flatten().int())) for matrix in cpu[:2]]
    hidden = torch.nn.functional.silu(expected[0]) * expected[1]
    y = cpu[2].chosen(Activations(hidden), Choice(ids.flatten().int()))
    order = ids.flatten().argsort(stable=True)
    ends = torch.bincount(ids.flatten(), minlength=4).cumsum(0).int()
    monkeypatch.setattr(packed, "use_kernels", lambda kind: True)
    found = gpu[0].experts(*gpu[1:], x.to(device), order.to(device), ends.to(device), 2)
    assert close(found, y[order], 5e-3)
    choice = gpu[0].choice(ids.int().to(device))
    assert choice.runs is not None
    for one, both in zip(expected, gpu[0].beside(gpu[1], Activations(x.to(device)), choice), strict=True):
        assert close(both, one, ERROR)
