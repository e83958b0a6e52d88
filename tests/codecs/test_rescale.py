"""Packed scales times a factor decode to the weights times that factor."""

import numpy as np
import pytest

from quantkit.codecs.rescale import RESCALABLE, rescale
from quantkit.ggml import library as ggml


@pytest.mark.parametrize("qtype", sorted(RESCALABLE))
def test_decoded_weights_follow_the_factor(qtype):
    rng = np.random.default_rng(3)
    w = rng.standard_normal((6, 768), dtype=np.float32) * 0.05
    data = ggml.quantize(qtype, w, np.ones(768, np.float32))
    factor = rng.uniform(0.8, 1.3, (6, 3)).astype(np.float32)
    before, after = ggml.dequantize(qtype, data, 768), ggml.dequantize(qtype, rescale(qtype, data, factor), 768)
    expected = before.reshape(6, 3, 256) * factor[..., None]
    np.testing.assert_allclose(after.reshape(6, 3, 256), expected, rtol=2e-3, atol=2e-3 * np.abs(w).max())
    np.testing.assert_array_equal(rescale(qtype, data, np.ones((6, 3), np.float32)), data)


def test_scales_stay_finite():
    data = ggml.quantize("Q4_K", np.full((1, 256), 1e4, np.float32), None)
    after = ggml.dequantize("Q4_K", rescale("Q4_K", data, np.full((1, 1), 1e9, np.float32)), 256)
    assert np.isfinite(after).all()


def test_a_factor_for_each_superblock():
    data = ggml.quantize("Q4_K", np.ones((2, 256), np.float32), None)
    with pytest.raises(ValueError, match="3 factors for 2 superblocks"):
        rescale("Q4_K", data, np.ones(3, np.float32))
