"""A small FP8 checkpoint with ragged scale blocks, and a safetensors writer that can also write nonsense."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

NAMES = {
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float32: "F32",
    torch.int32: "I32",
}
Tensors = Mapping[str, torch.Tensor]


def write_shard(path: Path, tensors: Tensors, change: Callable[[dict], object] = lambda header: None) -> None:
    """A safetensors file; `change` may damage the header dict before it is written."""
    header: dict = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fp8(rows: int, columns: int, seed: int, scale_dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """FP8 weight and its scale per 128 x 128 block."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator).mul_(40).to(torch.float8_e4m3fn)
    blocks = -(-rows // 128), -(-columns // 128)
    scale = torch.exp2(torch.randint(-9, -3, blocks, generator=generator).float())
    if scale_dtype == torch.float32:
        scale *= torch.rand(blocks, generator=generator) + 0.5
    return weight, scale.to(scale_dtype)


def shards() -> dict[str, dict[str, torch.Tensor]]:
    """Two shards; the 576 x 320 weight has a ragged last block in both dimensions and its scale in the other shard."""
    ragged, ragged_scale = fp8(576, 320, 1)
    expert, expert_scale = fp8(256, 128, 2)
    exponent, exponent_scale = fp8(200, 256, 3, torch.float8_e8m0fnu)
    brain, brain_scale = fp8(128, 130, 4, torch.bfloat16)
    generator = torch.Generator().manual_seed(5)
    return {
        "model-00001-of-00002.safetensors": {
            "kv_a.weight": ragged,
            "expert.weight": expert,
            "expert.weight_scale_inv": expert_scale,
            "embed.weight": torch.randn(64, 32, generator=generator).to(torch.bfloat16),
        },
        "model-00002-of-00002.safetensors": {
            "kv_a.weight_scale_inv": ragged_scale,
            "e8m0.weight": exponent,
            "e8m0.weight_scale_inv": exponent_scale,
            "brain.weight": brain,
            "brain.weight_scale_inv": brain_scale,
            "norm.weight": torch.randn(32, generator=generator),
            "half.weight": torch.randn(3, 4, generator=generator).to(torch.float16),
        },
    }


def write_checkpoint(folder: Path, files: Mapping[str, Tensors]) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"model_type": "deepseek_v3", "quantization_config": {"weight_block_size": [128, 128]}}
    (folder / "config.json").write_text(json.dumps(config))
    for name, tensors in files.items():
        write_shard(folder / name, tensors)
    write_index(folder, {tensor: name for name, tensors in files.items() for tensor in tensors})
    return folder
