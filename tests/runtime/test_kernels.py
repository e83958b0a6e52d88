"""The Triton kernels (interpreted on the CPU) against torch and ggml's decoders."""

import dataclasses
import json
from importlib.util import find_spec

import pytest
import torch
from random_blocks import close, numbers, random_blocks

from quantkit import bundle
from quantkit.codecs.registry import CODECS, codec, in_groups
from quantkit.models import family
from quantkit.runtime.activations import Activations
from quantkit.runtime.layers import Router, route

WIDE: list[str] = []
if find_spec("triton"):
    from quantkit.codecs import triton_wide

    WIDE = list(triton_wide.WIDE)
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def random_rows(n: int, n_in: int, device: str) -> tuple[Activations, torch.Tensor]:
    """Rows, and what their integers say."""
    from quantkit.runtime import step_kernels

    x = step_kernels.gated(torch.randn(n, n_in, device=device), None)
    return x, numbers(x).float().to(device)


def some(x: Activations, begin: int, end: int) -> Activations:
    assert x.words is not None and x.scales is not None
    return Activations(x.x[begin:end], x.words[begin:end], x.scales[begin:end])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qtype", [name for name in CODECS if in_groups(name)])
def test_kernels_agree_with_torch(qtype, device):
    """Whole, tail and partly masked tiles; one matrix for several tokens and chosen ones; rows of x shared by pairs."""
    pytest.importorskip("triton")
    from quantkit.runtime import kernels

    data, values = random_blocks(qtype, (3, 2), 768, most=1e30)  # MXFP4 has scales up to 2^127
    data, there = data.to(device), values.to(device)
    out = kernels.dequantize(qtype, data.flatten(0, 1), torch.empty(6, 768, device=device))
    assert close(out, codec(qtype).dequantize(data).flatten(0, 1), 1e-6)
    rounded = kernels.dequantize(qtype, data[0], torch.empty(2, 768, device=device, dtype=torch.bfloat16))
    assert close(rounded.float(), values[0], 2**-7)  # the interpreter cuts off
    rows, x = random_rows(3, 768, device)
    ids = torch.tensor([2, 0, -1, 1], dtype=torch.int32, device=device)
    expected = torch.stack([there[e] @ x[i // 2] * (e >= 0) for i, e in enumerate(ids.tolist())])
    assert close(kernels.products(qtype, data, some(rows, 0, 2), ids), expected, 1e-5)
    alone = kernels.products(qtype, data[:1], rows)
    assert close(alone, x @ there[0].T, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("qtype", WIDE or ["none"])
def test_products_of_long_rows(qtype, device):
    """32 weights a thread; other matrices beside; the same bits whoever else is in the batch."""
    pytest.importorskip("triton")
    from quantkit.runtime import kernels

    n_in = 1280 if qtype in ("IQ2_XXS", "Q4_K", "Q6_K") else 1024  # the second row of some is at no word's address
    data, values = random_blocks(qtype, (2, 2), n_in)
    data, there = data.to(device), values.to(device)
    rows, x = random_rows(3, n_in, device)
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    both = kernels.products(qtype, data, some(rows, 0, 1), ids, data.flip(0).contiguous())
    expected = there @ x[0]
    assert close(both[0], expected[[1, 0]], 1e-5) and close(both[1], expected, 1e-5)
    alone = kernels.products(qtype, data[:1], rows)  # four tokens a program
    assert close(alone, x @ there[0].T, 1e-5)
    assert torch.equal(kernels.products(qtype, data[:1], some(rows, 2, 3)), alone[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("n_in", [128, 1536, 2048])
def test_products_of_other_lengths(n_in, device):
    pytest.importorskip("triton")
    from quantkit.runtime import kernels

    data, values = random_blocks("Q8_0", (2, 5), n_in)
    rows, x = random_rows(2, n_in, device)
    ids = torch.tensor([1, 0], dtype=torch.int32, device=device)
    expected = torch.stack([values[1].to(device) @ x[0], values[0].to(device) @ x[1]])
    assert close(kernels.products("Q8_0", data.to(device), rows, ids), expected, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_routing_kernel(device):
    pytest.importorskip("triton")
    from quantkit.runtime import route_kernels

    folder = bundle.models_dir()
    r1, tiny = (
        family.from_hf(json.loads((folder / name / "config.json").read_text())) for name in ("deepseek-r1", "tiny-r1")
    )
    v2 = dataclasses.replace(
        r1,
        n_expert=160,
        n_group_used=3,
        n_used=6,
        scoring="softmax",
        norm_weights=False,
        group_score="max",
        weights_scale=16.0,
    )
    ungrouped = dataclasses.replace(r1, n_expert=60, n_group=1, n_group_used=1, n_used=4, scoring="softmax")
    for c in (r1, tiny, v2, ungrouped):
        x = torch.randn(7, 64, device=device)
        bias = torch.randn(c.n_expert, device=device) * 0.1 if c.scoring == "sigmoid" else None
        router = Router(torch.randn(c.n_expert, 64, device=device) * 0.3, bias)
        expert, weight = route(x, router, c)
        ids, weights, none = route_kernels.route(x @ router.weight.T, bias, None, c)
        assert none is None and torch.equal(ids.long(), expert) and torch.allclose(weights, weight, rtol=1e-4)
        table = torch.randperm(c.n_expert, device=device).int() - c.n_expert // 2
        table[table < 0] = -1
        ids, weights, slots = route_kernels.route(x @ router.weight.T, bias, table, c)
        assert torch.equal(slots, table[expert]) and torch.allclose(weights, weight, rtol=1e-4)
        assert torch.equal(torch.where(slots < 0, ids, ~ids).long(), expert)
