"""The layer mathematics against plain loops written from the papers."""

import dataclasses
import math

import pytest
import torch

from quantkit.models.config import ModelConfig
from quantkit.runtime.layers import KVCache, LayerWeights, Router, attention, rms_norm, route
from quantkit.runtime.rope import angles, frequencies
from quantkit.runtime.rotation import Angles, rotate
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.watch import Watcher


@pytest.fixture(scope="module")
def source(tiny) -> CheckpointSource:
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def weights(source) -> LayerWeights:
    return source.layer(1)


def naive_attention(h: torch.Tensor, layer: LayerWeights, c: ModelConfig) -> torch.Tensor:
    """One sequence, full keys and values per head, one query at a time (DeepSeek-V2, arXiv 2405.04434, 2.1)."""
    x = rms_norm(h, layer.attn_norm, c.rms_eps)
    q_a, norm, q_b = layer.q
    q = q_b(rms_norm(q_a(x), norm, c.rms_eps)).view(-1, c.n_head, c.qk_head)
    kv = layer.kv_a(x)
    latent, k_rope = rms_norm(kv[:, : c.kv_lora], layer.kv_a_norm, c.rms_eps), kv[:, c.kv_lora :]
    cos, sin = angles(c, torch.arange(len(h)))
    out = torch.zeros(len(h), c.n_head, c.v_head)
    for head in range(c.n_head):
        keys = torch.cat((latent @ layer.k_b[head], rotate(k_rope, cos, sin)), 1)
        values = latent @ layer.v_b[head].T
        turned = rotate(q[:, head, c.qk_nope :], cos, sin)
        for i in range(len(h)):
            query = torch.cat((q[i, head, : c.qk_nope], turned[i]))
            weights = (keys[: i + 1] @ query * c.softmax_scale).softmax(0)
            out[i, head] = weights @ values[: i + 1]
    return layer.output(out.flatten(1))


def test_attention_matches_loops_in_every_mode(source, weights):
    c = source.config
    h = torch.randn(2, 21, c.d)
    expected = torch.stack([naive_attention(sequence, weights, c) for sequence in h])
    turns = angles(c, torch.arange(21))
    expanded = attention(h, weights, c, turns)
    absorbed = attention(h, weights, c, turns, watcher=Watcher())
    cache = KVCache.empty(c, 0, (2, 32), h.device, h.dtype)
    pieces = [slice(0, 13), *(slice(i, i + 1) for i in range(13, 21))]
    steps = [attention(h[:, piece], weights, c, Angles(*(t[piece] for t in turns)), cache) for piece in pieces]
    for result in (expanded, absorbed, torch.cat(steps, 1)):
        torch.testing.assert_close(result, expected, rtol=2e-4, atol=2e-5)


def test_route_matches_loops(source):
    """DeepSeek-V3 (arXiv 2412.19437, 2.1.2): groups by their two best biased scores, then top-k, weights unbiased."""
    c = dataclasses.replace(source.config, n_group=4, n_group_used=2, n_used=4)
    router = Router(torch.randn(c.n_expert, c.d), torch.randn(c.n_expert) * 0.3)
    x = torch.randn(50, c.d) * 0.1
    expert, weight = route(x, router, c)
    for row in range(50):
        score = [1 / (1 + math.exp(-float(x[row] @ router.weight[e]))) for e in range(c.n_expert)]
        biased = [s + float(b) for s, b in zip(score, router.bias, strict=True)]
        size = c.n_expert // c.n_group
        worth = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(c.n_group)]
        kept = sorted(range(c.n_group), key=worth.__getitem__)[-2:]
        allowed = [e for e in range(c.n_expert) if e // size in kept]
        best = sorted(allowed, key=biased.__getitem__)[-4:]
        total = sum(score[e] for e in best)
        assert set(expert[row].tolist()) == set(best)
        for e, w in zip(expert[row].tolist(), weight[row].tolist(), strict=True):
            assert w == pytest.approx(score[e] / total * c.weights_scale, rel=1e-4)


def test_softmax_routing_without_groups(source):
    c = dataclasses.replace(
        source.config, scoring="softmax", n_group=1, n_group_used=1, norm_weights=False, weights_scale=1.0
    )
    x, weight = torch.randn(9, c.d), torch.randn(c.n_expert, c.d)
    _, chosen = route(x, Router(weight, None), c)
    torch.testing.assert_close(chosen, (x @ weight.T).softmax(-1).topk(c.n_used).values)


def test_yarn_frequencies(source):
    """Fast pairs keep their frequency, slow ones are divided by the factor, between lies a linear ramp."""
    c = source.config
    base = 10000.0 ** (-torch.arange(c.qk_rope // 2) / (c.qk_rope // 2))
    ratio = base / frequencies(c)
    assert ratio[0] == pytest.approx(1) and ratio[-1] == pytest.approx(c.yarn.factor)
    assert (ratio.diff() >= -1e-4).all()


def test_rotation_keeps_lengths_and_relative_positions(source):
    c = source.config
    q, k = torch.randn(c.qk_rope), torch.randn(c.qk_rope)

    def turned(x, position):
        return rotate(x, *angles(c, torch.tensor(position)))

    assert float(turned(q, 1234).norm()) == pytest.approx(float(q.norm()), rel=1e-5)
    near, far = turned(q, 7) @ turned(k, 0), turned(q, 107) @ turned(k, 100)
    assert float(far) == pytest.approx(float(near), rel=1e-3, abs=1e-3)
