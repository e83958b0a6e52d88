"""Hostile GGUF files: one error each; and a full vocabulary in well under a second."""

import os
import random
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from patience import within

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.gguf import open_gguf, open_source

U32, U64, STR, ARR = 4, 10, 8, 9


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def info(name: str = "a", ne: tuple[int, ...] = (32, 2), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


def file(keys=(), infos=(), data=256, magic=b"GGUF", version=3, n_tensors=None, n_keys=None) -> bytes:
    counts = struct.pack("<IQQ", version, len(infos) if n_tensors is None else n_tensors, n_keys or len(keys))
    header = magic + counts + b"".join(keys) + b"".join(infos)
    return header + bytes(-len(header) % 32) + bytes(range(256)) * (data // 256) + bytes(data % 256)


GOOD = file([key("k", U32, struct.pack("<I", 5)), key("s", STR, text("x"))], [info()])


@pytest.fixture
def save(tmp_path):
    def save(data: bytes, name: str = "m.gguf"):
        (tmp_path / name).write_bytes(data)
        return tmp_path / name

    return save


def test_good_file(save):
    found = GGUFFile.open(save(GOOD))
    assert found.metadata == {"k": 5, "s": "x"}
    assert found.tensors["a"].shape == (2, 32) and found.tensors["a"].qtype == "F32"
    assert found.data("a").shape == (2, 128) and found.data("a")[1, 0] == 128


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"GGUF", "not a GGUF file"),
        (file(magic=b"GGML"), "not a GGUF file"),
        (file(version=1), "version 1"),
        (file(version=0x03000000), "big-endian"),
        (file(n_tensors=1 << 63), "claims"),
        (file(n_keys=1 << 63), "claims"),
        (file(n_keys=60_000, data=100), "m.gguf"),
        (file(n_tensors=1_000_000, data=100), "m.gguf"),
        (file([key("k", U32, b"")], data=0)[:-30], "m.gguf"),
        (file([text(b"\xff\xfe") + struct.pack("<II", U32, 1)]), "UTF-8"),
        (file([key("k", 77, b"")]), "unknown type 77"),
        (file([key("k", U32, bytes(4)), key("k", U32, bytes(4))]), "'k' appears twice"),
        (file([key("k", STR, struct.pack("<Q", 1 << 62))]), "string of"),
        (file([key("k", STR, struct.pack("<Q", 1 << 20))]), "truncated"),
        (file([key("k", ARR, struct.pack("<IQ", U32, 1 << 62))]), "claims"),
        (file([key("k", ARR, struct.pack("<IQ", U32, 1 << 23))]), "truncated"),
        (file([key("k", ARR, struct.pack("<IQ", STR, 1 << 23))]), "truncated"),
        (file([key("k", ARR, struct.pack("<IQQ", STR, 2, 1 << 61))]), "truncated"),
        (file([key("k", ARR, struct.pack("<IQ", ARR, 1))]), "array of arrays"),
        (file([key("k", ARR, struct.pack("<IQ", 99, 1))]), "unknown type 99"),
        (file([key("general.alignment", U32, struct.pack("<I", 24))]), "alignment"),
        (file([key("general.alignment", U32, struct.pack("<I", 0))]), "alignment"),
        (file([key("general.alignment", STR, text("32"))]), "alignment"),
        (file([], [info(), info(offset=256)]), "'a' appears twice"),
        (file([], [info(), info("b", offset=128)]), "overlaps"),
        (file([], [info(offset=4)]), "not a multiple of 32"),
        (file([], [info(offset=256)]), "truncated: tensor 'a'"),
        (file([], [info(offset=1 << 62)]), "truncated: tensor 'a'"),
        (file([], [info()], data=255), "truncated: tensor 'a'"),
        (file([], [info(kind=4)]), "unknown type 4"),
        (file([], [info(kind=4_000_000_000)]), "unknown type"),
        (file([], [info(ne=(32, 1 << 60, 1 << 60, 1 << 60))]), "impossible"),
        (file([], [info(ne=(32, 0))]), "impossible"),
        (file([], [info(ne=())]), "0 dimensions"),
        (file([], [info(ne=(1,) * 5)]), "5 dimensions"),
        (file([], [info(ne=(48, 2), kind=2)]), "whole Q4_0 blocks"),
    ],
)
def test_hostile_file(save, data, words):
    with within(2), pytest.raises(QuantkitError, match=r"m\.gguf") as caught:
        GGUFFile.open(save(data))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_every_truncation_is_noticed(save):
    for length in range(len(GOOD)):
        with pytest.raises(QuantkitError):
            GGUFFile.open(save(GOOD[:length]))


def test_random_damage_never_crashes(save):
    chance = random.Random(0)
    for _ in range(600):
        data = bytearray(GOOD)
        for _ in range(chance.randint(1, 4)):
            data[chance.randrange(len(GOOD) - 256)] = chance.choice((0, 1, 127, 255, chance.randrange(256)))
        try:
            found = GGUFFile.open(save(bytes(data)))
        except QuantkitError:
            continue
        for name in found.tensors:
            found.data(name)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(QuantkitError, match="no such file"):
        GGUFFile.open(tmp_path / "absent.gguf")
    with pytest.raises(QuantkitError, match="not a regular file"):
        GGUFFile.open(tmp_path)


def split(number: int, count: int, tensors: int, *infos: bytes) -> bytes:
    keys = [
        key("split.no", 2, struct.pack("<H", number)),
        key("split.count", 2, struct.pack("<H", count)),
        key("split.tensors.count", 5, struct.pack("<i", tensors)),
    ]
    return file(keys, infos)


def test_splits_must_be_complete_and_right(save, tmp_path):
    one = save(split(0, 2, 2, info("a")), "m-00001-of-00002.gguf")
    with pytest.raises(QuantkitError, match=r"1 of 2 splits are missing, first m-00002-of-00002\.gguf"):
        GGUFFile.open(one)
    two = save(split(1, 2, 2, info("b")), "m-00002-of-00002.gguf")
    assert list(GGUFFile.open(two).tensors) == ["a", "b"] and GGUFFile.open(two).files == [one, two]
    for wrong, words in [
        (split(0, 2, 2, info("b")), "the name says"),
        (split(1, 2, 2, info("a")), "'a' is also in"),
        (split(1, 2, 2), "split.tensors.count is 2"),
        (file([], [info("b")]), "m-00002"),
        (b"GGUF", "m-00002"),
    ]:
        save(wrong, "m-00002-of-00002.gguf")
        with pytest.raises(QuantkitError, match=r"m-0000") as caught:
            GGUFFile.open(one)
        assert words in str(caught.value)


def test_renamed_split(save):
    with pytest.raises(QuantkitError, match="renamed"):
        GGUFFile.open(save(split(0, 2, 2, info())))
    with pytest.raises(QuantkitError, match="file name says otherwise"):
        GGUFFile.open(save(file([], [info()]), "m-00001-of-00002.gguf"))


def test_whole_vocabulary_is_quick_and_gguf_py_agrees(tmp_path):
    tokens = [f"tok{i}é" for i in range(129_280)]
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "deepseek2")
    writer.add_array("tokenizer.ggml.tokens", tokens)
    writer.add_array("tokenizer.ggml.token_type", [1] * len(tokens))
    writer.add_float64("f64", 0.1)
    writer.add_bool("no", False)
    writer.add_int8("i8", -3)
    writer.add_tensor("t.weight", np.arange(64, dtype=np.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with within(1):
        found = GGUFFile.open(tmp_path / "v.gguf")
    assert found.metadata["tokenizer.ggml.tokens"] == tokens
    assert found.metadata["tokenizer.ggml.token_type"] == [1] * len(tokens)
    assert (found.metadata["f64"], found.metadata["no"], found.metadata["i8"]) == (0.1, False, -3)
    assert found.data("t.weight").view("<f4").tolist() == np.arange(64).reshape(2, 32).tolist()


def test_a_file_cut_short_under_its_reader_is_refused_before_the_next_step(made, tmp_path):
    """Touching a page that is gone would end the process with SIGBUS."""
    path = Path(shutil.copy(next(made.glob("tiny-r1-*.gguf")), tmp_path))
    weights = open_gguf(path, "cpu")
    engine, source = open_engine(weights, 1, 64), open_source(path, "cpu")
    engine.prefill(0, [0, 5, 6], 0)
    os.truncate(path, path.stat().st_size // 2)
    says = "was cut short while it was in use"
    for read in (
        lambda: engine.decode([0], [7]),
        lambda: engine.prefill(0, [0, 5, 6], 0),
        lambda: source.layer(1),
        source.head,
    ):
        with pytest.raises(QuantkitError, match=says):
            read()
