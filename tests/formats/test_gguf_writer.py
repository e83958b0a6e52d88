"""Writing: what gguf-py reads back, splits, full disks and wrong input."""

import errno
import os
import threading
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from small_gguf import ID, METADATA, TENSORS, begin, data_of, fill, slices, write

from quantkit.errors import QuantkitError
from quantkit.formats import part_file
from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.gguf_values import F32, U16, I32List
from quantkit.formats.gguf_writer import GGUFWriter


def test_gguf_py_reads_it(tmp_path):
    (file,) = write(tmp_path / "deep" / "m.gguf", slices()[::-1])
    assert os.listdir(file.parent) == ["m.gguf"]
    reader = gguf.GGUFReader(file)
    for tensor, found in zip(TENSORS, reader.tensors, strict=True):
        assert found.name == tensor.name and found.tensor_type.name == tensor.qtype
        assert tuple(found.shape) == tensor.shape[::-1] and found.n_bytes == tensor.n_bytes
        assert np.array_equal(found.data.view(np.uint8).reshape(-1, tensor.row_bytes), data_of(tensor))
    types = gguf.GGUFValueType
    expected = {
        "u16": types.UINT16,
        "u32": types.UINT32,
        "plain": types.UINT32,
        "negative": types.INT32,
        "f32": types.FLOAT32,
        "float": types.FLOAT32,
        "yes": types.BOOL,
    }
    assert {key: reader.fields[key].types[0] for key in expected} == expected
    assert reader.fields["types"].types == [types.ARRAY, types.INT32] == reader.fields["numbers"].types
    assert reader.fields["tokens"].contents() == METADATA["tokens"]


def test_our_reader_reads_it(tmp_path):
    (path,) = write(tmp_path / "m.gguf")
    file = GGUFFile.open(path)
    plain = {key: getattr(value, "value", getattr(value, "values", value)) for key, value in METADATA.items()}
    assert file.metadata == {**plain, "f32": float(np.float32(1e-6))}
    assert list(file.tensors) == [tensor.name for tensor in TENSORS] and file.n_bytes == path.stat().st_size
    for tensor in TENSORS:
        assert file.tensors[tensor.name].shape == tensor.shape and file.tensors[tensor.name].qtype == tensor.qtype
        assert np.array_equal(file.data(tensor.name), data_of(tensor).reshape(*tensor.shape[:-1], -1))
    stack = TENSORS[2]
    assert np.array_equal(file.matrix(stack.name, 2), data_of(stack)[6:9])
    assert not file.data(stack.name).flags.owndata
    for name, index in [(stack.name, 4), (stack.name, -1), ("output.weight", 0)]:
        with pytest.raises(QuantkitError, match="no matrix"):
            file.matrix(name, index)
    with pytest.raises(QuantkitError, match="no tensor 'absent'"):
        file.data("absent")


def test_bytes_depend_on_nothing_but_the_plan(tmp_path):
    (one,) = write(tmp_path / "a" / "m.gguf")
    order = slices()
    np.random.default_rng(0).shuffle(order)
    with begin(tmp_path / "b" / "m.gguf") as out:
        threads = [threading.Thread(target=fill, args=(out, order[i::4])) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert one.read_bytes() == out.files[0].read_bytes()


@pytest.mark.parametrize("limit", [1, 2000, 2900, 3500, 5000])
def test_splits(tmp_path, limit):
    files = write(tmp_path / "m.gguf", split_max_bytes=limit)
    count = len(files)
    assert [file.name for file in files] == [f"m-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert sorted(os.listdir(tmp_path)) == [file.name for file in files]
    types = gguf.GGUFValueType
    for number, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        assert file.stat().st_size <= limit or len(reader.tensors) == 1
        keys = {key: field for key, field in reader.fields.items() if key.startswith("split.")}
        assert {key: (field.types[0], field.contents()) for key, field in keys.items()} == {
            "split.no": (types.UINT16, number),
            "split.count": (types.UINT16, count),
            "split.tensors.count": (types.INT32, len(TENSORS)),
        }
        assert ("general.architecture" in reader.fields) == (number == 0)
    for file in files:  # any of them opens all
        merged = GGUFFile.open(file)
        assert merged.files == files and merged.metadata["plain"] == 9
        for tensor in TENSORS:
            assert np.array_equal(merged.data(tensor.name).reshape(-1, tensor.row_bytes), data_of(tensor))


def test_no_split_when_everything_fits(tmp_path):
    (whole,) = write(tmp_path / "m.gguf")
    size = whole.stat().st_size
    assert [f.name for f in write(tmp_path / "n.gguf", split_max_bytes=size)] == ["n.gguf"]
    assert len(write(tmp_path / "o.gguf", split_max_bytes=size - 1)) == 2


# Disks and wrong input.


def test_full_disk_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(part_file, "_reserve", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left")))
    with pytest.raises(QuantkitError, match=rf"{tmp_path}: no room for m-00001.*[\d,]+ bytes"):
        begin(tmp_path / "m.gguf", split_max_bytes=2900)
    assert not os.listdir(tmp_path)
    huge = PlainTensor("huge.weight", (1 << 40, 1 << 10), "F32")
    with pytest.raises(QuantkitError, match=rf"{tmp_path}: 4,503,599,627,[\d,]+ bytes are needed, [\d,]+ are free"):
        GGUFWriter.open(tmp_path / "m.gguf", [huge], METADATA, fingerprint=ID)
    assert not os.listdir(tmp_path)


def test_full_disk_in_the_middle_can_be_resumed(tmp_path, monkeypatch):
    real, calls = os.pwrite, []

    def full(fd: int, data: bytes, offset: int) -> int:
        calls.append(offset)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left")
        return real(fd, data[: max(1, len(data) // 2)], offset)  # short writes are written on

    with monkeypatch.context() as patch, pytest.raises(QuantkitError, match="no room for"):
        patch.setattr(part_file.os, "pwrite", full)
        write(tmp_path / "m.gguf")
    assert write(tmp_path / "m.gguf")


def test_reserving_is_optional(tmp_path, monkeypatch):
    def unsupported(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    expected = write(tmp_path / "a.gguf")[0].read_bytes()
    monkeypatch.setattr(part_file.os, "posix_fallocate", unsupported)
    assert write(tmp_path / "b.gguf")[0].read_bytes() == expected


@pytest.mark.parametrize(
    ("name", "row", "data", "words"),
    [
        ("absent", 0, np.zeros((1, 144), np.uint8), "no tensor 'absent'"),
        ("token_embd.weight", 0, np.zeros((1, 144), np.int8), "uint8"),
        ("token_embd.weight", 0, np.zeros((1, 143), np.uint8), "a row is 144 bytes"),
        ("token_embd.weight", 6, np.zeros((1, 144), np.uint8), "of 6"),
        ("token_embd.weight", -1, np.zeros((1, 144), np.uint8), "of 6"),
    ],
)
def test_wrong_slice(tmp_path, name, row, data, words):
    with pytest.raises(QuantkitError, match=words), begin(tmp_path / "m.gguf") as out:
        out.write(name, row, data)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"k": []}, "'k' is an empty array"),
        ({"k": I32List([])}, "'k' is an empty array"),
        ({"k": [1, "a"]}, "'k' is an array of several types"),
        ({"k": None}, "'k': NoneType"),
        ({"k": U16(65536)}, "'k': 65536 does not fit UINT16"),
        ({"k": 1 << 32}, "'k'"),
        ({"k": F32(1e300)}, "'k'"),
        ({"k": [1 << 31]}, "'k'"),
    ],
)
def test_wrong_metadata(tmp_path, metadata, words):
    with pytest.raises(QuantkitError, match=words):
        GGUFWriter.open(tmp_path / "m.gguf", TENSORS, metadata, fingerprint=ID)
    assert not os.listdir(tmp_path)


@dataclass(frozen=True)
class Lying(PlainTensor):
    n_bytes: int = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    "tensors",
    [
        [TENSORS[0], TENSORS[0]],
        [PlainTensor("x" * 64, (1, 256), "F32")],
        [PlainTensor("", (1, 256), "F32")],
        [PlainTensor("x", (0, 256), "F32")],
        [PlainTensor("x", (1, 1, 1, 1, 256), "F32")],
        [PlainTensor("x", (2, 100), "Q4_K")],
        [Lying("x", (2, 256), "Q4_K")],
    ],
)
def test_wrong_plan(tmp_path, tensors):
    with pytest.raises(QuantkitError, match="tensor"):
        GGUFWriter.open(tmp_path / "m.gguf", tensors, METADATA, fingerprint=ID)


def test_wrong_name_and_split_size(tmp_path):
    with pytest.raises(QuantkitError, match=r"must end in \.gguf"):
        begin(tmp_path / "m.bin")
    with pytest.raises(QuantkitError, match="not positive"):
        begin(tmp_path / "m.gguf", split_max_bytes=0)
    (tmp_path / "file").touch()
    with pytest.raises(QuantkitError, match="cannot make this folder"):
        begin(tmp_path / "file" / "m.gguf")
