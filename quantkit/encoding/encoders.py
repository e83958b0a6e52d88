"""quantkit's own low-bit encoders: stock ggml blocks, chosen with error feedback under a calibration Hessian."""

from quantkit.encoding.api import SUPPORTED, encode, encode_batch, encode_values
from quantkit.encoding.hessian import Factor, Hessian, blend, damp, describe, gram, prepare, second_moment
from quantkit.encoding.targets import cross_moment, retarget

__all__ = [
    "SUPPORTED",
    "Factor",
    "Hessian",
    "blend",
    "cross_moment",
    "damp",
    "describe",
    "encode",
    "encode_batch",
    "encode_values",
    "gram",
    "prepare",
    "retarget",
    "second_moment",
]
