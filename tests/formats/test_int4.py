"""INT4 in words of eight codes: against compressed-tensors' own packing and an element-by-element decoder."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from kimi_checkpoint import INT4
from safetensors.torch import save_file

from quantkit.errors import QuantkitError
from quantkit.formats import int4
from quantkit.formats.checkpoint import Checkpoint

NAME, PREFIX = "model.layers.1.mlp.experts.0.up_proj.weight", "language_model."
ROWS, COLUMNS = 24, 96


def packing():
    """compressed-tensors' own; it takes seconds to import, with transformers."""
    from compressed_tensors.compressors.pack_quantized import helpers

    return helpers


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes int8 [ROWS, COLUMNS], all 16 of them, and scales BF16 [ROWS, COLUMNS / 32]."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, (ROWS, COLUMNS), generator=generator, dtype=torch.int8)
    return codes, (torch.rand(ROWS, COLUMNS // 32, generator=generator) * 0.02 + 1e-3).bfloat16()


def stored(codes: torch.Tensor, scale: torch.Tensor, name: str = NAME) -> dict[str, torch.Tensor]:
    return {
        f"{name}_packed": packing().pack_to_int32(codes, 4),
        f"{name}_scale": scale,
        f"{name}_shape": torch.tensor(codes.shape, dtype=torch.int32),
    }


def plainly(words: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """The definition, element by element: what families of loaders agree on."""
    out = torch.empty(len(words), words.shape[1] * 8)
    for r, c in np.ndindex(*out.shape):
        nibble = ((int(words[r, c // 8]) & 0xFFFFFFFF) >> 4 * (c % 8)) & 15
        out[r, c] = (nibble - 8) * float(scale[r, c // 32])
    return out


def write(folder: Path, tensors: dict[str, torch.Tensor], settings: dict | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    quantization = INT4 if settings is None else settings
    (folder / "config.json").write_text(json.dumps({"quantization_config": quantization, **config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_reads_what_compressed_tensors_packs(tmp_path):
    codes, scale = made()
    tensors = stored(codes, scale)
    assert torch.equal(int4.unpack(tensors[f"{NAME}_packed"]), codes)
    assert torch.equal(packing().unpack_from_int32(tensors[f"{NAME}_packed"], 4, codes.shape), codes)
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    assert checkpoint.require(NAME, (ROWS, COLUMNS)).dtype == "INT4"
    expected = plainly(tensors[f"{NAME}_packed"], scale.float())
    assert torch.equal(checkpoint.read(NAME), expected)
    for start, stop in [(0, 1), (5, 17), (ROWS - 1, ROWS), (3, 3)]:
        assert torch.equal(checkpoint.read(NAME, start, stop), expected[start:stop])


def test_a_row_range_reads_its_own_bytes_only(tmp_path, monkeypatch):
    codes, scale = made()
    checkpoint, asked = Checkpoint.open(write(tmp_path / "m", stored(codes, scale))), []
    read = checkpoint._source.read
    monkeypatch.setattr(
        checkpoint._source, "read", lambda name, offset, n, what: asked.append(n) or read(name, offset, n, what)
    )
    checkpoint.read(NAME, 4, 10)
    assert asked == [6 * COLUMNS // 2, 6 * COLUMNS // 32 * 2]


def test_copies_into_q4_0_are_the_same_numbers(tmp_path):
    codes, scale = made(1)
    checkpoint = Checkpoint.open(write(tmp_path / "m", stored(codes, scale)))
    packed = checkpoint.read_q4_0(NAME, 2, 20)
    assert packed.shape == (18, COLUMNS // 32 * 18)
    decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(decoded, checkpoint.read(NAME, 2, 20).numpy())


def test_groups_of_64_become_two_blocks(tmp_path):
    codes = torch.randint(-8, 8, (4, 128), dtype=torch.int8)
    scale = torch.tensor([[0.5, 0.25]] * 4).bfloat16()
    packed = int4.as_q4_0(packing().pack_to_int32(codes, 4), scale, "x", print)
    decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(decoded, (codes.float() * scale.float().repeat_interleave(64, 1)).numpy())


def test_scales_that_f16_does_not_hold_are_said_or_refused(tmp_path, capsys):
    codes, scale = made()
    scale[3, 1] = 3.3e-6
    checkpoint = Checkpoint.open(write(tmp_path / "m", stored(codes, scale)))
    packed = checkpoint.read_q4_0(NAME, 0, ROWS)
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and "0 more are no F16 numbers" in said
        and f"model.safetensors: tensor '{NAME}_scale'" in said
    )
    decoded = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)
    off = np.abs(decoded - checkpoint.read(NAME).numpy())
    assert 0 < off[3, 32:64].max() < 8 * 2**-25
    off[3, 32:64] = 0
    assert not off.any()
    scale[3, 1] = 1e6
    with pytest.raises(QuantkitError, match=r"_scale': scale 9\.994e\+05 is beyond F16"):
        int4.as_q4_0(packing().pack_to_int32(codes, 4), scale, f"tensor '{NAME}_scale'", print)


def test_a_text_model_under_a_prefix(tmp_path, capsys):
    """Kimi-K2.5: its config in `text_config`, its names under `language_model.`, what sees left aside."""
    codes, scale = made()
    tensors = stored(codes, scale, PREFIX + NAME)
    tensors |= {
        "vision_tower.a.weight": torch.ones(2),
        "vision_tower.b": torch.ones(2),
        "mm_projector.x": torch.ones(2),
    }
    inner = {"quantization_config": INT4, "vocab_size": 5, "architectures": ["Inner"]}
    folder = write(tmp_path / "m", tensors, {}, text_config=inner, architectures=["Outer"], vision_config={"a": 1})
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.read(NAME), plainly(tensors[f"{PREFIX}{NAME}_packed"], scale.float()))
    assert checkpoint.config == {"quantization_config": INT4, "vocab_size": 5, "architectures": ["Outer"]}
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "mm_projector.* (1 tensors), vision_tower.* (2 tensors)" in said
    with pytest.raises(QuantkitError, match=r"the model has no tensor 'language_model\.x'"):
        checkpoint.read("x", print)
    del tensors[f"{PREFIX}{NAME}_scale"]
    write(folder, tensors, {}, text_config=inner)
    with pytest.raises(
        QuantkitError, match=r"model\.safetensors: tensor 'language_model\.model.*_packed' is packed INT4"
    ):
        Checkpoint.open(folder).read(NAME)
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(QuantkitError, match=r"no tensor is under 'language_model\.'"):
        Checkpoint.open(folder)


def changed(path: str, value: object) -> dict:
    root = json.loads(json.dumps(INT4))
    at = root
    *parents, last = path.split(".")
    for part in parents:
        at = at[part]
    at[last] = value
    return root


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (changed("config_groups.group_0.weights.num_bits", 8), "num_bits is 8, only 4"),
        (changed("config_groups.group_0.weights.symmetric", False), "symmetric is False"),
        (changed("config_groups.group_0.weights.type", "float"), "type is 'float'"),
        (changed("config_groups.group_0.weights.actorder", "group"), "actorder is 'group'"),
        (changed("format", "nvfp4-pack-quantized"), "'nvfp4-pack-quantized' is not pack-quantized"),
        (changed("config_groups", {}), "no config_groups"),
        (changed("quant_method", "gptq"), "quant_method gptq"),
        ({}, "packed to 4 bits by compressed-tensors"),
    ],
)
def test_other_packings_are_refused(settings, words, tmp_path):
    folder = write(tmp_path / "m", stored(*made()), settings)
    with pytest.raises(QuantkitError, match=rf"_packed' is (?=packed to 4 bits).*{words}"):
        Checkpoint.open(folder)


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("_scale", torch.ones(ROWS, 5, dtype=torch.bfloat16), "_scale' is BF16 [24, 5]; INT4 [24, 96] needs"),
        ("_scale", torch.ones(ROWS - 1, 3, dtype=torch.bfloat16), "_scale' is BF16 [23, 3]; INT4 [24, 96] needs"),
        ("_scale", torch.ones(ROWS, 3, dtype=torch.int32), "_scale' is I32"),
        ("_scale", torch.full((ROWS, 3), float("nan"), dtype=torch.bfloat16), "_scale' has a scale that is not finite"),
        ("_zero_point", torch.ones(3, 3, dtype=torch.int32), "_zero_point': INT4 with zero points"),
        ("_g_idx", torch.ones(COLUMNS, dtype=torch.int32), "_g_idx': INT4 with zero points or reordered"),
        ("_packed", torch.ones(ROWS, 12), "has no tensor"),
    ],
)
def test_broken_parts_are_named(part, value, words, tmp_path):
    folder = write(tmp_path / "m", stored(*made()) | {NAME + part: value})
    with pytest.raises(QuantkitError) as caught:
        Checkpoint.open(folder).read(NAME)
    assert words in str(caught.value) and "\n" not in str(caught.value)
