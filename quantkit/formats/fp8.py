"""FP8 with block scales: `w = fp8 * scale_inv[row // 128, col // 128]`, the last block of either dimension ragged.

Scales are any floats, or powers of two alone (UE8M0: V3.1), as float32 or as the bytes F8_E8M0.
"""

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # two seconds to load, which headers do without
    import torch

SIDES = tuple(1 << bits for bits in range(3, 13))  # 8 to 4096; DeepSeek's are 128 and 32
Shape = tuple[int, ...]


def scale_shape(shape: Shape, block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale of a weight `(rows, columns)` in blocks of `block` (rows, columns)."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def block_of(scaled: Iterable[tuple[Shape, Shape]], stated: tuple[int, int]) -> tuple[int, int]:
    """The block that all these scales have: the stated one if it fits them, else the powers of two that do.

    scaled: shapes of weights and of their scales. Where there is no such block the stated one, and whoever reads finds
    which tensor is wrong. Only one power of two gives a number of blocks above one, so there is nothing to choose.
    """
    pairs = {(shape, scale) for shape, scale in scaled if len(shape) == len(scale) == 2}
    if all(scale_shape(shape, stated) == scale for shape, scale in pairs):
        return stated
    found = []
    for axis in (0, 1):
        lengths = {(shape[axis], scale[axis]) for shape, scale in pairs}
        found.append(next((side for side in SIDES if all(-(-n // side) == blocks for n, blocks in lengths)), None))
    rows, columns = found
    return stated if rows is None or columns is None else (rows, columns)


def scale_rows(start: int, stop: int, block: tuple[int, int]) -> tuple[int, int]:
    """Rows of the scale that cover rows start:stop of the weight."""
    return start // block[0], -(-stop // block[0])


def dequantize(
    raw: "torch.Tensor", scale: "torch.Tensor", block: tuple[int, int], first_row: int = 0
) -> "torch.Tensor":
    """float32 [n, columns] on raw's device.

    raw: float8_e4m3fn [n, columns], rows first_row: of a weight.
    scale: [scale rows covering them, ceil(columns / block[1])], any float type.
    """
    height, width = block
    n, columns = raw.shape
    out = raw.float()
    per_column = scale.to(raw.device).float().repeat_interleave(width, dim=1)[:, :columns]
    head = min(n, -first_row % height)  # rows up to the first block boundary
    body = (n - head) // height * height
    skip = 1 if head else 0
    out[:head].mul_(per_column[0] if head else 1)
    middle = out[head : head + body].view(body // height, height, columns)
    middle.mul_(per_column[skip : skip + body // height, None])
    if head + body < n:
        out[head + body :].mul_(per_column[-1])
    return out
