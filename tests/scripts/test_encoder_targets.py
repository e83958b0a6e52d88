"""scripts/research/encoder_targets.py: targets of sequential encoding, and the values that experiments look at."""

import pytest
import torch
from encoder_data import data, decode, output_error
from encoder_targets import cross_moment, encode_values, retarget

from quantkit.encoding.api import encode
from quantkit.encoding.hessian import second_moment


def test_retarget_undoes_a_linear_change_of_the_inputs():
    """If the inputs come out 10 % short, the weights grow."""
    w, x = torch.randn(4, 256), torch.randn(4096, 256)
    hessian, cross = second_moment(0.9 * x), cross_moment(x, 0.9 * x, torch.ones(4096))
    assert torch.allclose(retarget(w, hessian, cross), w / 0.9, rtol=0.05, atol=0.05)
    assert torch.allclose(retarget(w, hessian), w, atol=1e-4)


@pytest.mark.parametrize("qtype", ["IQ2_XXS", "Q3_K"])
def test_values_are_what_the_bytes_decode_to(qtype):
    w, hessian = data(rows=6)
    values = encode_values(qtype, w[None], [hessian])[0]
    assert torch.equal(values, decode(qtype, encode(qtype, w, hessian, device="cpu")))
    weaker = encode_values(qtype, w[None], [hessian], beta=0.5)[0]
    assert output_error(w, weaker, hessian) > output_error(w, values, hessian)
