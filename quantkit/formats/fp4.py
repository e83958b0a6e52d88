"""FP4 as DeepSeek-V4 stores its routed experts: two E2M1 numbers a byte, and a power of two for every 32 of a row.

A weight [rows, columns] is `….weight` I8 [rows, columns / 2], number 2i in the low nibble of byte i and 2i + 1 in the
high one, and `….scale` F8_E8M0 [rows, columns / 32], byte b for 2^(b - 127) (llama.cpp's conversion/base.py,
repack_mxfp4_blocks, reads the same; OCP Microscaling formats, v1.0). ggml's MXFP4 has the same codes and scale bytes in
another order, so a copy into it loses nothing.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.tensor_entry import TensorEntry

if TYPE_CHECKING:  # two seconds to load, which headers do without
    import torch

DTYPE = "FP4"  # of an entry, as safetensors would say F8_E4M3; no file has it
STORED = "I8"
COPY = "MXFP4"  # ggml's type of the same numbers
SCALE_DTYPE = "F8_E8M0"
GROUP = 32  # numbers under one scale
NOT_A_NUMBER = 255  # of E8M0
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def scale_of(name: str) -> str:
    """The scale's name of a weight `….weight`."""
    return name.removesuffix("weight") + "scale"


def packed_weights(tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, TensorEntry]:
    """The table with FP4 entries, of the weight's shape and the codes' bytes, for matrices of I8 that have a scale, or
    in a model whose config.json says that its experts are FP4."""
    said = config.get("expert_dtype") == "fp4"
    found = dict(tensors)
    for name, entry in tensors.items():
        if entry.dtype == STORED and len(entry.shape) == 2 and name.endswith(".weight"):
            scale = tensors.get(scale_of(name))
            if said or (scale is not None and scale.dtype == SCALE_DTYPE):
                shape = entry.shape[0], entry.shape[1] * 2
                found[name] = TensorEntry(DTYPE, shape, entry.file, entry.begin, entry.end)
    return found


def scale_entry(
    name: str, entry: TensorEntry, tensors: Mapping[str, TensorEntry], where: Callable[[str, TensorEntry], str]
) -> TensorEntry:
    """The scale's entry of an FP4 weight. QuantkitError, naming tensor and shard, if it is missing or misfits."""
    scale = tensors.get(scale_of(name))
    if scale is None:
        raise QuantkitError(f"{where(name, entry)} is packed FP4 but its scale {scale_of(name)!r} is missing")
    rows, columns = entry.shape
    if columns % GROUP or scale.dtype != SCALE_DTYPE or scale.shape != (rows, columns // GROUP):
        raise QuantkitError(
            f"{where(scale_of(name), scale)} is {scale.dtype} {list(scale.shape)}; FP4 {list(entry.shape)} needs "
            f"{SCALE_DTYPE} [{rows}, {columns / GROUP:g}], one for every {GROUP} of a row"
        )
    return scale


def codes(octets: "torch.Tensor") -> "torch.Tensor":
    """uint8 [n, columns / 2] -> uint8 [n, columns], 0 to 15, on the same device."""
    import torch

    return torch.stack((octets & 15, octets >> 4), dim=-1).flatten(1)


def dequantize(octets: "torch.Tensor", scale: "torch.Tensor") -> "torch.Tensor":
    """float32 [n, columns] on octets' device. octets: uint8 [n, columns / 2]; scale: [n, columns / 32], float32."""
    import torch

    levels = torch.tensor(LEVELS, device=octets.device)
    out = levels[codes(octets).int()]
    out.view(*scale.shape, GROUP).mul_(scale.to(out.device, torch.float32)[..., None])
    return out


def as_mxfp4(octets: "torch.Tensor", exponents: "torch.Tensor", where: str) -> np.ndarray:
    """The same numbers as ggml's MXFP4: uint8 [n, columns / 32 * 17].

    A block of 32 is the scale's byte, then byte j with number j in its low and j + 16 in its high nibble (ggml's
    block_mxfp4). octets: as `dequantize` takes them; exponents uint8 [n, columns / 32]: the scales as stored.
    QuantkitError, beginning with `where`, for a scale that is not a number: ggml would read one.
    """
    import torch

    if (exponents == NOT_A_NUMBER).any():
        raise QuantkitError(f"{where} has a scale that is not finite")
    blocks = codes(octets).view(*exponents.shape, GROUP)
    half = GROUP // 2
    packed = torch.cat((exponents[..., None], blocks[..., :half] | (blocks[..., half:] << 4)), dim=-1)
    return packed.flatten(1).numpy()
