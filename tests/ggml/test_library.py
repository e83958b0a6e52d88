"""The ctypes binding: encoders and decoders agree with gguf's, products agree with dequantized matrices."""

import gc

import gguf
import numpy as np
import pytest
import torch

from quantkit.codecs.types import QTYPES
from quantkit.errors import QuantkitError
from quantkit.ggml import library as ggml

TYPES = [name for name in QTYPES if name not in ("F64",)]
RELATIVE_ERROR = {
    "F32": 0,
    "F16": 1e-3,
    "BF16": 4e-3,
    "Q8_0": 0.01,
    "Q6_K": 0.03,
    "Q5_K": 0.05,
    "Q4_K": 0.1,
    "IQ4_XS": 0.12,
    "IQ4_NL": 0.12,
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


@pytest.mark.parametrize("qtype", TYPES)
def test_decoding_equals_gguf(qtype):
    x = rows()
    data = ggml.quantize(qtype, x, np.ones(512, np.float32))
    assert data.shape == (12, ggml.row_bytes(qtype, 512))
    ours = ggml.dequantize(qtype, data, 512)
    if qtype != "F32":
        theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[qtype])
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)
    assert np.linalg.norm(ours - x) <= RELATIVE_ERROR[qtype] * np.linalg.norm(x)


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ2_XXS", "Q2_K", "Q4_K"])
def test_importance_lowers_the_weighted_error(qtype):
    x, weight = rows(64), np.random.default_rng(4).lognormal(0, 1.5, 512).astype(np.float32)

    def error(importance):
        decoded = ggml.dequantize(qtype, ggml.quantize(qtype, x, importance), 512)
        return float(((decoded - x) ** 2 * weight).sum())

    assert error(weight) < 0.97 * error(np.ones(512, np.float32))


def test_rows_are_encoded_independently():
    x = rows(8)
    whole = ggml.quantize("IQ1_S", x, np.ones(512, np.float32))
    assert np.array_equal(whole[3:5], ggml.quantize("IQ1_S", x[3:5], np.ones(512, np.float32)))


@pytest.mark.parametrize("qtype", ["F32", "BF16", "Q8_0", "Q6_K", "IQ2_XXS", "IQ1_S"])
def test_products(qtype):
    n_expert, n_ff, d = 6, 256, 512
    gate, up = (ggml.quantize(qtype, rows(n_expert * n_ff, d), np.ones(d, np.float32)) for _ in range(2))
    down = ggml.quantize(qtype, rows(n_expert * d, n_ff) / 16, np.ones(n_ff, np.float32))
    experts = ggml.Experts(*((qtype, w) for w in (gate, up, down)), d, n_ff, n_expert, 2, 2)
    g, u, w = (
        torch.from_numpy(ggml.dequantize(qtype, data, n)).view(n_expert, -1, n)
        for data, n in ((gate, d), (up, d), (down, n_ff))
    )
    for n in (1, 2, 33, 1):
        x, share = torch.randn(n, d) / 16, torch.rand(n, 2)
        expert = torch.stack([torch.randperm(n_expert)[:2] for _ in range(n)])
        hidden = torch.nn.functional.silu(torch.einsum("nd,nkfd->nkf", x, g[expert]))
        hidden = hidden * torch.einsum("nd,nkfd->nkf", x, u[expert])
        expected = torch.einsum("nkf,nkdf,nk->nd", hidden, w[expert], share)
        assert (experts(x, expert, share) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("qtype", ["Q4_K", "Q4_0", "Q8_0", "Q6_K", "IQ1_S", "F32"])
@pytest.mark.parametrize("n_out", [64, 63])  # interleaved are 8 rows, or none
def test_products_of_interleaved_rows(qtype, n_out):
    data = ggml.quantize(qtype, rows(n_out), np.ones(512, np.float32))
    weight = torch.from_numpy(ggml.dequantize(qtype, data, 512))
    inputs = torch.randn(7, 512)

    def product(x: torch.Tensor, repack: bool) -> tuple[torch.Tensor, int]:
        """x [..., 512]: of several columns each by itself, or all together."""
        graph = ggml.Graph(2)
        tensor, values = graph.input(tuple(x.shape))
        values.copy_(x)
        y = graph.op("mul_mat", graph.weights(qtype, data, 512, n_out, repack=repack), tensor)
        out = graph.result(y, (*x.shape[:-1], n_out))
        graph.finish(y).run()
        return out, graph.copied

    for x in (inputs, inputs[:1], inputs[:, None]):
        plain, copied = product(x, repack=False)
        assert copied == 0
        interleaved, copied = product(x, repack=True)
        assert copied in ((0, data.nbytes) if n_out % 8 == 0 else (0,))
        assert (interleaved - plain).norm() < 0.01 * plain.norm()
        assert (interleaved - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
    if qtype == "Q4_K" and n_out == 64 and ggml.library().ggml_cpu_has_avx2():
        assert copied == data.nbytes
    apart, _ = product(inputs[:, None], repack=True)
    alone = [product(x[None, None], repack=True)[0][0] for x in inputs]
    assert torch.equal(apart, torch.stack(alone))


def test_what_ggml_logs_to_outlives_a_library():
    """Threads that load ggml at once make several libraries and keep one; ggml calls the log of whichever was last."""
    ggml.Library(ggml.library().folder)
    gc.collect()
    calls: list[tuple] = []
    others = [ggml.LOG(lambda *what: calls.append(what)) for _ in range(100)]  # take the place of what was freed
    data = ggml.quantize("Q4_K", rows(64), np.ones(512, np.float32))
    ggml.Graph(1).weights("Q4_K", data, 512, 64, repack=True)  # ggml logs this
    assert others and not calls


def test_bad_lengths_and_names():
    with pytest.raises(QuantkitError, match="row of 128 is not a multiple"):
        ggml.quantize("Q4_K", np.zeros((1, 128), np.float32))
    with pytest.raises(QuantkitError, match="unknown ggml type IQ9"):
        ggml.row_bytes("IQ9", 256)


def test_missing_library_is_named(tmp_path):
    with pytest.raises(QuantkitError, match=r"libggml-base\.so"):
        ggml.Library(tmp_path)
