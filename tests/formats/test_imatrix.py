"""imatrix files: round trip, llama-imatrix's own layout, and everything llama-quantize would choke on."""

import os
import struct

import gguf
import numpy as np
import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.imatrix import ImatrixInfo, fit, load_imatrix, save_imatrix
from quantkit.tensors import Importance

EXPERTS, DENSE, HEADS = "blk.3.ffn_down_exps.weight", "blk.0.attn_q_a.weight", "blk.0.attn_k_b.weight"
HOW = {"datasets": ["calibration"], "chunk_count": 7, "chunk_size": 512}


def importance(n_matrices: int, n_in: int, n_counts: int | None = None) -> Importance:
    rng = np.random.default_rng(n_in)
    counts = rng.integers(0, 9, n_counts or n_matrices).astype(np.float32)
    return Importance(rng.random((n_matrices, n_in), np.float32), counts)


IMATRIX = {EXPERTS: importance(4, 256), DENSE: importance(1, 512), HEADS: importance(8, 128, 1)}


def test_round_trip(tmp_path):
    save_imatrix(tmp_path / "deep" / "i.gguf", IMATRIX, **HOW)
    assert os.listdir(tmp_path / "deep") == ["i.gguf"]
    found, info = load_imatrix(tmp_path / "deep" / "i.gguf")
    assert info == ImatrixInfo(**HOW)
    assert list(found) == sorted(IMATRIX)
    for name, expected in IMATRIX.items():
        assert np.array_equal(found[name].in_sum2, expected.in_sum2)
        assert np.array_equal(found[name].counts, expected.counts)


def test_layout_is_llama_imatrix_s(tmp_path):
    """Types, shapes (ggml drops outer ones) and keys as IMatrixCollector::save_imatrix writes them."""
    save_imatrix(tmp_path / "i.gguf", IMATRIX, **HOW)
    reader = gguf.GGUFReader(tmp_path / "i.gguf")
    assert [(t.name, t.shape.tolist()) for t in reader.tensors] == [
        (HEADS + ".in_sum2", [128, 8]),
        (HEADS + ".counts", [1]),
        (DENSE + ".in_sum2", [512]),
        (DENSE + ".counts", [1]),
        (EXPERTS + ".in_sum2", [256, 4]),
        (EXPERTS + ".counts", [1, 4]),
    ]
    assert all(tensor.tensor_type == gguf.GGMLQuantizationType.F32 for tensor in reader.tensors)
    keys = {key: field.types for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    u32, string = [gguf.GGUFValueType.UINT32], [gguf.GGUFValueType.STRING]
    assert keys == {
        "general.type": string,
        "imatrix.datasets": [gguf.GGUFValueType.ARRAY, *string],
        "imatrix.chunk_count": u32,
        "imatrix.chunk_size": u32,
    }


def test_heads_flattened_by_llama_imatrix_get_their_shape_back():
    flat = Importance(IMATRIX[HEADS].in_sum2.reshape(1, -1), IMATRIX[HEADS].counts)
    assert np.array_equal(fit(flat, 8, 128, HEADS).in_sum2, IMATRIX[HEADS].in_sum2)
    assert fit(IMATRIX[EXPERTS], 4, 256, EXPERTS).counts.shape == (4,)
    with pytest.raises(QuantkitError, match=r"attn_k_b.*another model"):
        fit(flat, 9, 128, HEADS)
    with pytest.raises(QuantkitError, match="another model"):
        fit(IMATRIX[EXPERTS], 2, 512, EXPERTS)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
@pytest.mark.parametrize("field", ["in_sum2", "counts"])
def test_values_that_cannot_be(tmp_path, field, value):
    good = importance(4, 256)
    broken = {"in_sum2": good.in_sum2.copy(), "counts": good.counts.copy()}
    broken[field].flat[2] = value
    with pytest.raises(QuantkitError, match=f"{DENSE}.*negative or not finite"):
        save_imatrix(tmp_path / "i.gguf", {DENSE: Importance(**broken)}, **HOW)
    assert not os.listdir(tmp_path)
    save_imatrix(tmp_path / "i.gguf", {DENSE: good}, **HOW)
    data = (tmp_path / "i.gguf").read_bytes()
    old = good.in_sum2 if field == "in_sum2" else good.counts
    assert data.count(old.tobytes()) == 1
    (tmp_path / "i.gguf").write_bytes(data.replace(old.tobytes(), broken[field].tobytes()))
    with pytest.raises(QuantkitError, match=f"{DENSE}.*negative or not finite"):
        load_imatrix(tmp_path / "i.gguf")


def test_wrong_shapes_and_nothing_to_save(tmp_path):
    sums = np.ones((4, 8), np.float32)
    for counts in (np.ones(3, np.float32), np.ones((4, 1), np.float32)):
        with pytest.raises(QuantkitError, match="do not fit"):
            save_imatrix(tmp_path / "i.gguf", {DENSE: Importance(sums, counts)}, **HOW)
    for imatrix, datasets in [({}, ["x"]), (IMATRIX, [])]:
        with pytest.raises(QuantkitError, match="needs at least"):
            save_imatrix(tmp_path / "i.gguf", imatrix, datasets=datasets, chunk_count=1, chunk_size=1)


def written(path, arrays: dict[str, np.ndarray], **keys: object):
    writer = gguf.GGUFWriter(path, "x")
    for name, value in keys.items():
        name = name.replace("__", ".")
        (
            writer.add_array
            if isinstance(value, list)
            else writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
        )(name, value)
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ARRAYS = {"a.in_sum2": np.ones((1, 4), np.float32), "a.counts": np.ones(1, np.float32)}
KEYS = {"general__type": "imatrix", "imatrix__datasets": ["d"], "imatrix__chunk_count": 1, "imatrix__chunk_size": 2}


@pytest.mark.parametrize(
    ("arrays", "drop", "words"),
    [
        (ARRAYS, "general__type", "not an imatrix"),
        (ARRAYS, "imatrix__datasets", "is missing"),
        (ARRAYS, "imatrix__chunk_count", "is missing"),
        (ARRAYS, "imatrix__chunk_size", "is missing"),
        ({"a.in_sum2": ARRAYS["a.in_sum2"]}, None, r"a\.counts is missing"),
        ({"a.counts": ARRAYS["a.counts"]}, None, r"'a\.counts' has no"),
        ({**ARRAYS, "stray": ARRAYS["a.counts"]}, None, "'stray' has no"),
        ({}, None, "no entries"),
        ({**ARRAYS, "a.in_sum2": np.ones((1, 4), np.float16)}, None, "not F32"),
        ({**ARRAYS, "a.counts": np.ones(3, np.float32)}, None, "do not fit"),
    ],
)
def test_files_that_llama_quantize_would_refuse(tmp_path, arrays, drop, words):
    path = written(tmp_path / "i.gguf", arrays, **{key: value for key, value in KEYS.items() if key != drop})
    with pytest.raises(QuantkitError, match=rf"i\.gguf.*{words}"):
        load_imatrix(path)


def test_legacy_and_missing_files(tmp_path):
    (tmp_path / "old.dat").write_bytes(struct.pack("<ii", 1, 3) + b"abc")
    with pytest.raises(QuantkitError, match=r"old\.dat.*--in-file"):
        load_imatrix(tmp_path / "old.dat")
    with pytest.raises(QuantkitError, match="no such file"):
        load_imatrix(tmp_path / "absent.gguf")


def test_saving_over_a_loaded_file(tmp_path):
    save_imatrix(tmp_path / "i.gguf", IMATRIX, **HOW)
    found, _ = load_imatrix(tmp_path / "i.gguf")
    before = (tmp_path / "i.gguf").read_bytes()
    save_imatrix(tmp_path / "i.gguf", found, **HOW)
    assert (tmp_path / "i.gguf").read_bytes() == before and os.listdir(tmp_path) == ["i.gguf"]
