"""The figures of verify.json against their definitions."""

import math

import pytest
import torch

from quantkit.evaluation import divergence, student
from quantkit.evaluation.divergence import Divergence, HeldLogits, diverge, scored, scored_targets


def held(p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor) -> Divergence:
    """Of logits that are there."""
    return diverge(HeldLogits(p), HeldLogits(q), targets, p.shape[1])


def test_figures_by_hand():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    q = torch.tensor([[0.6, 0.3, 0.1], [0.5, 0.1, 0.4]])
    figures = held(p.log() + 3, q.log() - 1, torch.tensor([0, 2])).summary()  # free up to a constant
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
    figures = held(logits, logits, torch.randint(50, (64,))).summary()
    assert figures["kld_mean"] == pytest.approx(0, abs=1e-6)
    assert figures["top1_agreement"] == 100 and figures["ppl"] == figures["ppl_reference"]


def known(kld: torch.Tensor) -> Divergence:
    return Divergence(kld, torch.zeros_like(kld), kld, kld < 0.5, kld)


def test_p99_and_median_are_order_statistics():
    figures = known(torch.arange(1, 101).float()).summary()
    assert figures["kld_p99"] == 99 and figures["kld_p90"] == 90 and figures["kld_median"] == 50


@pytest.mark.parametrize("slab", [1, 7, 64, 1000])
def test_vocabulary_slabs_give_the_direct_formula(slab, monkeypatch):
    """Running sums over slabs of the vocabulary, with logits of very different size, against log_softmax in float64."""
    monkeypatch.setattr(divergence, "VOCAB_SLAB", slab)
    monkeypatch.setattr(divergence, "TILE_ELEMENTS", 5 * slab)
    p = torch.randn(33, 300) * torch.logspace(-2, 2, 33)[:, None] + 50
    q = p + torch.randn(33, 300) * 0.3 - 20
    targets = torch.randint(300, (33,))
    found = diverge(HeldLogits(p), HeldLogits(q), targets, 300)
    log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    assert torch.allclose(found.kld, kld, atol=2e-6, rtol=1e-4)
    assert torch.equal(found.same_top, p.argmax(-1) == q.argmax(-1))
    assert torch.allclose(found.nll, -log_q.gather(1, targets[:, None]).squeeze(1), atol=1e-4)
    assert torch.allclose(found.nll_reference, -log_p.gather(1, targets[:, None]).squeeze(1), atol=1e-4)


def test_intervals_cover_the_truth_when_tokens_of_a_chunk_go_together():
    """Chunks of wholly dependent tokens: an interval over tokens would be ten times too narrow."""
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(200):
        kld = (1 + torch.randn(20, 1, generator=generator) * 0.3).expand(20, 100).reshape(-1)
        low, high = known(kld).summary(100)["ci95"]["kld_mean"]
        covered += low < 1 < high
    assert 180 <= covered <= 199


def test_students_t_is_scipys():
    stdtrit = pytest.importorskip("scipy.special").stdtrit
    for freedom in (1, 2, 3, 7, 31, 63, 1000, 10**5):
        assert student.quantile(freedom, 0.975) == pytest.approx(stdtrit(freedom, 0.975), rel=1e-9)
    assert student.quantile(1, 0.75) == pytest.approx(1)  # Cauchy's


def test_one_chunk_has_no_interval():
    assert known(torch.ones(10)).summary(10)["ci95"]["ppl"] is None


def test_histogram_counts_every_token():
    found = known(torch.tensor([0.0, 1e-12, 1e-3, 0.5, 1000.0])).histogram()
    assert sum(found["counts"]) == 5 and len(found["edges"]) == len(found["counts"]) + 1
    assert found["counts"][0] == 2 and found["counts"][-1] == 1


def test_scored_half_lines_up_with_its_targets():
    """Row i of hidden predicts token i + 1; llama-perplexity scores rows t/2 .. t-2."""
    position = torch.arange(12).float().expand(2, 12).unsqueeze(-1)
    rows = scored(position).squeeze(-1)
    targets = scored_targets(torch.arange(12).expand(2, 12))
    assert rows.tolist() == [6, 7, 8, 9, 10] * 2
    assert targets.tolist() == [7, 8, 9, 10, 11] * 2
    assert scored(position, "all").squeeze(-1)[:11].tolist() == list(range(11))
    assert scored_targets(torch.arange(12).expand(2, 12), "all")[:11].tolist() == list(range(1, 12))


def test_lengths_must_match():
    with pytest.raises(ValueError, match="3 rows"):
        held(torch.randn(3, 5), torch.randn(3, 5), torch.zeros(4, dtype=torch.int64))
