"""Triton for the types that round each weight alone, against the plain path: through Triton's interpreter where there
is no GPU, block by block (it takes 10 s for a superblock); on the device (-m gpu) whole matrices."""

import pytest
import torch

pytest.importorskip("triton")

from encoder_data import data, decode, output_error

from quantkit.codecs.format import GROUP, SUPERBLOCK
from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import pack
from quantkit.encoding.backends import triton_levels
from quantkit.encoding.backends.reference import Backend, hypotheses
from quantkit.encoding.backends.triton_backend import TritonBackend
from quantkit.encoding.backends.triton_levels import Columns, Curvature, Descent, Metric, Steps
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.guess import fit_blocks, guess, refresh
from quantkit.encoding.hessian import Factor, blocks, factorize, prepare
from quantkit.encoding.search import unit_upper
from quantkit.encoding.state import EFFORTS, Effort, block_scale

LEVELS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"]
GPU = pytest.mark.gpu
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests marked gpu run the kernels themselves")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PLAIN, TRITON = Backend(), TritonBackend()


def matrices(rows: int, n: int = 256, count: int = 2) -> tuple[torch.Tensor, Factor, list]:
    """Matrices [count, rows, n] with a row and, in another, some blocks of zeros, their factors and Hessians."""
    w, hessians = zip(*(data(rows=rows, n_in=n, seed=seed) for seed in range(count)), strict=True)
    w = torch.stack(w)
    w[:, 1], w[:, 2, :32], w[:, 2, -32:] = 0, 0, 0
    return w.to(DEVICE), prepare(list(hessians), n, DEVICE), list(hessians)


def check_fits(qtype: str, rows: int, count: int) -> None:
    w, factor, _ = matrices(rows, count=count)
    fmt, weights = FORMATS[qtype], factor.d.diagonal(dim1=-2, dim2=-1).flatten(1)
    x, wb = w.unflatten(-1, (-1, fmt.block)), weights.view(count, 1, -1, fmt.block)
    s, m = triton_levels.fit(fmt, w.mT.contiguous(), weights)
    want_s, want_m = fit_blocks(fmt, x, wb)
    same = torch.isclose(s, want_s, rtol=1e-3, atol=1e-6) & torch.isclose(m, want_m, rtol=1e-3, atol=1e-5)
    assert same.float().mean() > 0.97  # two candidates may be as good as each other
    assert (s[:, 1] == 0).all() and (m[:, 1] == 0).all()


def check_feedback(qtype: str, rows: int, count: int) -> None:
    """The first and the last block of a superblock."""
    w, factor, _ = matrices(rows, count=count)
    fmt, (upper, diagonal) = FORMATS[qtype], unit_upper(factor.d)
    weights = factor.d.diagonal(dim1=-2, dim2=-1).flatten(1)
    target = w + 0.002 * torch.randn(w.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE) * (w != 0)
    first = guess(fmt, w, weights, None)
    u, per = blocks(factor.u, fmt.block), fmt.block // GROUP
    w_columns = w.mT.contiguous()
    columns = Columns(target.mT.contiguous(), w_columns, torch.zeros_like(w_columns), torch.zeros_like(w_columns))
    codes = torch.zeros(2, count, SUPERBLOCK // fmt.block, rows, dtype=torch.int32, device=DEVICE)
    metrics = Metric(weights, upper.contiguous(), diagonal.contiguous(), u)
    for b in (0, SUPERBLOCK // fmt.block - 1):
        here = slice(b * fmt.block, (b + 1) * fmt.block)
        triton_levels.feedback_block(fmt, b, 1, columns, Steps(*codes, first.d, first.dmin), metrics)
        scale, offset = refresh(fmt, target[..., here], weights[:, here], first.d, first.dmin)
        tried = hypotheses(fmt, first, scale[..., None], offset[..., None], 1)
        metric = factor.d[:, b * per : (b + 1) * per]
        best, choice = PLAIN.encode_span(fmt, target[..., here], w[..., here], tried, metric, u[:, b])
        won = tried.of(best)
        q = won.s[..., None] * choice.value + won.o[..., None]
        same = (codes[0, :, b] == won.scale) & (codes[1, :, b] == won.offset)
        same &= (columns.value[:, here].mT == choice.value).all(-1)
        # Sums in another order decide near-ties; of a row of zeros they are all ties, but it must stay zero.
        assert same[:, 3:].float().mean() > 0.8
        assert torch.allclose(columns.error[:, here].mT[same], (w[..., here] - q)[same], atol=1e-6)
        assert (columns.error[:, here, 1:3] == 0).all()


def check_descent(qtype: str, rows: int, count: int, part: int) -> None:
    w, factor, _ = matrices(rows, count=count)
    fmt, (inverse, (upper, diagonal)) = FORMATS[qtype], (torch.linalg.inv(m := blocks(factor.h)), unit_upper(m))
    state = PLAIN.plain_pass(fmt, w.roll(1, 1), factor.d, EFFORTS["fast"])  # far from the optimum: much moves
    old, q, slope, lo = state.value.clone(), state.q.clone(), (state.q - w) @ factor.h, 32 * part
    value, gradient, change = old.mT.contiguous(), slope.mT.contiguous(), torch.zeros(count, 32, rows, device=DEVICE)
    s = block_scale(fmt, state.d[..., 0], state.dmin[..., 0], state.scale, state.offset)[0].mT.contiguous()
    curvature = Curvature(inverse, upper.contiguous(), diagonal.contiguous(), blocks(factor.h, 32))
    triton_levels.descent_part(fmt, part, Descent(gradient, value, change, s), curvature)
    local = factorize(m.flatten(0, 1))
    d, u = local.d.unflatten(0, (count, -1)), local.u.unflatten(0, (count, -1))
    for at in range(lo, lo + 32, GROUP):
        here, i = slice(at, at + GROUP), at // GROUP
        target = state.q[..., here] - slope[..., here] @ inverse[:, i]
        near = Factor(factor.h[:, here, here], u[:, i], d[:, i])
        slope += PLAIN.revise(state, target, near, here) @ factor.h[:, here]
    here = slice(lo, lo + 32)
    same = (value[:, here].mT == state.value[..., here]).all(-1)
    assert same.float().mean() > 0.8 and not torch.equal(state.value, old)
    assert torch.allclose(change.mT[same], (state.q - q)[..., here][same], atol=1e-6)
    value[:, here] = old[..., here].mT
    assert torch.equal(value.mT, old)


@INTERPRETER
@pytest.mark.parametrize("qtype", LEVELS)
def test_interpreted(qtype, monkeypatch):
    count = 2 if qtype == "Q3_K" else 1
    if qtype == "Q6_K":  # two tiles, the second not full
        monkeypatch.setattr(triton_levels, "ROWS", 4)
    check_fits(qtype, 6, 1)
    check_feedback(qtype, 6, count)
    check_descent(qtype, 6, count, 2)


@INTERPRETER
def test_interpreted_matrix():
    """All of it together."""
    w, factor, (hessian,) = matrices(11, count=1)
    fmt, how = FORMATS["Q4_K"], Effort(feedback=True, tries=2, near=0, passes=1)
    plain, ours = (encode_rows(fmt, w, factor, how, backend) for backend in (PLAIN, TRITON))
    assert (ours.entry == plain.entry).float().mean() > 0.9
    assert output_error(w[0], ours.q[0], hessian) == pytest.approx(output_error(w[0], plain.q[0], hessian), rel=0.01)
    assert (ours.q[0, 1] == 0).all()


@GPU
@pytest.mark.parametrize("qtype", LEVELS)
def test_kernels_on_the_gpu(qtype):
    check_fits(qtype, 77, 3)
    check_feedback(qtype, 77, 3)
    check_descent(qtype, 77, 3, 7)


@GPU
@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("qtype", LEVELS)
def test_matrices_on_the_gpu(qtype, effort):
    """Nearly always the codes of the plain path, its output error within 1 %, bytes that decode to what was chosen."""
    w, factor, hessians = matrices(150, n=768, count=3)
    fmt, how = FORMATS[qtype], EFFORTS[effort]
    factor = factor if how.feedback else prepare(hessians, 768, DEVICE, full=False)
    plain, ours = (encode_rows(fmt, w, factor, how, backend) for backend in (PLAIN, TRITON))
    assert (ours.entry == plain.entry).float().mean() > 0.9
    for i, hessian in enumerate(hessians):
        error, want = (output_error(w[i].cpu(), state.q[i].cpu(), hessian) for state in (ours, plain))
        assert error == pytest.approx(want, rel=0.01)
        assert torch.equal(decode(qtype, pack(ours)[i]), ours.q[i].cpu())
    assert (ours.q[:, 1] == 0).all()


@GPU
@pytest.mark.parametrize("qtype", LEVELS)
def test_hostile_rows_on_the_gpu(qtype):
    w, factor, _ = matrices(9)
    w[0, 3], w[0, 4], w[0, 5, 7], w[1, 3, ::2] = 65504, 1e-12, -65504, 1e-38
    state = encode_rows(FORMATS[qtype], w, factor, EFFORTS["normal"], TRITON)
    assert torch.isfinite(state.q).all() and torch.isfinite(state.d).all()
    assert state.q[0, 3].mean() > 60000
