"""Coverage figures, and what becomes of experts that calibration hardly reached."""

import numpy as np
import pytest

from quantkit.calibration import coverage
from quantkit.errors import QuantkitError
from quantkit.tensors import Importance

NAME = "blk.3.ffn_gate_exps.weight"


@pytest.fixture
def imatrix():
    counts = np.array([0, 10, 100, 290], np.float32)
    sums = counts[:, None] * np.array([[1, 2], [3, 4], [5, 6], [7, 8]], np.float32)
    dense = Importance(np.ones((1, 2), np.float32), np.ones(1, np.float32))
    return {NAME: Importance(sums, counts), "blk.3.attn_q_a.weight": dense}


def test_rows(imatrix):
    assert coverage.coverage(imatrix, 32) == [coverage.LayerCoverage(3, 0, 55, 290, 2, 27.5)]
    assert "290" in coverage.table(coverage.coverage(imatrix, 32))


def test_verdict_says_how_many_tokens_would_do():
    counts, sums = np.full(4, 100, np.float32), np.ones((4, 200), np.float32)
    rows = coverage.coverage({NAME: Importance(sums, counts)}, 32)
    assert rows[0].per_dim == 0.5
    assert coverage.verdict(rows, 1000).endswith(
        "0.5 tokens for each dimension of an expert's input: few; better up to about --tokens 10000"
    )
    plenty = coverage.coverage({NAME: Importance(sums, counts * 10)}, 32)
    assert coverage.verdict(plenty, 1000).endswith("plenty")


def test_tokens_needed_scales_with_the_least_used_expert(imatrix):
    assert coverage.tokens_needed(coverage.coverage(imatrix, 32), 100, 32) == 3200
    counts = np.array([20, 40], np.float32)
    rows = coverage.coverage({NAME: Importance(np.ones((2, 2), np.float32), counts)}, 32)
    assert coverage.tokens_needed(rows, 1000, 32) == 1600
    assert coverage.tokens_needed(rows, 1000, 20) == 1000


def test_shrinking_blends_towards_the_layer_and_leaves_the_rest(imatrix):
    shrunk = coverage.shrink(imatrix, 32)[NAME]
    mean = imatrix[NAME].in_sum2.sum(0) / 400
    assert shrunk.counts.tolist() == [32, 32, 100, 290]
    np.testing.assert_allclose(shrunk.mean(0), mean, rtol=1e-6)
    np.testing.assert_allclose(shrunk.mean(1), (10 * np.array([3, 4]) + 22 * mean) / 32, rtol=1e-6)
    assert np.array_equal(shrunk.in_sum2[2:], imatrix[NAME].in_sum2[2:])


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("value", [np.inf, np.nan, 3e38], ids=["infinite", "NaN", "overflows in the blend"])
def test_sums_that_are_not_finite_are_refused_by_name(imatrix, value):
    imatrix[NAME].in_sum2[1] = value
    imatrix[NAME].counts[:] = 1
    with pytest.raises(QuantkitError, match=rf"{NAME}: inputs that are not finite, or too large"):
        coverage.shrink(imatrix, 32)


def test_merging_adds(imatrix):
    twice = coverage.merge(imatrix, imatrix)[NAME]
    assert np.array_equal(twice.counts, 2 * imatrix[NAME].counts)
    assert np.array_equal(twice.in_sum2, 2 * imatrix[NAME].in_sum2)
