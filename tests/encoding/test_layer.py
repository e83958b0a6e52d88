"""Our encoders in the one-pass job: better than ggml's at the same bytes, and honest about what they knew."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_bytes import decode

from quantkit.calibration.collect import collect
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.encoding.hessian import Hessian, gram
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions
from quantkit.encoding.moments import Moments
from quantkit.encoding.state import EFFORTS
from quantkit.encoding.two_sided import TwoSided
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gradients import DOWN, INNER, ExpertRows, LayerGradients, path_of
from quantkit.formats.imatrix import load_imatrix
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.plan import plan_model
from quantkit.job.stages import source_of
from quantkit.models import family
from quantkit.planning.plan import Plan
from quantkit.tensors import ROUTED_ROLES


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ours")
    options = MakeOptions(
        calibration=Calibration(TextChoice(n_tokens=8192)),
        evaluation=TextChoice(n_tokens=4096),
        encoder="quantkit",
    )
    make("tiny-r1", folder, options)
    return folder


def test_same_plan_same_bytes_lower_divergence(ours, made):
    mine, theirs = (json.loads((folder / "verify.json").read_text()) for folder in (ours, made))
    assert (ours / "plan.json").read_bytes() == (made / "plan.json").read_bytes()
    a, b = (GGUFFile.open(folder / "tiny-r1-1.58bit.gguf") for folder in (ours, made))
    types = [{name: (t.qtype, t.n_bytes) for name, t in file.tensors.items()} for file in (a, b)]
    assert types[0] == types[1]
    assert mine["kld_mean"] < 0.75 * theirs["kld_mean"]
    assert mine["ppl"] < theirs["ppl"]


def test_imatrix_of_the_pass_is_that_of_calibration(ours, made):
    mine, theirs = (load_imatrix(folder / "imatrix.gguf")[0] for folder in (ours, made))
    assert mine.keys() == theirs.keys()
    for name, entry in theirs.items():
        np.testing.assert_allclose(mine[name].in_sum2, entry.in_sum2, rtol=1e-3, err_msg=name)


def test_experts_without_tokens_fall_to_ggml(tiny, made, tmp_path):
    """Two tokens reach at most 8 of 16 experts; the others still get bytes, from their layer's mean importance."""
    source = source_of(tiny, "cpu")
    plan = Plan.from_json((made / "plan.json").read_bytes())
    with torch.inference_mode(), open_writer(tiny, plan, Output(tmp_path / "o.gguf")) as out:
        layers = FileEncoder(source, plan, out, LayerOptions(EncoderOptions("fast")))
        imatrix = collect(source, torch.tensor([[0, 99]]), turns=layers.turns, watch=layers.watch)
        reached = {layer: int((imatrix[f"blk.{layer}.ffn_down_exps.weight"].counts > 0).sum()) for layer in (1, 2, 3)}
        name = "blk.1.ffn_gate_exps.weight"
        pending = out.pending(name, [(e * 256, e * 256 + 256) for e in range(16)])
        assert len(pending) == 16 - reached[1] > 0
        encode_pending(tiny, plan, fit_importance(plan, imatrix), out, GgmlEncoder())
    assert GGUFFile.open(tmp_path / "o.gguf").tensors.keys() == plan.by_name.keys()
    assert sum(layers.used_by_all().values()) > 0


def few_types(up: str, folder: Path, layers: str) -> Plan:
    """Routed experts of these layers at IQ2_XXS, but for up; attn_output at Q4_K; all else is for ggml."""
    here = f'layers = "{layers}"\n'
    rules = [("ffn_up_exps", up, here), ("ffn_*_exps", "IQ2_XXS", here), ("attn_output", "Q4_K", ""), ("*", "Q8_0", "")]
    text = 'name = "few"\ndescription = "Few types."\ntarget = "llama.cpp"\n' + "".join(
        f'[[rules]]\nmatch = "{match}"\n{where}qtype = "{qtype}"\nwhy = "to test"\n' for match, qtype, where in rules
    )
    (folder / "few.toml").write_text(text)
    return plan_model("tiny-r1", folder / "few.toml")


@pytest.mark.parametrize("up", ["IQ2_XXS", "Q2_K"])  # of gate's type: encoded with it, as one matrix
def test_experts_are_encoded_two_sided_where_a_backward_pass_has_been(tiny, tmp_path, up):
    source, g, plan = source_of(tiny, "cpu"), torch.Generator().manual_seed(0), few_types(up, tmp_path, "1-2")
    counts = torch.full((16,), 3)
    rows = {key: ExpertRows(torch.randn(48, n, generator=g), counts) for key, n in ((INNER, 512), (DOWN, 256))}
    LayerGradients(rows, {"attn_output": torch.eye(256)}).save(path_of(tmp_path, 1))
    how = EncoderOptions(gradients=tmp_path, two_sided=TwoSided(block=64, passes=0))
    with torch.inference_mode(), open_writer(tiny, plan, Output(tmp_path / "o.gguf")) as out:
        layers = FileEncoder(source, plan, out, LayerOptions(how))
        imatrix = collect(source, torch.tensor([[0, 99]]), turns=layers.turns, watch=layers.watch)
        reached = {layer: int((imatrix[f"blk.{layer}.ffn_down_exps.weight"].counts > 0).sum()) for layer in (1, 2)}
        used = layers.used_by_all()
        encode_pending(tiny, plan, fit_importance(plan, imatrix), out, GgmlEncoder())
    assert used["two-sided"] == 3 * reached[1] + 1 and used["full"] >= 3 * reached[2]
    file, specs = GGUFFile.open(tmp_path / "o.gguf"), {s.name: s for s in family.specs(source.config, plan.mla)}
    expert = int(np.argmax(imatrix["blk.1.ffn_down_exps.weight"].counts))
    for role in ROUTED_ROLES:  # each stands where it belongs
        name = f"blk.1.{role}.weight"
        want = family.read(tiny, source.config, specs[name], expert * 256, expert * 256 + 256)
        got = decode(file.tensors[name].qtype, file.matrix(name, expert))
        assert torch.corrcoef(torch.stack([want.flatten(), got.flatten()]))[0, 1] > 0.5


def test_moments_are_weighted_means_over_batches():
    x, weight = torch.randn(50, 16), torch.rand(50)
    moments = Moments()
    for part, share in zip(x.split(20), weight.split(20), strict=True):
        moments.add(part, share)
    [found] = moments.hessians()
    expected = torch.einsum("n,ni,nj->ij", weight, x, x) / weight.sum()
    torch.testing.assert_close(found.matrix, expected, rtol=1e-4, atol=1e-6)
    assert found.tokens == pytest.approx(float(weight.sum() ** 2 / weight.square().sum()), rel=1e-4)
    assert Moments().hessians() == [Hessian()]


@pytest.mark.parametrize("shape", [(4096, 256), (3000, 4, 64), (700, 320)])
def test_moments_do_not_depend_on_the_number_of_threads(shape):
    x, before, found = torch.randn(shape), torch.get_num_threads(), []
    try:
        for n in (1, 2, 5, 8):
            torch.set_num_threads(n)
            found.append(gram(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each, found[0]) for each in found)
    torch.testing.assert_close(found[0], torch.einsum("n...i,n...j->...ij", x, x), rtol=1e-4, atol=1e-2)


def test_an_imatrix_alone_is_not_enough_for_our_encoders(made, tmp_path):
    options = MakeOptions(imatrix=made / "imatrix.gguf", encoder="quantkit")
    with pytest.raises(QuantkitError, match="second moments"):
        make("tiny-r1", tmp_path / "x", options)


@pytest.mark.parametrize("how", [{"encoder": "ggml"}, {"effort": "fast"}])
def test_gradients_that_nobody_would_use_are_refused(how, tmp_path):
    with pytest.raises(QuantkitError, match="no use for gradients"):
        make("tiny-r1", tmp_path / "x", MakeOptions(gradients=tmp_path, **how))


def test_best_goes_backward_first(tmp_path, monkeypatch, capfd):
    """And encodes two-sided with what it finds, which is gone when the file is there."""
    monkeypatch.setitem(EFFORTS, "best", replace(EFFORTS["normal"], tries=1, passes=0, refit=False))
    monkeypatch.setattr(TwoSided, "passes_over", lambda *_: 0)
    monkeypatch.setattr(TwoSided, "blocks", lambda *_: 64)
    few_types("IQ2_XXS", tmp_path, "1")
    options = MakeOptions(
        recipe=tmp_path / "few.toml",
        calibration=Calibration(TextChoice(n_tokens=512)),
        encoder="quantkit",
        effort="best",
        verify=False,
    )
    files, _ = make("tiny-r1", tmp_path / "made", options)
    assert files[0].exists() and not (tmp_path / "made" / "gradients").exists()
    assert "forward and backward" in (said := "".join(capfd.readouterr())) and "two-sided" in said
