"""The Triton kernels on the CPU, through Triton's interpreter (skipped where Triton is not installed)."""

import pytest
import torch

pytest.importorskip("triton")

from encoder_data import data, output_error

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.backends.triton_backend import TritonBackend
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Factor, prepare
from quantkit.encoding.refit import normal_equations
from quantkit.encoding.state import Effort

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_triton_gpu.py runs them on the GPU")
CPU = torch.device("cpu")
PLAIN, TRITON = Backend(), TritonBackend()


def test_best_entry():
    g = torch.Generator().manual_seed(1)
    grid = torch.from_numpy(FORMATS["IQ2_XXS"].grid)
    x, s = torch.rand(2, 70, 8, generator=g), torch.rand(2, 70, generator=g) * 0.02 + 0.01
    args = (x * -2 * s[..., None], s * s, grid, (grid**2).sum(-1).expand(2, -1).contiguous())
    index, value = TRITON.best_entry(*args)
    assert (index == PLAIN.best_entry(*args)[0]).float().mean() > 0.97
    assert torch.equal(value, grid[index])


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ3_S"])
def test_guess(qtype):
    """Kernel and reference choose alike but for near-ties; a row of zeros gets d = 0."""
    g = torch.Generator().manual_seed(2)
    fmt, x, weights = FORMATS[qtype], torch.randn(2, 9, 256, generator=g), torch.rand(2, 256, generator=g) + 0.1
    x[1, 3] = 0
    want, got = (backend.guess(fmt, x, weights, 2) for backend in (PLAIN, TRITON))
    assert got.d[1, 3] == 0 and torch.allclose(got.d, want.d, rtol=0.1)
    same = got.d == want.d
    assert same.float().mean() > 0.9
    for ours, theirs in ((got.scale, want.scale), (got.offset, want.offset)):
        assert (ours[same] == theirs[same])[..., 0].float().mean() > 0.97


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ3_S"])
def test_feedback_and_descent(qtype):
    w, hessian = data(rows=12, n_in=256)
    fmt, how = FORMATS[qtype], Effort(feedback=True, tries=2, near=1, passes=1)
    factor = prepare([hessian], 256, CPU)
    plain, ours = (encode_rows(fmt, w[None], factor, how, backend) for backend in (PLAIN, TRITON))
    assert output_error(w, ours.q[0], hessian) == pytest.approx(output_error(w, plain.q[0], hessian), rel=0.03)
    assert (ours.entry == plain.entry).float().mean() > 0.7  # near-ties go their own way, and take later groups along


def test_products():
    g = torch.Generator().manual_seed(3)
    unit, h = torch.randn(1, 5, 2, 512, generator=g), torch.randn(1, 512, 512, generator=g)
    factor = Factor(h @ h.mT, torch.empty(0), torch.empty(0))
    want = normal_equations(unit, unit[:, :, 0], factor, PLAIN)[0]
    got = torch.zeros_like(want)
    for k in range(4):
        part = slice(k // 2 * 256, k // 2 * 256 + 256)
        TRITON.products(unit[:, :, k % 2, part] @ factor.h[:, part, part.start :], unit, got, k)
    assert torch.allclose(want.triu(), got.triu(), rtol=1e-3, atol=0.1)
    whole = unit.unflatten(-1, (2, 256)).permute(0, 1, 3, 2, 4).reshape(5, 4, 256)  # [row, superblock · kind, column]
    wide = torch.zeros(5, 4, 512)
    for k in range(4):
        wide[:, k, k // 2 * 256 : k // 2 * 256 + 256] = whole[:, k]
    assert torch.allclose(want[0], wide @ factor.h[0] @ wide.mT, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("k", [1, 8, 28])
def test_systems_of_equations(k):
    g = torch.Generator().manual_seed(k)
    root = torch.randn(2, 3, k, k, generator=g)
    a, b = root @ root.mT + 0.1 * torch.eye(k), torch.randn(2, 3, k, generator=g)
    x = TRITON.solve(a, b)
    torch.testing.assert_close((a @ x[..., None])[..., 0], b, rtol=1e-3, atol=1e-3)
