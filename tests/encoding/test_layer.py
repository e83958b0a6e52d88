"""Our encoders in the one-pass job: better than ggml's at the same bytes, and honest about what they knew."""

import json

import numpy as np
import pytest
import torch

from quantkit.calibration.collect import collect
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.measure import Calibration
from quantkit.encoding.hessian import Hessian, gram
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions
from quantkit.encoding.moments import Moments
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import load_imatrix
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.stages import source_of
from quantkit.planning.plan import Plan


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
