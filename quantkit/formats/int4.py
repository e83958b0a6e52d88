"""INT4 as compressed-tensors stores it (`pack-quantized`): Kimi-K2-Thinking's, K2.5's and K2.6's routed experts.

A weight [rows, columns] is `….weight_packed` int32 [rows, columns / 8], code j of a word in its bits 4j to 4j + 3,
stored as code + 8; `….weight_scale` BF16 [rows, columns / group]; and `….weight_shape` int32 [2], which says what the
shapes of the other two already say and is not read. `w = code * scale`, code -8 to 7, no zero point
(compressed_tensors/compressors/pack_quantized; llama.cpp's conversion/base.py reads the same).
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.tensor_entry import TensorEntry

if TYPE_CHECKING:  # two seconds to load, which headers do without
    import torch

DTYPE = "INT4"  # of an entry, as safetensors would say F8_E4M3; no file has it
PACKED, SCALE, SHAPE = "_packed", "_scale", "_shape"  # appended to `….weight`
PARTS = (PACKED, SCALE, SHAPE)
PER_WORD = 8
SCALE_DTYPES = ("BF16", "F16", "F32")
Q4_0_BLOCK = 32
ONLY: Mapping[str, tuple[Any, ...]] = {
    "num_bits": (4,),
    "type": ("int",),
    "symmetric": (True,),
    "strategy": ("group", "channel"),
    "actorder": (None,),
}


def weight_name(stored: str) -> str:
    """The weight that a stored tensor is, or is a part of."""
    return next((stored.removesuffix(part) for part in PARTS if stored.endswith(f".weight{part}")), stored)


def packed_weights(tensors: Mapping[str, TensorEntry]) -> dict[str, TensorEntry]:
    """The table with an entry `….weight` for each `….weight_packed`, of the weight's shape and the words' bytes."""
    found = dict(tensors)
    for name, entry in tensors.items():
        if name.endswith(f".weight{PACKED}") and entry.dtype == "I32" and len(entry.shape) == 2:
            shape = entry.shape[0], entry.shape[1] * PER_WORD
            found[name.removesuffix(PACKED)] = TensorEntry(DTYPE, shape, entry.file, entry.begin, entry.end)
    return found


def readable(config: Mapping[str, Any]) -> str | None:
    """Why weights that config.json's `quantization_config` describes cannot be read; None if they can."""
    settings = config.get("quantization_config")
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return "quantization_config is not compressed-tensors'"
    groups = settings.get("config_groups")
    each = list(groups.values()) if isinstance(groups, dict) else []
    if not each or not all(isinstance(group, dict) and isinstance(group.get("weights"), dict) for group in each):
        return "quantization_config has no config_groups with weights"
    for group in each:
        if (form := group.get("format") or settings.get("format")) != "pack-quantized":
            return f"format {form!r:.40} is not pack-quantized"
        for key, allowed in ONLY.items():
            if (value := group["weights"].get(key, allowed[0])) not in allowed:
                return f"weights' {key} is {value!r:.40}, only {allowed[0]!r} is supported"
    return None


def scale_entry(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], where: Callable[[str, TensorEntry], str]
) -> TensorEntry:
    """The scale's entry of a packed weight. QuantkitError, naming tensor and shard, if it is missing or misfits."""
    for part in ("_zero_point", "_g_idx"):
        if (other := tensors.get(name + part)) is not None:
            raise QuantkitError(f"{where(name + part, other)}: INT4 with zero points or reordered columns is not read")
    scale = tensors.get(name + SCALE)
    if scale is None:
        raise QuantkitError(f"{where(name + PACKED, entry)} is packed INT4 but its scale {name + SCALE!r} is missing")
    rows, columns = entry.shape
    groups = scale.shape[1] if len(scale.shape) == 2 else 0
    if scale.dtype not in SCALE_DTYPES or scale.shape != (rows, groups) or groups < 1 or columns % groups:
        raise QuantkitError(
            f"{where(name + SCALE, scale)} is {scale.dtype} {list(scale.shape)}; INT4 {list(entry.shape)} needs "
            f"{' or '.join(SCALE_DTYPES)} [{rows}, groups that divide {columns}]"
        )
    return scale


def unpack(words: "torch.Tensor") -> "torch.Tensor":
    """int32 [n, columns / 8] -> codes int8 [n, columns], -8 to 7, on the same device."""
    import torch

    octets = words.contiguous().view(torch.uint8)  # little-endian: the low nibble of a byte comes first
    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1).to(torch.int8).sub_(8)


def dequantize(words: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """float32 [n, columns] on words' device. words: int32 [n, columns / 8]; scale: [n, groups], any float type."""
    import torch

    out = unpack(words).to(torch.float32)
    grouped = out.view(*scale.shape, out.shape[1] // scale.shape[1])
    grouped.mul_(scale.to(out.device, torch.float32)[..., None])
    return out


def as_q4_0(words: "torch.Tensor", scale: "torch.Tensor", where: str, say: Callable[[str], object]) -> np.ndarray:
    """The same numbers as ggml's Q4_0: uint8 [n, columns / 32 * 18].

    A block of 32 is d, an F16, then byte j with weight j in its low and j + 16 in its high nibble, both + 8 (ggml's
    block_q4_0). words, scale: as `dequantize` takes them. A scale that is not an F16 number (below 2^-14, of Kimi's
    BF16) becomes the nearest, and `say` is told so, beginning with `where`; QuantkitError for one beyond F16, and for
    groups that blocks of 32 do not divide.
    """
    import torch

    codes = unpack(words).add_(8).view(torch.uint8)
    n, columns = codes.shape
    if columns % scale.shape[1] or (columns // scale.shape[1]) % Q4_0_BLOCK:
        raise QuantkitError(f"{where}: groups of {columns // scale.shape[1]} are no multiple of Q4_0's 32; use Q8_0")
    d = scale.to(torch.float32)
    halves = d.to(torch.float16)
    if not torch.isfinite(halves).all():
        raise QuantkitError(f"{where}: scale {float(d.abs().max()):.4g} is beyond F16 and so beyond Q4_0: is it right?")
    if (wrong := halves.to(torch.float32) != d).any():
        say(
            f"warning: {where}: scale {float(d[wrong][0]):.4g} and {int(wrong.sum()) - 1} more are no F16 numbers; "
            "Q4_0 has the nearest, all others exactly"
        )
    blocks = codes.view(n, -1, Q4_0_BLOCK)
    out = np.empty((n, columns // Q4_0_BLOCK, 18), np.uint8)
    repeated = halves.repeat_interleave(columns // scale.shape[1] // Q4_0_BLOCK, dim=1).contiguous()
    out[:, :, :2] = repeated.view(torch.uint8).view(n, -1, 2).numpy()
    out[:, :, 2:] = (blocks[..., :16] | (blocks[..., 16:] << 4)).numpy()
    return out.reshape(n, -1)
