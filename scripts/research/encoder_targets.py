"""What experiments need beside the encoder: decoded values, weaker feedback, targets for encoding layer after layer.

With x the original inputs of a matrix and x̂ the inputs that it will really see, the row that best keeps the original
output is `W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹`; encode that under `H = E[x̂ x̂ᵀ]`. An output r that the layer still owes to the residual
stream (the error so far, the error of the routed experts) can be asked for on top, by `E[r x̂ᵀ]`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from quantkit.codecs.registry import FORMATS
from quantkit.encoding.api import CPU_ROWS, choose
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Hessian, damp, prepare, tf32
from quantkit.encoding.state import EFFORTS, Effort


@torch.inference_mode()
def encode_values(
    qtype: str,
    weights: torch.Tensor,
    hessians: Sequence[Hessian | None],
    *,
    effort: str | Effort = "normal",
    beta: float = 1.0,
) -> torch.Tensor:
    """What the encoder makes of weights [E, rows, n_in], where they are: float32, one matrix after the other.

    beta: share of the errors that is fed back. Unlike encode_batch, nothing is left to ggml.
    """
    effort = EFFORTS[effort] if isinstance(effort, str) else effort
    fmt, device = FORMATS[qtype], weights.device
    out = torch.empty_like(weights, dtype=torch.float32)
    for i, hessian in enumerate(hessians):
        factor = prepare([hessian], weights.shape[-1], device, full=effort.feedback)
        factor = replace(factor, u=beta * factor.u)
        rows = CPU_ROWS if device.type == "cpu" else weights.shape[1]
        with tf32():
            parts = [
                encode_rows(fmt, part[None].float(), factor, effort, choose(device.type)).q[0]
                for part in weights[i].split(rows)
            ]
        out[i] = torch.cat(parts)
    return out


def cross_moment(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, a], y [n, b], weight [n] -> the weighted mean of x yᵀ, float32 [a, b]. Weights as in second_moment."""
    share = (weight / weight.sum()).float()[:, None]
    return (x.float() * share).T @ y.float()


def retarget(
    weight: torch.Tensor, hessian: Hessian, cross: torch.Tensor | None = None, owed: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [rows, n] that give the wanted outputs from the quantized inputs, damped towards `weight`.

    hessian: of the quantized inputs, full. cross: E[x x̂ᵀ] [n, n], None for x = x̂. owed: E[r x̂ᵀ] [rows, n] or None.
    """
    assert hessian.matrix is not None
    damped = damp(hessian.matrix, hessian.tokens)
    added = torch.diag(damped.diagonal() - hessian.matrix.diagonal())
    right = weight.float() @ ((hessian.matrix if cross is None else cross) + added)
    if owed is not None:
        right = right + owed
    precise = torch.float64 if damped.device.type == "cpu" else torch.float32
    return torch.linalg.solve(damped.to(precise), right.T.to(precise)).T.float().contiguous()
