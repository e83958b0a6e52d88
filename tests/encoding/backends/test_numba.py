"""The kernels that numba compiles for the CPU, against the plain reference."""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("numba")

from encoder_data import TYPES, data, output_error

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import encode
from quantkit.encoding.backends import numba_backend
from quantkit.encoding.backends.numba_backend import NumbaBackend, by_rows
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.guess import CURVE, fit_blocks, sampled
from quantkit.encoding.hessian import Factor, prepare
from quantkit.encoding.refit import normal_equations
from quantkit.encoding.state import EFFORTS, Effort

CPU = torch.device("cpu")
BOTH = (Backend(), NumbaBackend())


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("qtype", TYPES)
def test_passes_choose_what_the_reference_chooses(qtype, effort):
    """Nearly always the same codes: sums in another order decide near-ties. The short lists of IQ1_S and IQ2_S at
    `fast` may miss the nearest entry: at most 1 % of the output error."""
    w, hessian = data(rows=37)
    fmt, how = FORMATS[qtype], EFFORTS[effort]
    factor = prepare([hessian], w.shape[1], CPU, full=how.feedback)
    plain, ours = (encode_rows(fmt, w[None], factor, how, backend) for backend in BOTH)
    short = effort == "fast" and qtype in ("IQ1_S", "IQ2_S")
    assert (ours.entry == plain.entry).float().mean() > (0.95 if short else 0.99)
    rel = 0.01 if short else 2e-3
    assert output_error(w, ours.q[0], hessian) == pytest.approx(output_error(w, plain.q[0], hessian), rel=rel)


def test_full_metric_without_feedback_is_searched_exactly():
    w, hessian = data(rows=9)
    fmt, factor = FORMATS["IQ1_S"], prepare([hessian], 512, CPU)
    how = Effort(feedback=False, tries=1, near=0, passes=0, refit=False)
    plain, ours = (encode_rows(fmt, w[None], factor, how, backend) for backend in BOTH)
    assert (ours.entry == plain.entry).float().mean() > 0.99


@pytest.mark.parametrize("qtype", ["IQ1_S", "IQ1_M", "IQ2_XS", "IQ3_S"])
def test_sampled(qtype):
    g = torch.Generator().manual_seed(2)
    x, weights, base = (torch.rand(s, generator=g) + 0.1 for s in ((2, 9, 256), (2, 256), (2, 9)))
    rounding = FORMATS[qtype].rounding
    want = sampled(x, weights, base, rounding)
    assert len(CURVE) == want.shape[-1]
    assert torch.allclose(numba_backend.sampled(x, weights, base, rounding), want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ4_XS"])
def test_fits(qtype):
    g = torch.Generator().manual_seed(4)
    fmt = FORMATS[qtype]
    x = torch.randn(2, 9, 256 // fmt.block, fmt.block, generator=g)
    w = torch.rand(2, 1, 256 // fmt.block, fmt.block, generator=g) + 0.1
    s, m = numba_backend.fit_blocks(fmt, x, w)
    want_s, want_m = fit_blocks(fmt, x, w)
    same = torch.isclose(s, want_s, rtol=1e-3) & torch.isclose(m, want_m, rtol=1e-3, atol=1e-4)
    assert same.float().mean() > 0.97  # two candidates may be as good as each other


def test_half_steps_are_nearest_levels():
    fmt = FORMATS["IQ4_XS"]
    y = torch.linspace(-140, 120, 2001)
    low, high = fmt.levels[0], fmt.levels[-1]
    got = torch.from_numpy(fmt.half_steps)[((y.clamp(low, high) - low) * 2).long()]
    assert torch.equal(got, fmt.round_to_levels(y)[0])


def test_products():
    g = torch.Generator().manual_seed(3)
    unit, w, h = (torch.randn(s, generator=g) for s in ((1, 5, 2, 512), (1, 5, 512), (1, 512, 512)))
    factor = Factor(h @ h.mT, torch.empty(0), torch.empty(0))
    (a, b), (got_a, got_b) = (normal_equations(unit, w @ factor.h, factor, backend) for backend in BOTH)
    assert torch.allclose(a, got_a, rtol=1e-3, atol=0.1) and torch.allclose(b, got_b, rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("qtype", ["IQ1_S", "Q2_K", "Q6_K"])
def test_bytes_do_not_depend_on_threads(qtype, monkeypatch):
    """83 rows: three threads take unlike parts, and the last row of types that go by lanes is filled up."""
    w, hessian = data(rows=83)
    found = []
    for n in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=n: n)
        found.append(encode(qtype, w, hessian, device="cpu", backend=BOTH[1]).tobytes())
    assert found[0] == found[1]


def test_an_error_in_some_rows_is_raised_when_all_are_done(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    done = []

    def work(rows: slice) -> None:
        if rows.start:
            done.append(rows)
        if rows.start == 64:
            raise ValueError("64")

    with pytest.raises(ValueError, match="64"):
        by_rows(work, 120, 16)
    assert sorted((rows.start, rows.stop) for rows in done) == [(32, 64), (64, 96), (96, 120)]


FRESH = """
import hashlib, torch
from quantkit.encoding import api
w = torch.randn(1, 32, 512, generator=torch.Generator().manual_seed(0))
print(hashlib.sha256(api.encode_batch("Q4_K", w, effort="fast", device="cpu").tobytes()).hexdigest())
"""


def test_the_process_that_compiles_gives_the_bytes_of_those_that_load(tmp_path):
    """Kernels just compiled and kernels from numba's cache: a run that is resumed must not see the difference."""
    around = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    run = [sys.executable, "-c", FRESH]
    first, second = (subprocess.run(run, env=around, capture_output=True, text=True, check=True) for _ in range(2))
    assert first.stdout == second.stdout and list(tmp_path.rglob("*.nbc"))
