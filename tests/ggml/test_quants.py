"""The reference encoders and decoders through the binding agree with gguf's."""

import gguf
import numpy as np
import pytest

from quantkit.codecs.types import QTYPES, row_bytes
from quantkit.errors import QuantkitError
from quantkit.ggml import quants

RELATIVE_ERROR = {
    "F32": 0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K": 0.05,
    "Q5_1": 0.05,
    "Q5_0": 0.06,
    "Q4_K": 0.1,
    "Q4_0": 0.12,
    "IQ4_XS": 0.12,
    "IQ4_NL": 0.12,
    "MXFP4": 0.15,
    "Q3_K": 0.2,
    "IQ3_S": 0.2,
    "IQ3_XXS": 0.25,
    "Q2_K": 0.35,
    "IQ2_S": 0.35,
    "IQ2_XS": 0.4,
    "IQ2_XXS": 0.45,
    "IQ1_M": 0.55,
    "IQ1_S": 0.6,
}


def rows(n: int = 12, n_in: int = 512) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n, n_in)).astype(np.float32)


@pytest.mark.parametrize("qtype", QTYPES)
def test_decoding_equals_gguf(qtype):
    x = rows()
    data = quants.quantize(qtype, x, np.ones(512, np.float32))
    assert data.shape == (12, row_bytes(qtype, 512))
    ours = quants.dequantize(qtype, data, 512)
    if qtype != "F32":
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype])
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(ours - x) <= RELATIVE_ERROR[qtype] * np.linalg.norm(x)


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ2_XXS", "Q2_K", "Q4_K"])
def test_importance_lowers_the_weighted_error(qtype):
    x, weight = rows(64), np.random.default_rng(4).lognormal(0, 1.5, 512).astype(np.float32)

    def error(importance):
        decoded = quants.dequantize(qtype, quants.quantize(qtype, x, importance), 512)
        return float(((decoded - x) ** 2 * weight).sum())

    assert error(weight) < 0.97 * error(np.ones(512, np.float32))


def test_rows_are_encoded_independently():
    x = rows(8)
    whole = quants.quantize("IQ1_S", x, np.ones(512, np.float32))
    assert np.array_equal(whole[3:5], quants.quantize("IQ1_S", x[3:5], np.ones(512, np.float32)))


def test_bad_lengths_and_names():
    with pytest.raises(QuantkitError, match="row of 128 is not a multiple"):
        quants.quantize("Q4_K", np.zeros((1, 128), np.float32))
    with pytest.raises(QuantkitError, match="unknown ggml type IQ9"):
        quants.quantize("IQ9", np.zeros((1, 256), np.float32))
