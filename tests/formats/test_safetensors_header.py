"""Headers that lie: every kind has its message, and none costs memory."""

import json

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors_header import MAX_HEADER_BYTES, header_length, parse_header

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "empty": {"dtype": "F8_E4M3", "shape": [0, 5], "data_offsets": [24, 24]},
}


def parse(header: object, data_bytes: int = 26):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return parse_header(text, 8 + len(text) + data_bytes, "shard", "folder/shard")


def test_good_header():
    entries = parse({**GOOD, "__metadata__": {"format": "pt"}})
    assert set(entries) == set(GOOD)
    assert entries["a"].shape == (2, 3) and entries["a"].n_bytes == 24 and entries["a"].row_bytes == 12
    assert entries["b"].begin == entries["a"].end and entries["b"].file == "shard"


def test_trailing_spaces_are_allowed():
    assert set(parse(json.dumps(GOOD).encode() + b"   ")) == set(GOOD)


def changed(**values: object) -> dict:
    return {**GOOD, "a": {**GOOD["a"], **values}}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\xff\xfe", "JSON"),
        (b"[" * 200_000, "JSON"),
        ([], "not a JSON object"),
        (b'{"a": 1, "a": 2}', "'a' appears twice"),
        ({"a": 3}, "'a'"),
        (changed(dtype="F7"), "unknown dtype 'F7'"),
        (changed(dtype=["F32"]), "unknown dtype"),
        (changed(shape=[-2, -3]), "bad shape"),
        (changed(shape=[2.0, 3]), "bad shape"),
        (changed(shape=[True, 6]), "bad shape"),
        (changed(shape=[1] * 9), "bad shape"),
        (changed(shape=[1 << 60, 1 << 60]), "bad shape"),
        (changed(shape="23"), "bad shape"),
        (changed(shape=[2, 4]), "needs 32 bytes"),
        (changed(data_offsets=[0]), "data_offsets"),
        (changed(data_offsets=[24, 0]), "needs 24 bytes"),
        (changed(data_offsets=[-24, 0]), "data_offsets"),
        (changed(data_offsets=[4, 28]), "gap"),
        ({**GOOD, "c": {"dtype": "U8", "shape": [2], "data_offsets": [20, 22]}}, "overlaps"),
    ],
)
def test_bad_header(header, words):
    with pytest.raises(QuantkitError, match="folder/shard") as caught:
        parse(header)
    assert words in str(caught.value)


def test_file_size_must_fit():
    with pytest.raises(QuantkitError, match="truncated: tensor 'b'"):
        parse(GOOD, 25)
    with pytest.raises(QuantkitError, match="3 bytes after the last tensor"):
        parse(GOOD, 29)


def test_header_length():
    assert header_length((90).to_bytes(8, "little"), 98, "f") == 90
    for prefix, size in [
        (b"abc", 3),
        ((91).to_bytes(8, "little"), 98),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little"), 1 << 40),
    ]:
        with pytest.raises(QuantkitError, match="f: "):
            header_length(prefix, size, "f")
