"""Products on quantized bytes agree with those of dequantized matrices."""

import numpy as np
import pytest
import torch

from quantkit.ggml.graph import KEPT_ROWS, Experts, Graph, Linear
from quantkit.ggml.library import library
from quantkit.ggml.quants import dequantize, quantize
from quantkit.runtime.swiglu import swiglu


def rows(n: int = 12, n_in: int = 512) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((n, n_in)).astype(np.float32)


@pytest.mark.parametrize(
    "qtype, limit",
    [*((qtype, None) for qtype in ("F32", "BF16", "Q8_0", "Q6_K", "IQ2_XXS", "IQ1_S")), ("Q8_0", 0.5)],
)
def test_products(qtype, limit):
    n_expert, n_ff, d = 6, 256, 512
    gate, up = (quantize(qtype, rows(n_expert * n_ff, d), np.ones(d, np.float32)) for _ in range(2))
    down = quantize(qtype, rows(n_expert * d, n_ff) / 16, np.ones(n_ff, np.float32))
    experts = Experts([(qtype, w) for w in (gate, up, down)], d, n_ff, n_expert, 2, 2, limit)
    g, u, w = (
        torch.from_numpy(dequantize(qtype, data, n)).view(n_expert, -1, n)
        for data, n in ((gate, d), (up, d), (down, n_ff))
    )
    for n in (1, 2, 33, 1):
        x, share = torch.randn(n, d) / 16, torch.rand(n, 2)
        expert = torch.stack([torch.randperm(n_expert)[:2] for _ in range(n)])
        hidden = swiglu(torch.einsum("nd,nkfd->nkf", x, g[expert]), torch.einsum("nd,nkfd->nkf", x, u[expert]), limit)
        expected = torch.einsum("nkf,nkdf,nk->nd", hidden, w[expert], share)
        assert (experts(x, expert, share) - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("qtype", ["Q4_K", "Q4_0", "Q8_0", "Q6_K", "IQ1_S", "F32"])
@pytest.mark.parametrize("n_out", [64, 63])  # interleaved are 8 rows, or none
def test_products_of_interleaved_rows(qtype, n_out):
    data = quantize(qtype, rows(n_out), np.ones(512, np.float32))
    weight = torch.from_numpy(dequantize(qtype, data, 512))
    inputs = torch.randn(7, 512)

    def product(x: torch.Tensor, repack: bool) -> tuple[torch.Tensor, int]:
        """x [..., 512]: of several columns each by itself, or all together."""
        graph = Graph(2)
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
    if qtype == "Q4_K" and n_out == 64 and library().ggml_cpu_has_avx2():
        assert copied == data.nbytes
    apart, _ = product(inputs[:, None], repack=True)
    alone = [product(x[None, None], repack=True)[0][0] for x in inputs]
    assert torch.equal(apart, torch.stack(alone))


def test_a_long_prompt_leaves_no_memory_behind():
    """Of every matrix it would be some MB, whose layers R1 has 61 times."""
    data = quantize("Q8_0", rows(), np.ones(512, np.float32))
    product, weight = Linear("Q8_0", data, 512, 12, 1), torch.from_numpy(dequantize("Q8_0", data, 512))
    found = {}
    for n in (1, KEPT_ROWS, KEPT_ROWS + 1, 2, 300):
        x = torch.randn(n, 512)
        found[n] = x, product(x)
        assert set(product.graphs) <= {1, 2, KEPT_ROWS}
    assert set(product.graphs) == {1, 2}
    for x, y in found.values():  # nobody's result is overwritten by the next
        assert (y - x @ weight.T).norm() < 0.02 * (x @ weight.T).norm()
