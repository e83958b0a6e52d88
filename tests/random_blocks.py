"""Random bytes as quantized weights."""

import numpy as np
import torch

from quantkit.codecs import types as qtypes
from quantkit.ggml.quants import dequantize
from quantkit.runtime.activations import Activations


def random_blocks(
    qtype: str, shape: tuple[int, ...], n_in: int, most: float = np.inf
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random bytes, every field in its whole range but for numbers that are not finite, or beyond `most` (whose sums
    might not be): uint8 [*shape, row_bytes] and what ggml decodes them to."""
    sizes = qtypes.stored(qtype)
    generator = np.random.default_rng(3)
    data = generator.integers(0, 256, (int(np.prod(shape)) * n_in // sizes.block_size, sizes.type_size), np.uint8)
    decoded = dequantize(qtype, data, sizes.block_size)
    data[~(np.isfinite(decoded) & (np.abs(decoded) <= most)).all(1)] = 0
    data = data.reshape(*shape, -1)
    values = dequantize(qtype, data.reshape(-1, data.shape[-1]), n_in).reshape(*shape, n_in)
    return torch.from_numpy(data), torch.from_numpy(values)


def close(a: torch.Tensor, b: torch.Tensor, error: float) -> bool:
    """Whether they differ by at most this share of the greatest value of b."""
    return float((a.cpu() - b.cpu()).abs().max()) <= error * float(b.abs().max())


def numbers(x: Activations) -> torch.Tensor:
    """What the integers say, float64 on the CPU."""
    assert x.words is not None and x.scales is not None
    words = x.words.cpu().transpose(1, 2)
    upper, lower = words[..., :2].contiguous().view(torch.int8), words[..., 2:].contiguous().view(torch.uint8)
    whole = upper.flatten(1).double() * 256 + lower.flatten(1).double()
    return (whole.view(len(words), -1, 32) * x.scales.cpu().double()[..., None]).flatten(1)
