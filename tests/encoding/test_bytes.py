"""Every packed block decodes, by gguf and by ggml, to exactly the weights that the encoder chose."""

import numpy as np
import pytest
import torch
from encoder_data import TYPES, data, decode, output_error

from quantkit.codecs.registry import FORMATS
from quantkit.codecs.types import row_bytes
from quantkit.encoding.api import choose, encode, encode_batch, pack
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Hessian, prepare, second_moment
from quantkit.encoding.state import EFFORTS
from quantkit.ggml import quants

CPU = torch.device("cpu")


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("qtype", TYPES)
def test_bytes_decode_to_what_the_encoder_chose(qtype, effort):
    w, hessian = data()
    fmt, how = FORMATS[qtype], EFFORTS[effort]
    factor = prepare([hessian], w.shape[1], CPU, full=how.feedback)
    state = encode_rows(fmt, w[None], factor, how, choose("cpu"))
    packed = pack(state)[0]
    assert packed.shape == (len(w), row_bytes(qtype, w.shape[1]))
    assert torch.equal(decode(qtype, packed), state.q[0])
    assert np.array_equal(quants.dequantize(qtype, packed, w.shape[1]), state.q[0].numpy())


@pytest.mark.parametrize("qtype", TYPES)
def test_feedback_beats_independent_rounding(qtype):
    w, hessian = data()
    fast, normal = (
        output_error(w, decode(qtype, encode(qtype, w, hessian, effort=effort)), hessian)
        for effort in ("fast", "normal")
    )
    assert normal < 0.85 * fast


@pytest.mark.parametrize("qtype", ["Q2_K", "Q3_K", "Q4_K", "Q6_K", "IQ2_XXS", "IQ2_XS", "IQ3_S", "IQ4_XS"])
def test_beats_ggml_in_the_same_bytes(qtype):
    w, hessian = data(rows=16, n_in=512)
    theirs = quants.quantize(qtype, w.numpy(), hessian.diagonal.numpy())
    ours = encode(qtype, w, hessian)
    assert ours.nbytes == theirs.nbytes
    assert output_error(w, decode(qtype, ours), hessian) < 0.85 * output_error(w, decode(qtype, theirs), hessian)


@pytest.mark.parametrize("qtype", TYPES)
@pytest.mark.parametrize("effort", ["fast", "normal"])
def test_hostile_rows(qtype, effort):
    """NaN counts as 0, infinities as ±65504; zero, tiny and huge blocks stay finite."""
    w, hessian = data(rows=8)
    w[0] = 0
    w[1, :256] = 0
    w[2, 5], w[2, 300] = float("nan"), float("inf")
    w[3] *= 1e6
    w[4] *= 1e-9
    w[5, 7] = 3e38
    q = decode(qtype, encode(qtype, w, hessian, effort=effort))
    assert torch.isfinite(q).all()
    assert (q[0] == 0).all()
    assert output_error(w[7:], q[7:], hessian) < 0.5  # rows do not disturb each other


@pytest.mark.parametrize(
    "hessian",
    [
        None,
        Hessian(),
        Hessian(diagonal=torch.rand(512)),
        Hessian(torch.zeros(512, 512)),
        Hessian(torch.full((512, 512), float("nan"))),
    ],
)
def test_without_a_usable_hessian(hessian):
    w, full = data(rows=4)
    q = decode("Q4_K", encode("Q4_K", w, hessian))
    assert output_error(w, q, full) < 0.02


@pytest.mark.parametrize("qtype", TYPES)
def test_experts_without_data_do_not_disturb_the_others(qtype):
    """An expert that saw no token, or only zeros, is encoded under what is known of it (nothing: the identity)."""
    (a, ha), (b, _) = data(rows=5, seed=1), data(rows=5, seed=2)
    known = [second_moment(torch.empty(0, 512)), ha, Hessian(torch.zeros(512, 512), torch.zeros(512))]
    q = decode(qtype, encode_batch(qtype, torch.stack([b, a, b]), known))
    assert np.array_equal(q[1], decode(qtype, encode(qtype, a, ha)))
    assert torch.equal(q[0], q[2])
    plain = second_moment(torch.eye(512))
    bound = {"1": 0.5, "2": 0.25}.get(next(c for c in qtype if c.isdigit()), 0.1)
    assert output_error(b, q[0], plain) < bound


@pytest.mark.parametrize("effort", ["fast", "normal"])
@pytest.mark.parametrize("qtype", TYPES)
def test_odd_rows_in_small_tiles(qtype, effort, monkeypatch):
    """Rows that fill no tile, and no vector register: as good as all at once."""
    w, hessian = data(rows=37)
    whole = output_error(w, decode(qtype, encode(qtype, w, hessian, effort=effort)), hessian)
    monkeypatch.setattr("quantkit.encoding.api.CPU_ROWS", 7)
    tiled = output_error(w, decode(qtype, encode(qtype, w, hessian, effort=effort)), hessian)
    assert tiled == pytest.approx(whole, rel=1e-3)


def test_few_tokens_still_factorize():
    w, _ = data(rows=4)
    hessian = second_moment(torch.randn(3, 512))
    assert torch.isfinite(decode("IQ2_XS", encode("IQ2_XS", w, hessian))).all()


def test_rows_do_not_depend_on_the_tile(monkeypatch):
    w, hessian = data(rows=13)
    whole = encode("IQ2_XXS", w, hessian)
    monkeypatch.setattr("quantkit.encoding.api.CPU_ROWS", 5)
    assert (encode("IQ2_XXS", w, hessian) == whole).mean() > 0.999  # up to the order of float sums


def test_batch_is_one_encoding_per_expert():
    (a, ha), (b, hb) = data(rows=6, seed=1), data(rows=6, seed=2)
    both = encode_batch("Q3_K", torch.stack([a, b]), [ha, hb])
    assert np.array_equal(both[0], encode("Q3_K", a, ha))
    assert np.array_equal(both[1], encode("Q3_K", b, hb))


def test_gamma_scales_the_weights():
    w, hessian = data(rows=4)
    plain, scaled = (decode("IQ1_S", encode("IQ1_S", w, hessian, gamma=g)) for g in (1.0, 1.25))
    assert torch.allclose(scaled, 1.25 * plain, rtol=2e-3)


def test_wrong_row_length_names_the_type():
    with pytest.raises(Exception, match="Q4_K"):
        encode("Q4_K", torch.zeros(2, 300))


def test_coarsest_types_without_a_hessian_take_ggmls_bytes(monkeypatch):
    (a, ha), (b, _) = data(rows=6, seed=1), data(rows=6, seed=2)
    theirs = np.full((6, row_bytes("IQ1_S", 512)), 7, np.uint8)
    monkeypatch.setattr(quants, "quantize", lambda qtype, rows, importance: theirs)
    both = encode_batch("IQ1_S", torch.stack([b, a]), [Hessian(diagonal=torch.ones(512)), ha])
    assert np.array_equal(both[0], theirs)
    assert np.array_equal(both[1], encode("IQ1_S", a, ha))
