"""FP8 with block scales: `w = fp8 * scale_inv[row // 128, col // 128]`, the last block of either dimension ragged."""

import torch


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """Shape of the scale of a weight `(rows, columns)` in blocks of `block` (rows, columns)."""
    rows, columns = shape
    return -(-rows // block[0]), -(-columns // block[1])


def scale_rows(start: int, stop: int, block: tuple[int, int]) -> tuple[int, int]:
    """Rows of the scale that cover rows start:stop of the weight."""
    return start // block[0], -(-stop // block[0])


def dequantize(raw: torch.Tensor, scale: torch.Tensor, block: tuple[int, int], first_row: int = 0) -> torch.Tensor:
    """float32 [n, columns] on raw's device.

    raw: float8_e4m3fn [n, columns], rows first_row: of a weight.
    scale: [scale rows covering them, ceil(columns / block[1])], any float type.
    """
    height, width = block
    n, columns = raw.shape
    out = raw.to(torch.float32)
    per_column = scale.to(raw.device, torch.float32).repeat_interleave(width, dim=1)[:, :columns]
    head = min(n, -first_row % height)  # rows up to the first block boundary
    body = (n - head) // height * height
    skip = 1 if head else 0
    out[:head].mul_(per_column[0] if head else 1)
    middle = out[head : head + body].view(body // height, height, columns)
    middle.mul_(per_column[skip : skip + body // height, None])
    if head + body < n:
        out[head + body :].mul_(per_column[-1])
    return out
