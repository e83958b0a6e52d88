"""Encoders that need no more than an imatrix: float32 rows in, packed ggml blocks out."""

from typing import Protocol

import numpy as np

from quantkit.ggml import codec as ggml


class Encoder(Protocol):
    """name goes into the file's provenance. Called from several threads at once."""

    name: str

    def __call__(self, qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        """rows float32 [n, n_in] of one matrix, importance float32 [n_in] -> uint8 [n, row_bytes]."""


class GgmlEncoder:
    """ggml's reference encoder, byte for byte llama-quantize's result."""

    name = "ggml"

    def __call__(self, qtype: str, rows: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
        return ggml.quantize(qtype, rows, importance)
