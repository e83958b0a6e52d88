"""A few thousand cases of scripts/torture/fuzz.py, and the ways out of a folder that it cannot make by chance."""

import json
import os
import shutil

import fuzz
import pytest

from quantkit.errors import MAX_MESSAGE, QuantkitError
from quantkit.formats.checkpoint import INDEX, Checkpoint


def test_mutated_input_is_refused_or_read(tmp_path):
    counts, findings, _ = fuzz.fuzz(tmp_path, 2000, seed=5, seconds=10, memory=2 << 30)
    assert not findings, list(findings)
    assert len(counts) == 19
    for name, tally in counts.items():
        assert tally["refused"] and tally["accepted"], name  # both sides of the parser are reached


def test_the_fuzzer_sees_what_goes_wrong():
    def parse(data: bytes) -> None:
        json.loads(data)["a"]

    target = fuzz.Target("t", b'{"a": 1}', parse)
    assert fuzz.attempt(target, b'{"a": 1}', 5) == ("accepted", "")
    assert fuzz.attempt(target, b"{}", 5)[0] == "finding"
    slow = fuzz.Target("t", b"", lambda data: [None for _ in iter(int, 1)])
    old = fuzz.signal.signal(fuzz.signal.SIGALRM, fuzz._alarm)
    try:
        assert fuzz.attempt(slow, b"", 0.2)[1].startswith("TooSlow")
    finally:
        fuzz.signal.signal(fuzz.signal.SIGALRM, old)


@pytest.mark.parametrize(
    "shard", ["../a.safetensors", "/etc/passwd", "..", "x/../../a.safetensors", "a\\b", "a\0b", ""]
)
def test_an_index_cannot_reach_outside(model_copy, shard):
    index = json.loads((model_copy / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    shutil.copy(model_copy / index["weight_map"][name], model_copy.parent / "a.safetensors")
    index["weight_map"][name] = shard
    (model_copy / INDEX).write_text(json.dumps(index))
    with pytest.raises(QuantkitError, match="not a plain file name"):
        Checkpoint.open(model_copy)


@pytest.mark.parametrize("kind", ["dangling", "loop", "folder", "fifo", "device"])
def test_a_shard_that_is_no_file(model_copy, kind):
    """Links to files are taken (the Hugging Face cache is made of them); nothing else hangs or is read."""
    shard = sorted(model_copy.glob("*.safetensors"))[0]
    shard.rename(model_copy.parent / "blob")
    make = {
        "dangling": lambda: shard.symlink_to("nothing"),
        "loop": lambda: shard.symlink_to(shard.name),
        "folder": shard.mkdir,
        "fifo": lambda: os.mkfifo(shard),
        "device": lambda: shard.symlink_to("/dev/zero"),
    }
    make[kind]()
    with pytest.raises(QuantkitError, match=shard.name):
        Checkpoint.open(model_copy)
    shard.rmdir() if kind == "folder" else shard.unlink()
    shard.symlink_to(model_copy.parent / "blob")
    Checkpoint.open(model_copy).close()


def test_a_message_is_one_line_without_control_characters():
    text = str(QuantkitError("a\nb\x1b[31m" + "x" * 10_000))
    assert text.isprintable() and text.startswith("a b\\x1b[31m") and len(text) < MAX_MESSAGE + 50
    assert str(QuantkitError("模型: ok")) == "模型: ok"
