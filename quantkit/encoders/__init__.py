"""quantkit's own low-bit encoders: stock ggml blocks, chosen with error feedback under a calibration Hessian."""

from quantkit.encoders.api import SUPPORTED, encode, encode_batch, encode_values
from quantkit.encoders.hessian import Factor, Hessian, blend, damp, describe, prepare, second_moment

__all__ = [
    "SUPPORTED",
    "Factor",
    "Hessian",
    "blend",
    "damp",
    "describe",
    "encode",
    "encode_batch",
    "encode_values",
    "prepare",
    "second_moment",
]
