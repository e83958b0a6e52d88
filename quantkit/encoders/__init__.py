"""quantkit's own low-bit encoders: stock ggml blocks, chosen with error feedback under a calibration Hessian."""

from quantkit.encoders.api import SUPPORTED, encode, encode_batch
from quantkit.encoders.hessian import Hessian, blend, damp, describe, second_moment

__all__ = ["SUPPORTED", "Hessian", "blend", "damp", "describe", "encode", "encode_batch", "second_moment"]
