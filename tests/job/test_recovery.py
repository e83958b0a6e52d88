"""Recovery on tiny-r1: the divergence falls, sizes stay, and a stopped run ends at the same bytes."""

import numpy as np
import pytest
import torch

from quantkit.calibration.corpus import TextChoice, cut
from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.recovery import RecoverOptions, Recovery, open_original, recover
from quantkit.job.student import Student
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source

HOW = RecoverOptions(epochs=(3, 2), batch=4, lr=3e-3, lr_moved=4e-3, held_out=8)


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def plan(source):
    return make_plan(family.specs(source.config), Recipe.load("2.51bit"), "llama.cpp", model="tiny")


@pytest.fixture(scope="module")
def base(tiny, plan, tmp_path_factory):
    out = tmp_path_factory.mktemp("base") / "tiny.gguf"
    quantize(tiny, plan, {}, Output(out, split_max_bytes=2_000_000), GgmlEncoder())
    return out.with_name("tiny-00001-of-00003.gguf")


@pytest.fixture(scope="module")
def tokens(source):
    choice = TextChoice(n_tokens=16 * 64, chunk=64)
    return cut(choice.corpus("calibration"), source, choice).tokens


@pytest.fixture(scope="module")
def recovered(base, source, plan, tokens, tmp_path_factory):
    return recover(base, tmp_path_factory.mktemp("out"), source, plan, tokens, "job", HOW)


def test_divergence_falls_and_not_a_byte_is_added(base, recovered):
    files, gained = recovered
    assert gained["kld_after"] < 0.98 * gained["kld_before"]
    before, after = GGUFFile.open(base), GGUFFile.open(files[0])
    assert [file.name for file in after.files] == [file.name for file in before.files]
    assert [file.stat().st_size for file in after.files] == [file.stat().st_size for file in before.files]
    assert before.metadata == after.metadata
    same = [name for name in before.tensors if np.array_equal(before.data(name), after.data(name))]
    assert set(same) == {name for name in before.tensors if name.endswith("exp_probs_b.bias")}


def test_codes_of_routed_experts_stay(base, recovered):
    """Q2_K holds d and dmin in the last four bytes of a superblock; nothing else may change."""
    before, after = GGUFFile.open(base), GGUFFile.open(recovered[0][0])
    name = "blk.2.ffn_up_exps.weight"
    old, new = (file.data(name).reshape(-1, 84) for file in (before, after))
    assert np.array_equal(old[:, :80], new[:, :80]) and not np.array_equal(old, new)


def test_what_is_in_the_file_is_what_was_judged(recovered, source, plan, tokens):
    """The file read anew gives the divergence that recovery reported, but for the rounding of scales."""
    files, gained = recovered
    work = Recovery(files[0], source, plan, tokens, HOW, files[0].with_name("none"), "other")
    assert work.divergence() == pytest.approx(gained["kld_after"], rel=0.02)


@pytest.mark.parametrize("stop", [(0, 1), (1, 0)])
def test_stopped_recovery_goes_on_to_the_same_bytes(base, source, plan, tokens, recovered, tmp_path, monkeypatch, stop):
    class Stopped(Exception):
        pass

    original = Recovery._save

    def save(self, stage, epoch, adam):
        original(self, stage, epoch, adam)
        if (stage, epoch) == stop:
            raise Stopped

    monkeypatch.setattr(Recovery, "_save", save)
    with pytest.raises(Stopped):
        recover(base, tmp_path, source, plan, tokens, "job", HOW)
    assert not list(tmp_path.glob("*.gguf"))
    monkeypatch.undo()
    files, gained = recover(base, tmp_path, source, plan, tokens, "job", HOW)
    assert gained == recovered[1]
    for ours, theirs in zip(files, recovered[0], strict=True):
        assert ours.read_bytes() == theirs.read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(file.name for file in files)


def test_without_a_gain_the_file_stays_as_it_was(base, source, plan, tokens, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Recovery, "run", lambda self: (0.1, 0.2))
    files, _ = recover(base, tmp_path, source, plan, tokens, "job", HOW)
    assert files[0].read_bytes() == base.read_bytes()
    assert "no gain" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_refused(tiny, plan):
    with pytest.raises(QuantkitError, match="--recover holds the decoded model"):
        open_original(tiny, plan, "cpu", 4096, 10**8)


def test_the_student_computes_what_the_file_does(base, tokens):
    from quantkit.runtime.stream import final_hidden, head_tiles

    student = Student(base, "cpu", torch.float32)
    file = open_source(base)
    with torch.no_grad():
        expected = torch.cat(list(head_tiles(file, file.head(), final_hidden(file, tokens).flatten(0, 1))))
        found = student.logits(tokens).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
