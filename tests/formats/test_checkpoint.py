"""Reading: dequantised weights against a plain reference, and one clear error per way a checkpoint can be broken."""

import json
import re
import shutil
import threading
from pathlib import Path

import pytest
import torch
from small_checkpoint import fp8, shards, write_checkpoint, write_index, write_shard

from quantkit.errors import QuantkitError
from quantkit.formats import byte_source
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.model_folder import open_source

FIRST, SECOND = shards()
INDEX = "model.safetensors.index.json"
FP8_NAMES = ("kv_a.weight", "expert.weight", "e8m0.weight", "brain.weight")


def reference(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition, element by element."""
    rows, columns = (torch.arange(n) // 128 for n in weight.shape)
    return weight.float() * scale.float()[rows][:, columns]


def fails(folder: Path, *words: str) -> None:
    with pytest.raises(QuantkitError) as caught:
        Checkpoint.open(folder)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("name", FP8_NAMES)
def test_dequantised_equals_the_definition(folder, stored, name):
    with Checkpoint.open(folder) as checkpoint:
        expected = reference(stored[name], stored[name + "_scale_inv"])
        assert torch.equal(checkpoint.read(name), expected)
        rows = len(expected)
        for start, stop in [(0, 128), (128, rows), (100, 120), (100, 199), (127, 129), (rows - 1, rows), (50, 50)]:
            start, stop = min(start, rows), min(stop, rows)
            assert torch.equal(checkpoint.read(name, start, stop), expected[start:stop])
        assert checkpoint.read(name, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_other_block_sizes_come_from_the_config(folder, stored):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["weight_block_size"] = [64, 32]
    (folder / "config.json").write_text(json.dumps(config))
    weight, scale = torch.randn(100, 48).to(torch.float8_e4m3fn), torch.rand(2, 2)
    write_shard(folder / FIRST, {"x.weight": weight, "x.weight_scale_inv": scale})
    write_index(folder, {"x.weight": FIRST, "x.weight_scale_inv": FIRST})
    expected = weight.float() * scale.repeat_interleave(64, 0)[:100].repeat_interleave(32, 1)[:, :48]
    assert torch.equal(Checkpoint.open(folder).read("x.weight", 30, 90), expected[30:90])


@pytest.mark.parametrize("stated", [None, [128, 128]])
def test_the_block_is_that_of_the_scales(folder, stated, capsys):
    """Whatever config.json says: 32 x 32 here, and ragged; the norm beside it has no scale."""
    quantization = {"weight_block_size": stated} if stated else {}
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    weight, scale = torch.randn(100, 72).to(torch.float8_e4m3fn), torch.rand(4, 3)
    write_shard(folder / FIRST, {"x.weight": weight, "x.weight_scale_inv": scale, "n.weight": torch.ones(3)})
    write_index(folder, dict.fromkeys(("x.weight", "x.weight_scale_inv", "n.weight"), FIRST))
    expected = weight.float() * scale.repeat_interleave(32, 0)[:100].repeat_interleave(32, 1)[:, :72]
    assert torch.equal(Checkpoint.open(folder).read("x.weight", 30, 90), expected[30:90])
    assert ("scales are of blocks of [32, 32]" in capsys.readouterr().err) == (stated is not None)


def test_plain_floats_pass_through(folder, stored):
    checkpoint = Checkpoint.open(folder)
    for name in ("embed.weight", "norm.weight", "half.weight"):
        assert torch.equal(checkpoint.read(name), stored[name].float())
        assert torch.equal(checkpoint.read(name, 1, 3), stored[name][1:3].float())
        raw, scale = checkpoint.read_raw(name)
        assert scale is None and torch.equal(raw, stored[name])


def test_read_raw_gives_the_scale_rows_of_the_slice(folder, stored):
    raw, scale = Checkpoint.open(folder).read_raw("kv_a.weight", 200, 300)
    assert raw.dtype == torch.float8_e4m3fn and torch.equal(raw.float(), stored["kv_a.weight"][200:300].float())
    assert torch.equal(scale, stored["kv_a.weight_scale_inv"][1:3])


def test_many_threads_read_the_same(folder, stored):
    checkpoint, wrong = Checkpoint.open(folder), []

    def read() -> None:
        for name in FP8_NAMES * 5:
            if not torch.equal(checkpoint.read(name), reference(stored[name], stored[name + "_scale_inv"])):
                wrong.append(name)
        checkpoint.close()  # others open the files again

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_single_file_and_shards_without_index(folder, tmp_path, stored):
    (folder / INDEX).unlink()
    assert set(Checkpoint.open(folder).tensors) == set(stored)
    single = tmp_path / "single"
    single.mkdir()
    shutil.copy(folder / "config.json", single)
    write_shard(single / "model.safetensors", stored)
    checkpoint = open_source(single)
    assert isinstance(checkpoint, Checkpoint)
    assert {name: entry.n_bytes for name, entry in checkpoint.tensors.items()} == {
        name: tensor.nbytes for name, tensor in stored.items()
    }


def test_fingerprint_sees_headers_and_config_only(folder):
    before = Checkpoint.open(folder).fingerprint()
    assert before == Checkpoint.open(folder).fingerprint() and re.fullmatch("[0-9a-f]{64}", before)
    (folder / "config.json").write_text("{}")
    assert Checkpoint.open(folder).fingerprint() != before


def test_require_and_validate(folder):
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.require("kv_a.weight", (576, 320)).dtype == "F8_E4M3"
    with pytest.raises(QuantkitError, match=r"'kv_a.weight' has shape \[576, 320\]"):
        checkpoint.require("kv_a.weight", (320, 576))
    with pytest.raises(QuantkitError, match="no tensor 'absent'"):
        checkpoint.require("absent", (1,))
    checkpoint.validate({"norm.weight": (32,), "embed.weight": (64, 32)})
    with pytest.raises(QuantkitError, match=r"'a0'.*'a4'; and 3 more"):
        checkpoint.validate({f"a{i}": (1,) for i in range(8)})


# Ways to be broken.


def test_missing_folder_config_and_shards(folder, tmp_path):
    fails(tmp_path / "nowhere", "nowhere")
    (folder / FIRST).unlink()
    fails(folder, FIRST, "kv_a.weight", "no such file")
    (folder / SECOND).unlink()
    fails(folder, "2 of 2 shards")
    (folder / INDEX).unlink()
    fails(folder, "no *.safetensors")
    (folder / "config.json").unlink()
    fails(folder, "config.json", "no such file")


def test_config_that_is_no_config(folder):
    (folder / "config.json").write_text("[1]")
    fails(folder, "config.json", "not a JSON object")
    (folder / "config.json").write_text('{"quantization_config": {"weight_block_size": [128, 0]}}')
    fails(folder, "weight_block_size")
    (folder / "config.json").write_text("{" * 100_000)
    fails(folder, "config.json", "JSON")


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_shard_is_found_at_open(folder, kept):
    data = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(data[:kept])
    fails(folder, SECOND, "truncated")


def test_truncation_names_the_tensor(folder):
    with open(folder / SECOND, "r+b") as file:
        file.truncate((folder / SECOND).stat().st_size - 1)
    fails(folder, SECOND, "'half.weight'")


def test_shard_that_shrinks_after_open(folder):
    checkpoint = Checkpoint.open(folder)
    with open(folder / FIRST, "r+b") as file:
        file.truncate(5000)
    with pytest.raises(QuantkitError, match=rf"{FIRST}: truncated: tensor 'expert.weight'"):
        checkpoint.read("expert.weight")


def test_read_error_names_file_and_tensor(folder, monkeypatch):
    checkpoint = Checkpoint.open(folder)

    def broken(*_: object) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(byte_source.os, "preadv", broken)
    with pytest.raises(QuantkitError, match=rf"{FIRST}: reading tensor 'expert.weight' failed.*Input/output error"):
        checkpoint.read("expert.weight")


def test_index_that_disagrees(folder, stored):
    right = {name: file for file, tensors in shards().items() for name in tensors}
    write_index(folder, {**right, "ghost.weight": FIRST})
    fails(folder, FIRST, "'ghost.weight'", "missing")
    write_index(folder, {**right, "norm.weight": FIRST})
    fails(folder, FIRST, "'norm.weight'", SECOND)
    write_index(folder, {name: file for name, file in right.items() if name != "norm.weight"})
    fails(folder, SECOND, "'norm.weight'", "not in")
    write_shard(folder / SECOND, {**shards()[SECOND], "embed.weight": stored["embed.weight"]})
    fails(folder, "'embed.weight'", "also in")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "a\\b", 3, None])
def test_index_must_not_leave_its_folder(folder, name):
    write_index(folder, {"x": name})
    fails(folder, INDEX, "not a plain file name")


def test_index_that_is_no_index(folder):
    for text in ("", "[]", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": "x", "a": "y"}}'):
        (folder / INDEX).write_text(text)
        fails(folder, INDEX)


def test_shard_that_is_a_folder(folder):
    (folder / FIRST).unlink()
    (folder / FIRST).mkdir()
    fails(folder, FIRST, "not a regular file")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"x.weight": fp8(128, 128, 0)[0]}, ["'x.weight'", "'x.weight_scale_inv' is missing"]),
        ({"x.weight": fp8(128, 128, 0)[0], "x.weight_scale_inv": torch.ones(3, 1)}, ["x.weight_scale_inv", "[1, 1]"]),
        ({"x.weight": fp8(128, 128, 0)[0], "x.weight_scale_inv": torch.ones(1, 1).half()}, ["_scale_inv", "F16"]),
        ({"x.weight": torch.ones(2, 2).to(torch.float8_e5m2)}, ["'x.weight'", "F8_E5M2 is not supported"]),
        ({"x.weight": torch.ones(2, 2).int()}, ["'x.weight'", "I32 is not supported"]),
        ({"x.weight": torch.ones(2).to(torch.float8_e4m3fn)}, ["'x.weight'", "2 dimensions"]),
        ({"x.weight": torch.tensor([[1.0, float("nan")]])}, ["'x.weight'", "not finite"]),
        ({"x.weight": torch.tensor([[1.0, float("inf")]]).bfloat16()}, ["'x.weight'", "not finite"]),
        (
            {"x.weight": fp8(128, 128, 0)[0], "x.weight_scale_inv": torch.tensor([[float("inf")]])},
            ["'x.weight_scale_inv'", "not finite"],
        ),
    ],
)
def test_tensor_that_cannot_be_read(tmp_path, tensors, words):
    checkpoint = Checkpoint.open(write_checkpoint(tmp_path / "m", {"model.safetensors": tensors}))
    with pytest.raises(QuantkitError) as caught:
        checkpoint.read("x.weight")
    assert all(word in str(caught.value) for word in [*words, "model.safetensors"])
    if "not finite" not in words:
        with pytest.raises(QuantkitError):
            checkpoint.require("x.weight", tuple(tensors["x.weight"].shape))


def test_nan_among_fp8_weights(tmp_path):
    weight, scale = fp8(128, 128, 0)
    weight.view(torch.uint8)[3, 3] = 0x7F
    path = write_checkpoint(tmp_path / "m", {"model.safetensors": {"x.weight": weight, "x.weight_scale_inv": scale}})
    with pytest.raises(QuantkitError, match="not finite"):
        Checkpoint.open(path).read("x.weight")


def test_finite_weights_whose_sum_is_not(tmp_path):
    tensors = {"x.weight": torch.full((4, 4), 60000, dtype=torch.float16)}
    path = write_checkpoint(tmp_path / "m", {"model.safetensors": tensors})
    assert torch.equal(Checkpoint.open(path).read("x.weight"), tensors["x.weight"].float())


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 65)])
def test_rows_out_of_range(folder, start, stop):
    with pytest.raises(QuantkitError, match=r"'embed\.weight' has 64 rows"):
        Checkpoint.open(folder).read("embed.weight", start, stop)


@pytest.mark.parametrize("weight", [1e8, -1e9, 70000.0])
def test_weights_that_no_type_holds_are_refused(folder, weight):
    values = torch.ones(4, 32)
    values[3, 5] = weight
    write_shard(folder / FIRST, {"x.weight": values})
    write_index(folder, {"x.weight": FIRST})
    with Checkpoint.open(folder) as checkpoint:
        with pytest.raises(QuantkitError, match=r"tensor 'x\.weight' has a weight of .* end at 65,504"):
            checkpoint.read("x.weight")
        assert checkpoint.read("x.weight", 0, 3).shape == (3, 32)


def test_weights_that_become_zeros_are_said_once(folder, capsys):
    write_shard(folder / FIRST, {"x.weight": torch.full((4, 32), 1e-9), "zeros.weight": torch.zeros(4, 32)})
    write_index(folder, {"x.weight": FIRST, "zeros.weight": FIRST})
    with Checkpoint.open(folder) as checkpoint:
        for start in (0, 2, 0):
            assert float(checkpoint.read("x.weight", start, start + 2).max()) == pytest.approx(1e-9)
        checkpoint.read("zeros.weight")
    told = capsys.readouterr()
    assert (told.out + told.err).count("only weights below 1e-06") == 1


def test_matrices_of_zeros_are_named_once(folder, capsys):
    """Also if they are read in slices; not one whose first rows alone are zeros, and no vector."""
    late = torch.zeros(6, 32)
    late[5, 31] = 1
    stored = {"all.weight": torch.zeros(6, 32), "late.weight": late, "norm.weight": torch.zeros(32)}
    write_shard(folder / FIRST, stored)
    write_index(folder, dict.fromkeys(stored, FIRST))
    with Checkpoint.open(folder) as checkpoint:
        for name in stored:
            for start, stop in ((4, 6), (0, 2), (2, 4), (0, None)):
                checkpoint.read(name, start, stop)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is all zeros") == 1 and f"warning: {folder / FIRST}: tensor 'all.weight' is all zeros" in told


def test_of_many_matrices_of_zeros_a_few_are_named(folder, capsys):
    """FP8 whose scales are zeros are zeros too."""
    weight, scale = fp8(128, 128, 0)
    stored = {f"{i}.weight": weight.clone() for i in range(9)}
    scales = {f"{name}_scale_inv": scale * 0 for name in stored}
    write_shard(folder / FIRST, stored | scales)
    write_index(folder, dict.fromkeys(stored | scales, FIRST))
    with Checkpoint.open(folder) as checkpoint:
        for name in stored:
            checkpoint.read(name)
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("is all zeros") == 5 and told.count("which are not named") == 1
