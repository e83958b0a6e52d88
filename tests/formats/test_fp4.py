"""DeepSeek-V4's FP4 experts: against compressed-tensors' decoder and ggml's MXFP4, and what is said of wrong ones."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.ggml import quants

NAME = "layers.0.ffn.experts.0.w1"
ROWS, COLUMNS = 24, 192


def stored(seed: int = 0) -> dict[str, torch.Tensor]:
    """All bytes of codes, and scales from the smallest normal power of two to one whose weights F16 scales hold."""
    generator = torch.Generator().manual_seed(seed)
    octets = torch.randint(0, 256, (ROWS, COLUMNS // 2), generator=generator).to(torch.uint8)
    exponents = torch.randint(0, 141, (ROWS, COLUMNS // 32), generator=generator).to(torch.uint8)
    exponents[0, :2] = torch.tensor([0, 1], dtype=torch.uint8)  # whose halves are denormal
    return {f"{NAME}.weight": octets.view(torch.int8), f"{NAME}.scale": exponents.view(torch.float8_e8m0fnu)}


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors")
    return folder


def independent(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8  # seconds, with transformers

    octets, exponents = tensors[f"{NAME}.weight"].view(torch.uint8), tensors[f"{NAME}.scale"].view(torch.uint8)
    values = unpack_fp4_from_uint8(octets, ROWS, COLUMNS, torch.float32)
    return values * torch.from_numpy(np.exp2(exponents.numpy().astype(np.float64) - 127)).float().repeat_interleave(
        32, 1
    )


def test_reads_what_compressed_tensors_reads(tmp_path):
    tensors = stored()
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    assert checkpoint.require(f"{NAME}.weight", (ROWS, COLUMNS)).dtype == "FP4"
    expected = independent(tensors)
    assert torch.equal(checkpoint.read(f"{NAME}.weight"), expected) and expected.unique().numel() > 100
    for start, stop in [(0, 1), (5, 17), (ROWS - 1, ROWS), (3, 3)]:
        assert torch.equal(checkpoint.read(f"{NAME}.weight", start, stop), expected[start:stop])


def test_copies_into_mxfp4_are_the_same_numbers(tmp_path):
    tensors = stored(1)
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    data = checkpoint.read_mxfp4(f"{NAME}.weight", 2, ROWS)
    expected = independent(tensors)[2:]
    assert torch.equal(torch.from_numpy(quants.dequantize("MXFP4", data, COLUMNS)), expected)
    assert np.array_equal(gguf.quants.dequantize(data, gguf.GGMLQuantizationType.MXFP4), expected.numpy())


@pytest.mark.parametrize(
    ("part", "value", "says"),
    [
        (
            "scale",
            None,
            r"model\.safetensors: tensor '.*w1\.weight' is packed FP4 but its scale '.*w1\.scale' is missing",
        ),
        (
            "scale",
            torch.zeros(ROWS, 5).to(torch.float8_e8m0fnu),
            r"w1\.scale' is F8_E8M0 \[24, 5\]; FP4 \[24, 192\] needs",
        ),
        ("scale", torch.zeros(ROWS, 6), r"w1\.scale' is F32 \[24, 6\]; FP4 \[24, 192\] needs F8_E8M0 \[24, 6\]"),
        ("weight", torch.zeros(ROWS, 80, dtype=torch.int8), r"w1\.weight' has shape \[24, 160\], the config implies"),
        ("weight", torch.zeros(ROWS, 96, dtype=torch.uint8), r"w1\.weight' has shape \[24, 96\], the config implies"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(part, value, says, tmp_path):
    tensors = stored()
    if value is None:
        del tensors[f"{NAME}.{part}"]
    else:
        tensors[f"{NAME}.{part}"] = value
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors, expert_dtype="fp4"))
    with pytest.raises(QuantkitError, match=says):
        checkpoint.require(f"{NAME}.weight", (ROWS, COLUMNS))


def test_a_scale_that_is_no_number_is_refused_however_it_is_read(tmp_path):
    tensors = stored()
    tensors[f"{NAME}.scale"].view(torch.uint8)[7, 3] = 255
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    for read in (checkpoint.read, checkpoint.read_mxfp4):
        with pytest.raises(
            QuantkitError, match=r"model\.safetensors: tensor '.*w1\.scale' has a scale that is not finite"
        ):
            read(f"{NAME}.weight", 0, ROWS)


def test_tables_of_ids_are_no_weights(tmp_path):
    ids = torch.tensor([[0, 3], [2, 9]])
    tensors = {"gate.tid2eid": ids, "gate.weight": torch.ones(4, 4)}
    checkpoint = Checkpoint.open(write(tmp_path / "m", tensors))
    assert torch.equal(checkpoint.read_ids("gate.tid2eid", 0, 2, 10), ids.int())
    for read, says in [
        (lambda: checkpoint.read_ids("gate.tid2eid", 0, 2, 9), r"'gate\.tid2eid' has ids from 0 to 9; there are 9"),
        (
            lambda: checkpoint.read_ids("gate.weight", 0, 2, 9),
            r"'gate\.weight' is F32: weights, where ids were expected",
        ),
        (lambda: checkpoint.read("gate.tid2eid"), r"'gate\.tid2eid' is I64: ids, where weights were expected"),
    ]:
        with pytest.raises(QuantkitError, match=says):
            read()
