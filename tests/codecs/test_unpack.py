"""Dequantizing without a detour gives what ggml gives."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from quantkit.codecs.unpack import COMPILED, compiled, unpack
from quantkit.ggml import library as ggml

QTYPES = ("F32", "F16", "BF16", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ4_NL")


def packed(qtype: str, n_rows: int, n_in: int) -> np.ndarray:
    """Any bytes are valid blocks; the scales among them must be finite, so infinite float16 exponents are cleared."""
    rng = np.random.default_rng(0)
    if qtype in ggml.NO_TABLES:
        values = torch.from_numpy(rng.standard_normal((n_rows, n_in), np.float32))
        values = values.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[qtype])
        return values.view(torch.uint8).numpy()
    data = rng.integers(0, 256, (n_rows, ggml.row_bytes(qtype, n_in)), np.uint8)
    return data & 0xBF  # bit 6 of a high byte: exponents stay below 16


def half_up(values: torch.Tensor) -> torch.Tensor:
    """float32 -> bfloat16, to nearest, ties away from zero: torch's own rounding but for ties."""
    return ((values.view(torch.int32) + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("qtype", QTYPES)
@pytest.mark.parametrize("workers", [1, 3])
def test_values_are_ggmls(qtype, dtype, workers):
    n_rows, n_in = 200, 768
    data = packed(qtype, n_rows, n_in)
    expected = torch.from_numpy(ggml.dequantize(qtype, data, n_in))
    if dtype == torch.bfloat16:
        ties_away = compiled() is not None and qtype in COMPILED
        expected = half_up(expected) if ties_away else expected.bfloat16()
    with ThreadPoolExecutor(workers) as pool, torch.inference_mode():  # a mode that the pool's threads do not have
        found = unpack(qtype, data, torch.full((n_rows, n_in), torch.nan, dtype=dtype), pool, workers)
    assert expected.isfinite().all() and expected.float().std() > 0
    if qtype in ("Q4_K", "Q5_K") and dtype == torch.bfloat16:  # ggml's compiler may fuse multiplication and subtraction
        near = torch.isclose(found.float(), expected.float(), rtol=2**-7)
        assert near.float().mean() > 0.9999 and (found == expected).float().mean() > 0.99
    else:
        assert torch.equal(found, expected)


def test_a_stack_of_matrices_and_part_of_a_row_count():
    data = packed("IQ2_XXS", 6, 256)
    out = torch.empty(2, 3, 256)
    with ThreadPoolExecutor(1) as pool:
        unpack("IQ2_XXS", data.reshape(2, 3, -1), out, pool, 1)
    assert torch.equal(out.view(6, 256), torch.from_numpy(ggml.dequantize("IQ2_XXS", data, 256)))
