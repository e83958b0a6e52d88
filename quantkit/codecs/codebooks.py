"""The codebooks of ggml's IQ types, from the gguf package."""

from functools import cache

import gguf
import numpy as np
import torch


@cache
def ggml_grid(qtype: str) -> np.ndarray:
    """The codebook inside gguf's dequantizer of this type, float32 [entries, width]."""
    quant = getattr(gguf.quants, qtype)
    quant.init_grid()
    return np.ascontiguousarray(quant.grid.reshape(quant.grid_shape), dtype=np.float32)


IQ4_LEVELS: tuple[int, ...] = gguf.quants.IQ4_NL.kvalues
"""What the 16 codes of IQ4_NL and IQ4_XS stand for."""


@cache
def on_device(codebook: str | None, device: torch.device) -> torch.Tensor:
    """int8 [entries, width] of a type with a grid, the 16 levels of "IQ4_NL", or for None one byte that none reads."""
    if codebook is None:
        return torch.zeros(1, dtype=torch.int8, device=device)
    values = np.array(IQ4_LEVELS) if codebook == "IQ4_NL" else ggml_grid(codebook)
    return torch.tensor(values, dtype=torch.int8, device=device)


def entries(codebook: str, index: torch.Tensor) -> torch.Tensor:
    """int64 [n, k] -> the entries of a codebook, int8 [n, k, width] (of "IQ4_NL": [n, k])."""
    return on_device(codebook, index.device)[index]
