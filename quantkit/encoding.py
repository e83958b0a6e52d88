"""Encoders: float32 rows in, packed ggml blocks out. ggml's own is the reference; ours join it."""

from typing import Protocol

import numpy as np

from quantkit import ggml
from quantkit.errors import QuantkitError


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


ENCODERS: dict[str, type] = {"ggml": GgmlEncoder}


def encoder(name: str) -> Encoder:
    if name not in ENCODERS:
        raise QuantkitError(f"--encoder {name}: unknown; choose from {', '.join(ENCODERS)}")
    return ENCODERS[name]()
