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
FP4_LEVELS: tuple[int, ...] = gguf.quants.MXFP4.kvalues
"""Twice what the 16 codes of MXFP4 (E2M1) stand for."""
LEVELS = {"IQ4_NL": IQ4_LEVELS, "MXFP4": FP4_LEVELS}


@cache
def on_device(codebook: str | None, device: torch.device) -> torch.Tensor:
    """int8 [entries, width] of a type with a grid, the 16 of one in LEVELS, or for None one byte that none reads."""
    if codebook is None:
        return torch.zeros(1, dtype=torch.int8, device=device)
    values = np.array(LEVELS[codebook]) if codebook in LEVELS else ggml_grid(codebook)
    return torch.tensor(values, dtype=torch.int8, device=device)


@cache
def for_kernels(codebook: str | None, device: torch.device) -> torch.Tensor:
    """As `on_device`; but of 8 weights with three levels, which a kernel looks up at random, int16 [entries]: bit i
    says that weight i has the second level (of IQ1_S: 1), bit 8 + i that it has the third (-1)."""
    table = on_device(codebook, device)
    if codebook is None or table.dim() != 2 or table.shape[1] != 8:
        return table
    second, third = (1, -1) if codebook == "IQ1_S" else table.unique().tolist()[1:]
    place = 2 ** torch.arange(8, device=device)
    bits = ((table == second) * place).sum(1) + 256 * ((table == third) * place).sum(1)
    return bits.to(torch.int16)


def entries(codebook: str, index: torch.Tensor) -> torch.Tensor:
    """int64 [n, k] -> the entries of a codebook, int8 [n, k, width] (of one in LEVELS: [n, k])."""
    return on_device(codebook, index.device)[index]
