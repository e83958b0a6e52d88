"""Weights and inputs that tests of the encoder share, and what they measure."""

from dataclasses import replace

import gguf
import numpy as np
import torch

from quantkit.encoding.api import SUPPORTED
from quantkit.encoding.hessian import second_moment

TYPES = sorted(SUPPORTED)


def data(rows=24, n_in=512, seed=0):
    """Weights and correlated inputs with unequal channels: what real layers look like. The moment is taken as that of
    as many tokens as anyone could want, since errors are judged by it too."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.eye(n_in) + 0.5 * torch.randn(n_in, n_in, generator=g) / n_in**0.5
    x = torch.randn(2048, n_in, generator=g) @ mix * torch.exp(0.5 * torch.randn(n_in, generator=g))
    return torch.randn(rows, n_in, generator=g) * 0.02, replace(second_moment(x), tokens=1e9)


def decode(qtype: str, packed: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[qtype]))


def output_error(w, q, hessian) -> float:
    e = w - q
    return float(((e @ hessian.matrix) * e).sum() / ((w @ hessian.matrix) * w).sum())
