"""The bundled description of R1 against the totals of the released files, and malformed descriptions."""

from math import prod
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry, expand
from quantkit.formats.model_folder import open_source

R1 = Path(__file__).parents[2] / "models" / "deepseek-r1"


@pytest.fixture(scope="module")
def r1() -> Checkpoint | Geometry:
    return open_source(R1)


def test_r1_has_the_released_totals(r1):
    assert isinstance(r1, Geometry)
    assert len(r1.tensors) == 91_991
    assert sum(prod(entry.shape) for entry in r1.tensors.values()) == 684_531_386_000
    assert sum(entry.n_bytes for entry in r1.tensors.values()) == 688_574_839_360
    assert r1.config["hidden_size"] == 7168


def test_r1_scales_fit_their_weights(r1):
    r1.require("model.layers.5.self_attn.kv_a_proj_with_mqa.weight", (576, 7168))
    r1.validate({name: entry.shape for name, entry in r1.tensors.items()})
    assert r1.tensors["model.layers.61.mlp.experts.255.down_proj.weight_scale_inv"].shape == (56, 16)
    with pytest.raises(QuantkitError, match=r"no tensor 'model\.layers\.62"):
        r1.require("model.layers.62.mlp.gate.weight", (256, 7168))


def test_reading_is_refused(r1):
    for read in (r1.read, r1.read_raw):
        with pytest.raises(QuantkitError, match="no weights: a description only"):
            read("model.norm.weight", 0, 1)


def test_expand():
    assert list(expand("a", "")) == ["a"]
    assert list(expand("l.{9..10}.{gate,up}.w", "")) == ["l.9.gate.w", "l.9.up.w", "l.10.gate.w", "l.10.up.w"]


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ("[]", "not a JSON object"),
        ("{", "JSON"),
        ('{"a": 1}', "'a'"),
        ('{"a": {"shape": [1], "dtype": "F9"}}', "dtype"),
        ('{"a": {"shape": [-1], "dtype": "F32"}}', "shape"),
        ('{"a{x}": {"shape": [1], "dtype": "F32"}}', "{x}"),
        ('{"a{0..9999999}": {"shape": [1], "dtype": "F32"}}', "more than"),
        ('{"a{0..999}{0..9999}{0..9999}": {"shape": [1], "dtype": "F32"}}', "more than"),
        ('{"a{1..2}": {"shape": [1], "dtype": "F32"}, "a2": {"shape": [1], "dtype": "F32"}}', "'a2'"),
    ],
)
def test_malformed_description(tmp_path, tensors, words):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tensors.json").write_text(tensors)
    with pytest.raises(QuantkitError, match=r"tensors\.json") as caught:
        open_source(tmp_path)
    assert words in str(caught.value)
