"""The figures of verify.json against their definitions."""

import math

import pytest
import torch

from quantkit.evaluation.divergence import Divergence, compare, scored, scored_targets


def test_figures_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    q = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    result = Divergence()
    result.add(p.log() + 3, q.log() - 1, torch.tensor([0, 2]))  # logits are free up to a constant
    figures = result.summary()
    pairs = zip(p.tolist(), q.tolist(), strict=True)
    kld = [sum(a * math.log(a / b) for a, b in zip(x, y, strict=True)) for x, y in pairs]
    assert figures["kld_mean"] == pytest.approx(sum(kld) / 2, rel=1e-5)
    assert figures["ppl"] == pytest.approx(math.exp(-(math.log(0.6) + math.log(0.4)) / 2), rel=1e-5)
    assert figures["ppl_reference"] == pytest.approx(math.exp(-(math.log(0.7) + math.log(0.8)) / 2), rel=1e-5)
    assert figures["top1_agreement"] == 50.0
    assert figures["rms_dp"] == pytest.approx(100 * math.sqrt((0.1**2 + 0.4**2) / 2), rel=1e-4)
    assert figures["tokens"] == 2


def test_a_model_does_not_diverge_from_itself():
    logits = torch.randn(64, 50)
    figures = compare([logits[:40], logits[40:]], [logits[:40], logits[40:]], torch.randint(50, (64,))).summary()
    assert figures["kld_mean"] == pytest.approx(0, abs=1e-6)
    assert figures["top1_agreement"] == 100 and figures["ppl"] == figures["ppl_reference"]


def test_p99_and_median_are_order_statistics():
    result = Divergence()
    result.kld.append(torch.arange(1, 101).float())
    for values in (result.nll, result.nll_reference, result.delta_p, result.same_top):
        values.append(torch.zeros(100))
    figures = result.summary()
    assert figures["kld_p99"] == 99 and figures["kld_median"] == 50


def test_scored_half_lines_up_with_its_targets():
    """Row i of hidden predicts token i + 1; llama-perplexity scores rows t/2 .. t-2."""
    position = torch.arange(12).float().expand(2, 12).unsqueeze(-1)
    rows = scored(position).squeeze(-1)
    targets = scored_targets(torch.arange(12).expand(2, 12))
    assert rows.tolist() == [6, 7, 8, 9, 10] * 2
    assert targets.tolist() == [7, 8, 9, 10, 11] * 2


def test_lengths_must_match():
    with pytest.raises(ValueError, match="3 rows"):
        compare([torch.randn(3, 5)], [torch.randn(3, 5)], torch.zeros(4, dtype=torch.int64))
