"""What lies in real model folders: other layouts, pointers and pages under a shard's name, packed weights, gaps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import INDEX, Checkpoint
from quantkit.formats.gguf_reader import GGUFFile, model_file_name
from quantkit.formats.model_names import is_gguf
from quantkit.formats.tensor_table import model_name
from quantkit.models.open import open_model, open_weights

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 4303\n"
PAGE = b"<!DOCTYPE html><html><head><title>Log in</title></head></html>" + b" " * 100
FOUND = {POINTER: "Git LFS pointer", PAGE: "an HTML page", b"PK\x03\x04" + b"x" * 100: "ZIP", b"\0" * 200: "zeros"}


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


@pytest.mark.parametrize("content", FOUND, ids=list(FOUND.values()))
def test_other_things_under_a_shard_s_name_are_named(content, model_copy):
    shards_of(model_copy)[1].write_bytes(content)
    with pytest.raises(QuantkitError, match=rf"model-00002-of-000004\.safetensors: is .*{FOUND[content]}"):
        Checkpoint.open(model_copy)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX])
def test_pointers_under_the_name_of_json_are_named(name, model_copy):
    (model_copy / name).write_bytes(POINTER)
    with pytest.raises(QuantkitError, match=f"{name}: is a Git LFS pointer"):
        open_weights(model_copy)


def test_lengths_that_look_like_magic_are_lengths(tmp_path):
    """0x0280 is how a pickle begins, and 640 in a shard."""
    tensors = {"a": torch.zeros(1)}
    for size in range(400, 700):
        save_file(tensors, tmp_path / "model.safetensors", {"pad": "x" * size})
        if (tmp_path / "model.safetensors").read_bytes()[:2] == b"\x80\x02":
            break
    else:
        pytest.fail("no header of 640 bytes came about")
    (tmp_path / "config.json").write_text("{}")
    assert set(Checkpoint.open(tmp_path).tensors) == {"a"}


def test_pointers_under_a_gguf_s_name_are_named(tmp_path):
    (tmp_path / "x.gguf").write_bytes(POINTER)
    with pytest.raises(QuantkitError, match="is a Git LFS pointer"):
        GGUFFile.open(tmp_path / "x.gguf")


def without_index(folder: Path) -> Path:
    (folder / INDEX).unlink()
    return folder


def test_other_layouts_beside_the_model_are_left_aside(model_copy, capsys):
    before = set(Checkpoint.open(model_copy).tensors)
    without_index(model_copy)
    for name in ("consolidated.00.safetensors", "adapter_model.safetensors", "extra.safetensors"):
        save_file({"model.norm.weight": torch.zeros(3)}, model_copy / name)
    assert set(Checkpoint.open(model_copy).tensors) == before
    assert "adapter_model.safetensors, consolidated.00.safetensors, extra.safetensors left aside" in (
        capsys.readouterr().err.replace("\n", " ")
    )


def test_only_other_layouts_are_named(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    with pytest.raises(QuantkitError, match=r"only consolidated\.safetensors here; not in Hugging Face's layout"):
        Checkpoint.open(tmp_path)
    save_file({"x": torch.zeros(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(QuantkitError, match="merge the adapter into its base"):
        Checkpoint.open(tmp_path)


def test_gaps_are_seen_without_an_index(model_copy):
    without_index(model_copy)
    shards_of(model_copy)[2].unlink()
    with pytest.raises(QuantkitError, match=r"1 of 4 shards are missing, first model-00003-of-000004\.safetensors"):
        Checkpoint.open(model_copy)


@pytest.mark.parametrize(("suffix", "says"), [(".qweight", "GPTQ or AWQ"), (".weight_packed", "to 4 bits")])
def test_packed_weights_are_named(suffix, says, model_copy):
    without_index(model_copy)
    shard = shards_of(model_copy)[0]
    save_file(load_file(shard) | {f"model.layers.1.mlp.up_proj{suffix}": torch.zeros(1, dtype=torch.int32)}, shard)
    with pytest.raises(QuantkitError, match=f"up_proj{suffix}' is packed.*{says}.*starts from the original weights"):
        Checkpoint.open(model_copy)


def edit_index(folder: Path, **entries: str | None) -> None:
    index = json.loads((folder / INDEX).read_text())
    for name, shard in entries.items():
        index["weight_map"][name] = shard
    (folder / INDEX).write_text(json.dumps(index))


def test_what_nobody_needs_may_be_missing(model_copy, capsys):
    """Quantized re-uploads drop the MTP layer and leave its names in the index."""
    edit_index(model_copy, **{"model.layers.9.rotary.inv_freq": "model-00009-of-00009.safetensors"})
    with pytest.raises(QuantkitError, match=r"model-00009-of-00009\.safetensors: no such file"):
        Checkpoint.open(model_copy)  # who does not say what is needed needs all
    assert "model.norm.weight" in open_model(model_copy).tensors
    assert "model-00009-of-00009.safetensors: no such file; nothing in it is needed" in (
        capsys.readouterr().err.replace("\n", " ")
    )
    edit_index(model_copy, **{"model.layers.9.rotary.inv_freq": "model-00001-of-000004.safetensors"})
    open_model(model_copy)
    assert "it is not needed" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("told", [1, 3])
def test_layers_that_the_config_does_not_count_are_no_silent_loss(model_copy, told):
    """The bundled model has four and behind them an MTP layer, which may lie there."""
    config = json.loads((model_copy / "config.json").read_text())
    (model_copy / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 0}))
    assert open_model(model_copy).config["num_hidden_layers"] == 4
    (model_copy / "config.json").write_text(json.dumps(config | {"num_hidden_layers": told}))
    with pytest.raises(QuantkitError, match=f"config.json says num_hidden_layers {told}, but 4 layers are there"):
        open_model(model_copy)


def test_what_is_needed_must_be_there(model_copy):
    gone = shards_of(model_copy)[0]
    gone.unlink()
    with pytest.raises(QuantkitError, match=f"{gone.name}: no such file; the index places tensor"):
        open_model(model_copy)


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cache = Path("/root/.cache/huggingface/hub/models--deepseek-ai--DeepSeek-R1/snapshots/8a58a132790c9935686eb97f")
    assert model_name(Path(".")) == tmp_path.name and model_name(tmp_path / "a" / "..") == tmp_path.name
    assert model_name(cache) == "DeepSeek-R1" and model_name(Path("/")) == "model"
    assert model_name(Path("/c/models--gpt2/snapshots/abc")) == "gpt2"
    assert model_name(Path("/c/models--a--b--c/snapshots/abc")) == "b--c"
    assert model_file_name(Path("x/R1-1.58bit-00001-of-00003.gguf")) == "R1-1.58bit"
    assert model_file_name(Path("x/R1.gguf")) == "R1" and model_file_name(Path("blob")) == "blob"


def test_a_gguf_is_known_by_its_first_bytes(made, tmp_path, tiny):
    from quantkit.job.inspect import describe

    blob = tmp_path / "sha256-4d7a2146"
    shutil.copy(next(made.glob("tiny-r1-*.gguf")), blob)
    assert is_gguf(blob) and not is_gguf(tiny.path) and not is_gguf(tmp_path / "none")
    assert "deepseek2.block_count" in describe(str(blob))
    assert open_weights(str(blob)).name == "sha256-4d7a2146"
