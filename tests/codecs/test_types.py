"""Sizes and names."""

from math import prod

import gguf
import pytest

from quantkit.codecs import types as qtypes
from quantkit.codecs.foreign import FOREIGN
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


@pytest.mark.parametrize(
    ("name", "shape", "mib"),
    [("IQ1_S_R4", (384, 2048, 7168), 1009.50), ("IQ3_KT", (18432, 7168), 49.29), ("Q8_0_R8", (576, 7168), 4.18)],
)
def test_types_of_others_have_the_sizes_that_their_quantizer_prints(name, shape, mib):
    """Of tensors of R1 and Kimi-K2 in published logs of ik_llama.cpp's llama-quantize."""
    assert prod(shape[:-1]) * qtypes.stored(name).row_bytes(shape[-1]) / (1 << 20) == pytest.approx(mib, abs=0.005)


def test_no_type_of_others_has_a_name_or_number_of_ours():
    known = gguf.GGMLQuantizationType
    foreign = {name: one.number for name, one in FOREIGN.items() if name not in known.__members__}
    assert not set(foreign.values()) & set(map(int, known)) and len(set(foreign.values())) == len(foreign)
