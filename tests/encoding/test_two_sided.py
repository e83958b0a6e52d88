"""Two-sided encoding: less of tr(H_O Δ H_I Δᵀ) than rows encoded one by one, in bytes of the same types."""

import numpy as np
import pytest
import torch
from test_bytes import data, decode

from quantkit.encoding.api import SUPPORTED, Method, encode_batch
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.hessian import prepare
from quantkit.encoding.outputs import ExpertOutputs, LayerOutputs
from quantkit.encoding.two_sided import TwoSided, encode_row_blocks, encode_two_sided, row_factor
from quantkit.errors import QuantkitError
from quantkit.formats.gradients import DOWN, INNER, ExpertRows, LayerGradients, digest, path_of

ROWS, N_IN, CPU = 64, 256, torch.device("cpu")


def correlated(count=1, seed=5, rank=24) -> torch.Tensor:
    """H_O of outputs that mostly move together, some of them much more than others: [count, ROWS, ROWS]."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(count, rank, ROWS, generator=g) * torch.exp(torch.randn(ROWS, generator=g))
    return mix.mT @ mix / rank + 0.05 * torch.eye(ROWS)


def matrices(count=1):
    """Weights [count, ROWS, N_IN], and the factor of their inputs."""
    each = [data(rows=ROWS, n_in=N_IN, seed=i) for i in range(count)]
    return torch.stack([w for w, _ in each]), prepare([h for _, h in each], N_IN, CPU)


def loss(qtype, w, packed, factor, outputs) -> torch.Tensor:
    """tr(H_O Δ H_I Δᵀ) of each matrix."""
    error = w - torch.stack([decode(qtype, each) for each in packed])
    return ((outputs @ error @ factor.h) * error).sum((1, 2))


@pytest.mark.parametrize("qtype", sorted(SUPPORTED))
def test_less_error_where_outputs_are_correlated(qtype):
    (w, factor), outputs = matrices(), correlated()
    before = loss(qtype, w, encode_batch(qtype, w, factor, device="cpu"), factor, outputs)
    after = loss(qtype, w, encode_two_sided(Method.of(qtype, device="cpu"), w, factor, outputs), factor, outputs)
    assert after < 0.6 * before


@pytest.mark.parametrize("qtype", ["IQ1_S", "Q2_K"])
def test_the_plain_back_end_does_as_well(qtype):
    (w, factor), outputs = matrices(), correlated()
    how = TwoSided(passes=1)
    fast, plain = (
        loss(
            qtype,
            w,
            encode_two_sided(Method.of(qtype, device="cpu", backend=b), w, factor, outputs, how),
            factor,
            outputs,
        )
        for b in (None, Backend())
    )
    assert float(plain) == pytest.approx(float(fast), rel=0.05)


def test_through_tritons_interpreter():
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("compiled there, not interpreted")
    from quantkit.encoding.backends.triton_backend import TritonBackend

    (w, factor), outputs, how = matrices(), correlated(), TwoSided(block=8, passes=1)
    w, outputs = w[:, :16].contiguous(), outputs[:, :16, :16]
    ours, plain = (
        loss(
            "IQ2_XXS",
            w,
            encode_two_sided(Method.of("IQ2_XXS", device="cpu", backend=b), w, factor, outputs, how),
            factor,
            outputs,
        )
        for b in (TritonBackend(), Backend())
    )
    assert float(ours) == pytest.approx(float(plain), rel=0.1)


@pytest.mark.parametrize("qtype", ["IQ1_M", "IQ3_S", "Q4_K"])
def test_outputs_that_do_not_touch_leave_rows_as_they_are(qtype):
    """Nothing but further passes over each row by itself, so hardly less error."""
    (w, factor), alike = matrices(), torch.eye(ROWS)[None]
    before = loss(qtype, w, encode_batch(qtype, w, factor, device="cpu"), factor, alike)
    method = Method.of(qtype, device="cpu")
    same = loss(qtype, w, encode_two_sided(method, w, factor, alike, TwoSided(passes=0)), factor, alike)
    more = loss(qtype, w, encode_two_sided(method, w, factor, alike), factor, alike)
    assert float(same) == pytest.approx(float(before), rel=1e-3)
    assert 0.9 * same < more <= same


def test_bytes_are_the_values_that_were_chosen_in_their_own_order():
    (w, factor), outputs, how = matrices(2), correlated(2), TwoSided(passes=1)
    method = Method.of("Q2_K", gamma=1.03, device="cpu")
    packed = encode_two_sided(method, w, factor, outputs, how)
    for e in range(2):
        rows = row_factor(outputs[e : e + 1], how, CPU)
        assert not torch.equal(rows.order[0], torch.arange(ROWS))
        one = factor.of(slice(e, e + 1))
        state = method.finished(encode_row_blocks(method, w[e : e + 1, rows.order[0]], one, rows, how.passes))
        state.decode()
        chosen = torch.empty(ROWS, N_IN)
        chosen[rows.order[0]] = state.q[0]
        torch.testing.assert_close(decode("Q2_K", packed[e]), chosen, rtol=1e-6, atol=1e-9)


def test_row_factor_gives_back_the_damped_outputs():
    outputs, how = correlated(2) * 1e-12, TwoSided(block=16, damping=0.3)
    rows = row_factor(outputs, how, CPU)
    diag = rows.factor.h.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(diag.mean(-1), torch.ones(2))
    assert (diag.diff(dim=-1) <= 0).all()
    unit, d = torch.eye(ROWS) + rows.factor.u, torch.stack([torch.block_diag(*each) for each in rows.factor.d])
    torch.testing.assert_close(unit @ d @ unit.mT, rows.factor.h, rtol=1e-4, atol=1e-5)


def test_hessians_or_their_factor_give_the_same_bytes():
    each = [data(rows=ROWS, n_in=N_IN, seed=i) for i in range(2)]
    w, hessians, outputs = torch.stack([w for w, _ in each]), [h for _, h in each], correlated(2)
    method = Method.of("IQ2_XXS", device="cpu")
    packed = encode_two_sided(method, w, hessians, outputs, TwoSided(passes=1))
    again = encode_two_sided(method, w, prepare(hessians, N_IN, CPU), list(outputs), TwoSided(passes=1))
    assert np.array_equal(packed, again)


def test_rows_that_do_not_divide_into_blocks_are_refused():
    w, factor = matrices()
    with pytest.raises(QuantkitError, match="blocks of 24"):
        encode_two_sided(Method.of("Q4_K", device="cpu"), w, factor, correlated(), TwoSided(block=24))


# -- H_O, from what a backward pass leaves ----------------------------------------------------------------------------


def gradient_rows(counts=(5, 0, 7), n_out=ROWS, seed=0) -> ExpertRows:
    g = torch.Generator().manual_seed(seed)
    return ExpertRows(torch.randn(sum(counts), n_out, generator=g) * 1e-6, torch.tensor(counts))


def test_experts_have_their_own_part_and_their_layers():
    rows = gradient_rows()
    found = ExpertOutputs(rows, 0.25, CPU)
    own = [rows.of(e).T @ rows.of(e) for e in (0, 2)]
    own = [h / h.diagonal().mean() for h in own]
    mean = (own[0] + own[1]) / 2
    torch.testing.assert_close(found.of(1), mean)  # no gradients of its own
    torch.testing.assert_close(found.of(2), 0.25 * own[1] + 0.75 * mean)


def test_a_layer_without_gradients_knows_nothing(tmp_path):
    nothing = LayerOutputs(None, 3, 0.5, CPU)
    assert not nothing.knows(DOWN, 3, ROWS) and nothing.matrix("attn_q_a", ROWS) is None
    empty = {DOWN: gradient_rows((0, 0, 0)), INNER: gradient_rows()}
    LayerGradients(empty, {"attn_q_a": torch.zeros(ROWS, ROWS)}).save(path_of(tmp_path, 3))
    here = LayerOutputs(tmp_path, 3, 0.5, CPU)
    assert here.knows(INNER, 3, ROWS) and not here.knows(DOWN, 3, ROWS) and here.matrix("attn_q_a", ROWS) is None
    assert not LayerOutputs(tmp_path, 4, 0.5, CPU).knows(INNER, 3, ROWS)


def test_gradients_of_another_model_are_refused(tmp_path):
    LayerGradients({DOWN: gradient_rows()}, {"attn_q_a": torch.eye(ROWS)}).save(path_of(tmp_path, 0))
    here = LayerOutputs(tmp_path, 0, 0.5, CPU)
    with pytest.raises(QuantkitError, match="3 where the model has 16"):
        here.knows(DOWN, 16, ROWS)
    with pytest.raises(QuantkitError, match="64 where the model has 32"):
        here.matrix("attn_q_a", 32)


def test_gradients_that_are_not_finite_are_refused():
    rows = gradient_rows()
    rows.rows[6, 3] = float("nan")
    with pytest.raises(QuantkitError, match="expert 2 are not finite"):
        ExpertOutputs(rows, 0.5, CPU)


def test_digest_is_of_what_the_files_hold(tmp_path):
    with pytest.raises(QuantkitError, match="holds no gradients"):
        digest(tmp_path)
    LayerGradients({DOWN: gradient_rows()}, {}).save(path_of(tmp_path, 0))
    before = digest(tmp_path)
    LayerGradients({DOWN: gradient_rows(seed=1)}, {}).save(path_of(tmp_path, 0))
    assert digest(tmp_path) != before
