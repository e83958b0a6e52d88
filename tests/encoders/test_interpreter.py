"""The Triton kernels on the CPU, through Triton's interpreter (skipped where Triton is not installed)."""

import pytest
import torch

pytest.importorskip("triton")

from test_bytes import data, output_error

from quantkit.encoders import engine, fused, kernels, search
from quantkit.encoders.api import formats
from quantkit.encoders.engine import Effort, encode_rows
from quantkit.encoders.hessian import prepare
from quantkit.encoders.refit import normal_equations
from quantkit.encoders.scales import CURVE, _rounding, _sampled
from quantkit.encoders.search import best_entry

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_kernels.py runs them on the GPU")
CPU = torch.device("cpu")


def test_best_entry():
    g = torch.Generator().manual_seed(1)
    grid = torch.from_numpy(formats()["IQ2_XXS"].grid)
    x, s = torch.rand(2, 70, 8, generator=g), torch.rand(2, 70, generator=g) * 0.02 + 0.01
    args = (x * -2 * s[..., None], s * s, grid, (grid**2).sum(-1).expand(2, -1).contiguous())
    assert (kernels.best_entry(*args) == best_entry(*args)).float().mean() > 0.97


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ2_XXS"])
def test_curves(qtype):
    g = torch.Generator().manual_seed(2)
    x, weights, base = (torch.rand(s, generator=g) + 0.1 for s in ((1, 9, 256), (1, 256), (1, 9)))
    levels, shifts, span = _rounding(qtype)
    got = kernels.curves(x, weights, base, CURVE, levels, shifts, span, qtype != "IQ1_S")
    assert torch.allclose(got, _sampled(x, weights, base, levels, shifts, span), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ3_S"])
def test_fused_feedback_and_descent(qtype, monkeypatch):
    w, hessian = data(rows=12, n_in=256)
    fmt, how = formats()[qtype], Effort(feedback=True, tries=2, near=1, passes=1)
    factor = prepare([hessian], 256, CPU)
    monkeypatch.setattr(search, "use_compiled", False)
    plain = encode_rows(fmt, w[None], factor, how)
    monkeypatch.setattr(engine, "_fused", lambda fmt, w: True)
    ours = encode_rows(fmt, w[None], factor, how)
    assert output_error(w, ours.q[0], hessian) == pytest.approx(output_error(w, plain.q[0], hessian), rel=0.03)
    assert (ours.entry == plain.entry).float().mean() > 0.7  # near-ties go their own way, and take later groups along


def test_products(monkeypatch):
    monkeypatch.setattr(search, "use_compiled", False)
    g = torch.Generator().manual_seed(3)
    unit, w, h = (torch.randn(s, generator=g) for s in ((1, 5, 2, 512), (1, 5, 512), (1, 512, 512)))
    factor = prepare([None], 512, CPU)
    factor = type(factor)(h @ h.mT, None, factor.d)
    a, b = normal_equations(w, unit, factor)
    got_a, got_b = torch.empty_like(a), torch.empty_like(b)
    for k in range(4):
        image = unit[:, :, k % 2, k // 2 * 256 : k // 2 * 256 + 256] @ factor.h[:, k // 2 * 256 : k // 2 * 256 + 256]
        fused.products(image, unit, w, got_a, got_b, k)
    assert torch.allclose(a, got_a, rtol=1e-3, atol=0.1) and torch.allclose(b, got_b, rtol=1e-3, atol=0.1)
