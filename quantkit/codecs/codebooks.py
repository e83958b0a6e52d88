"""The codebooks of ggml's IQ types, from the gguf package."""

import gguf
import numpy as np


def ggml_grid(qtype: str) -> np.ndarray:
    """The codebook inside gguf's dequantizer of this type, float32 [entries, width]."""
    quant = getattr(gguf.quants, qtype)
    quant.init_grid()
    return np.ascontiguousarray(quant.grid.reshape(quant.grid_shape), dtype=np.float32)
