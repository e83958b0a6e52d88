"""What types cost by one backward pass, against forks that go through the whole model."""

import math

import pytest
import torch

from quantkit.calibration import sensitivity
from quantkit.calibration.collect import collect
from quantkit.calibration.corpus import TextChoice, cut
from quantkit.calibration.gradients import GradientOptions, calibrate_gradients
from quantkit.calibration.variants import Candidates
from quantkit.encoding import estimate as module
from quantkit.encoding.estimate import Estimate, Text, estimate
from quantkit.errors import QuantkitError
from quantkit.formats.gradients import LayerGradients, StreamGradients, path_of, tokens_in
from quantkit.runtime.sources.checkpoint import CheckpointSource

TYPES = Candidates(("Q4_0",), ("Q4_0",))  # of ggml's encoder in both: what differs is not the encoder


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def text():
    return TextChoice(n_tokens=2048, chunk=128)


@pytest.fixture(scope="module")
def folder(source, text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("gradients")
    calibrate_gradients(source, GradientOptions(TextChoice(n_tokens=1024, chunk=128)), folder)
    return folder


@pytest.fixture(scope="module")
def tokens(source, text):
    return cut(text.corpus("calibration"), source, text).tokens


@pytest.fixture(scope="module")
def found(source, folder, tokens):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLED", 16)
        patch.setattr(Estimate, "variants", all_by_ggml)
        return estimate(source, folder, tokens, TYPES)


def all_by_ggml(run, spec, weights, known):
    for qtype in run.types[spec]:
        each = [None] * len(weights) if known is None else known.h.diagonal(dim1=-2, dim2=-1)
        yield qtype, torch.stack([module._by_ggml(qtype, w, h) for w, h in zip(weights, each, strict=True)])


@pytest.fixture(scope="module")
def forked(source, tokens):
    with torch.inference_mode():
        imatrix = collect(source, tokens)
    return sensitivity.measure(source, imatrix, tokens[:8], TYPES, tier="full")


def test_it_ranks_as_forks_do_and_at_their_level(found, forked):
    from scipy.stats import spearmanr  # here: it takes a second to load

    costs, expected = ({(e.tensor, e.qtype): e.kld for e in each.entries} for each in (found, forked))
    assert costs.keys() == expected.keys() and found.tier == "gradients" and found.tokens == 1024
    coarse = [key for key in costs if key[1] == "Q4_0"]
    assert spearmanr(*([each[key] for key in coarse] for each in (costs, expected)))[0] > 0.8
    for layer in range(4):  # late ones are not favoured; of 1,024 tokens hardly any moves to another expert
        logs = [math.log(costs[key] / expected[key]) for key in coarse if key[0].startswith(f"blk.{layer}.ffn")]
        assert abs(sum(logs) / len(logs)) < math.log(3), (layer, logs)


def test_nothing_moves_to_other_experts_behind_the_last_layer(found, forked):
    costs, expected = ({(e.tensor, e.qtype): e.kld for e in each.entries} for each in (found, forked))
    for role in ("gate", "up", "down"):
        key = f"blk.3.ffn_{role}_shexp.weight", "Q4_0"
        assert costs[key] == pytest.approx(expected[key], rel=0.3)


def test_a_sample_of_experts_stands_for_all(source, folder, tokens, found, monkeypatch):
    monkeypatch.setattr(module, "SAMPLED", 8)
    monkeypatch.setattr(Estimate, "variants", all_by_ggml)
    routed = {e.tensor: e.kld for e in found.entries if "exps" in e.tensor}
    for e in estimate(source, folder, tokens, Candidates(("Q4_0",), ())).entries:
        assert e.kld == pytest.approx(routed[e.tensor], rel=0.35), e


def test_our_encoder_is_what_is_judged(source, folder, tokens, monkeypatch):
    """Of coarse types it loses less than ggml's."""
    monkeypatch.setattr(module, "SAMPLED", 4)
    types = Candidates(("IQ2_XXS",), ())
    ours = {e.tensor: e.kld for e in estimate(source, folder, tokens, types).entries}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Estimate, "variants", all_by_ggml)
        theirs = {e.tensor: e.kld for e in estimate(source, folder, tokens, types).entries}
    assert sum(ours.values()) < sum(theirs.values()) and ours.keys() == theirs.keys()


def test_moments_are_of_other_tokens_than_those_compared(source, folder, tokens, capsys):
    text = Text.of(folder, tokens, source.config.n_layer)
    compared = {tuple(row) for row in text.compared.tolist()}
    assert torch.equal(text.compared, tokens[:8]) and len(text.fitted) == 8
    assert not compared & {tuple(row) for row in text.fitted.tolist()}
    assert text.for_moments == range(1024, 2048) and len(text.all) == 16 + 5 * text.n_noisy
    estimate(source, folder, tokens[:8], Candidates((), ("Q8_0",)))
    assert "types are judged by the tokens that they were fitted to" in capsys.readouterr().err


def test_gradients_of_another_version_are_refused(source, folder, tokens, tmp_path):
    stream = StreamGradients.load(path_of(folder, 0))
    assert stream.before is not None and stream.middle.shape == stream.after.shape == (3, 1024, 256)
    assert torch.equal(tokens_in(folder), tokens[:8])
    for layer in range(4):
        LayerGradients({}, {"attn_q_a": torch.eye(3)}).save(path_of(tmp_path, layer))
    with pytest.raises(QuantkitError, match=r"gradients-000.*run the backward pass .* again"):
        estimate(source, tmp_path, tokens, TYPES)
    with pytest.raises(QuantkitError, match=r"gradients-000"):
        estimate(source, tmp_path / "none", tokens, TYPES)
