"""The whole calibration stage: budgets refused up front, more text drawn on demand, experts filled up."""

import numpy as np
import pytest

from quantkit.calibration.corpus import Corpus, Document, TextChoice, overlap
from quantkit.calibration.measure import calibrate
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import load_imatrix
from quantkit.job import make
from quantkit.job.options import MakeOptions
from quantkit.job.stages import source_of


@pytest.fixture(scope="module")
def source(tiny):
    return source_of(tiny, "cpu")


def counts(imatrix):
    return np.concatenate([e.counts for name, e in imatrix.items() if name.endswith("down_exps.weight")])


def test_memory_limit_is_refused_with_what_would_fit(source, tmp_path):
    how = Calibration(TextChoice(n_tokens=65536), memory=2_000_000_000, hidden="device")
    with pytest.raises(QuantkitError, match=r"need .* GiB, but --memory is 2\.0 GB, 1\.9 GiB; at most"):
        calibrate(source, how, tmp_path / "i.gguf")
    assert not list(tmp_path.iterdir())
    with pytest.raises(QuantkitError, match="no tokens fit"):
        calibrate(source, Calibration(TextChoice(n_tokens=512), memory=10**8), tmp_path / "i.gguf")


def test_few_tokens_leave_experts_short_and_they_are_filled_up(source, tmp_path, capsys):
    calibrate(source, Calibration(TextChoice(n_tokens=64, chunk=64), min_expert_tokens=40), tmp_path / "i.gguf")
    loaded, info = load_imatrix(tmp_path / "i.gguf")
    assert counts(loaded).min() == 40
    assert (info.chunk_count, info.chunk_size) == (1, 64)
    assert "experts saw fewer than 40 tokens" in capsys.readouterr().err
    assert not (tmp_path / "i.gguf.state").exists()


def test_text_is_drawn_until_every_expert_saw_enough(source, tmp_path):
    how = Calibration(TextChoice(n_tokens=128, chunk=128), min_expert_tokens=0, expert_tokens=60)
    grown = calibrate(source, how, tmp_path / "i.gguf")
    assert counts(grown).min() >= 60
    _, info = load_imatrix(tmp_path / "i.gguf")
    once = Calibration(TextChoice(n_tokens=128 * info.chunk_count, chunk=128), min_expert_tokens=0)
    whole = calibrate(source, once, tmp_path / "j.gguf")
    for name, entry in whole.items():
        np.testing.assert_allclose(grown[name].in_sum2, entry.in_sum2, rtol=2e-3)


def test_overlap_is_noticed():
    line = "a sentence that is long enough to be told apart from braces and headings\n"
    first = Corpus("a", (Document("text", line + "x" * 60),))
    second = Corpus("b", (Document("text", line + "y" * 60),))
    assert overlap(first, second) == 0.5
    assert overlap(first, Corpus("c", (Document("text", "z" * 99),))) == 0
    choice = TextChoice()
    make.check_disjoint(choice, choice)  # the bundled parts


def test_evaluating_on_calibration_text_is_refused(tmp_path):
    (tmp_path / "same.txt").write_text("some long enough line of text that occurs in both of the two corpora\n" * 50)
    options = MakeOptions(
        calibration=Calibration(TextChoice((str(tmp_path / "same.txt"),))),
        evaluation=TextChoice((str(tmp_path / "same.txt"),)),
    )
    with pytest.raises(QuantkitError, match="100% of the evaluation text"):
        make.make("tiny-r1", tmp_path / "out", options)
