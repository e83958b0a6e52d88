"""The CUDA back end against the plain reference (run with -m gpu), and the pieces both share."""

import pytest
import torch
from encoder_data import data, decode, output_error

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import choose, encode
from quantkit.encoding.guess import guess
from quantkit.encoding.hessian import blocked_cholesky, factorize, second_moment
from quantkit.encoding.search import best_entry

GPU = pytest.mark.gpu


def test_blocked_cholesky_is_cholesky():
    h = data(n_in=640)[1].matrix + 0.01 * torch.eye(640)
    lower = blocked_cholesky(h[None], size=256)[0]
    assert torch.allclose(lower, torch.linalg.cholesky(h), atol=1e-4)
    assert blocked_cholesky(-h[None]) is None


def test_factor_rebuilds_the_hessian():
    h = data(n_in=256)[1].matrix + 0.01 * torch.eye(256)
    f = factorize(h[None])
    unit = torch.eye(256) + f.u[0]
    assert torch.allclose(unit @ torch.block_diag(*f.d[0]) @ unit.T, h, atol=1e-4)
    assert (torch.block_diag(*torch.ones(32, 8, 8)) * f.u[0] == 0).all() and (f.u[0].tril() == 0).all()


@GPU
@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_best_entry_kernel(qtype):
    """Entries may differ only where their scores nearly agree."""
    g = torch.Generator().manual_seed(1)
    grid = torch.from_numpy(FORMATS[qtype].grid)
    e, n, k = 3, 517, grid.shape[1]
    metric = torch.rand(e, k, generator=g) + 0.1
    s = torch.rand(e, n, generator=g) * 0.1 + 0.01
    x = torch.randn(e, n, k, generator=g).abs() * s[..., None] * grid.abs().mean()
    bias = (grid**2) @ metric.T
    args = (x * metric[:, None] * -2 * s[..., None], s * s, grid, bias.T.contiguous())
    want = best_entry(*args)[0]
    got, value = (t.cpu() for t in choose("cuda").best_entry(*(a.cuda() for a in args)))
    assert torch.equal(value, grid[got])
    energy = (x.square() * metric[:, None]).sum(-1)

    def score(index):
        return ((s[..., None] * grid[index] - x).square() * metric[:, None]).sum(-1)

    assert (score(got) - score(want) < 4e-3 * energy).all()
    assert (got == want).float().mean() > 0.97


@GPU
@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_guess_kernel(qtype):
    g = torch.Generator().manual_seed(2)
    fmt, x, weights = FORMATS[qtype], torch.randn(2, 77, 256, generator=g), torch.rand(2, 256, generator=g)
    want, got = guess(fmt, x, weights, 2), choose("cuda").guess(fmt, x.cuda(), weights.cuda(), 2)
    same = got.d.cpu() == want.d
    assert torch.allclose(got.d.cpu(), want.d, rtol=0.1) and same.float().mean() > 0.9
    assert (got.scale.cpu() == want.scale)[same][..., 0].float().mean() > 0.97


@GPU
@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("qtype", sorted(FORMATS))
def test_encode_on_the_gpu_is_as_good_as_on_the_cpu(qtype, effort):
    """Not the same bytes (sums in another order choose other near-ties), but the same output error within 2 %."""
    w, hessian = data(rows=64)
    errors = []
    for device in ("cpu", "cuda"):
        q = decode(qtype, encode(qtype, w, hessian, effort=effort, device=device))
        errors.append(output_error(w, q, hessian))
    assert errors[1] == pytest.approx(errors[0], rel=0.02)


@GPU
def test_gpu_factor_of_a_wide_matrix():
    x = torch.randn(300, 1024, device="cuda")
    w = torch.randn(16, 1024) * 0.02
    hessian = second_moment(x)
    assert torch.isfinite(decode("IQ1_S", encode("IQ1_S", w, hessian, device="cuda"))).all()
