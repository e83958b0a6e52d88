"""Sizes and names."""

import pytest

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError


def test_types_are_listed_by_bits():
    bits = [qtype.bpw for qtype in qtypes.QTYPES.values()]
    assert bits == sorted(bits)


def test_rows_are_whole_blocks():
    assert qtypes.row_bytes("Q8_0", 128) == 136
    assert not qtypes.fits("Q6_K", 128)
    with pytest.raises(QuantkitError, match="row of 128 weights does not divide into Q6_K blocks of 256"):
        qtypes.row_bytes("Q6_K", 128)


def test_who_needs_importance():
    needy = {name for name in qtypes.QTYPES if qtypes.needs_importance(name)}
    assert needy == {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS"}


@pytest.mark.parametrize("name", ["Q4_1", "TQ1_0", "q8_0", "", None, 3, []])
def test_unknown_type(name):
    with pytest.raises(QuantkitError, match="unknown type"):
        qtypes.get(name)


def test_types_that_are_only_read():
    assert qtypes.stored("TQ1_0").row_bytes(512) == 108
    with pytest.raises(QuantkitError, match="unknown ggml type IQ9"):
        qtypes.stored("IQ9")
