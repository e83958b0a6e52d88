"""Matrices that stay packed: few rows and many, whole and in tiles."""

import pytest
import torch

from quantkit.codecs.registry import codec
from quantkit.ggml.quants import quantize
from quantkit.runtime import packed
from quantkit.runtime.packed import FEW, Packed


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("n", [1, FEW + 1, 40])
def test_products(monkeypatch, n, dtype, error):
    """Each number of rows, of either dtype of input: as by the dequantized matrix, float32 where the input is."""
    monkeypatch.setattr(packed, "TILE_WEIGHTS", 2560)  # 10 rows; the last tile has 7
    torch.manual_seed(0)
    data = torch.from_numpy(quantize("Q4_K", torch.randn(37, 256).numpy()))
    matrix, x = Packed("Q4_K", data[None], 256, dtype), torch.randn(n, 256)
    expected = x @ codec("Q4_K").dequantize(data).T
    for rows in (x, x.to(dtype)):
        found = matrix(rows)
        assert found.dtype == rows.dtype and found.shape == (n, 37)
        assert (found.float() - expected).abs().max() < error * expected.abs().max()
