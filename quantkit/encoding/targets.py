"""Targets for encoding layer after layer: what a matrix should give when its inputs went through quantized ones.

With x the original inputs of a matrix and x̂ the inputs that it will really see, the row that best keeps the original
output is `W E[x x̂ᵀ] E[x̂ x̂ᵀ]⁻¹`; encode that under `H = E[x̂ x̂ᵀ]`. An output r that the layer still owes to the residual
stream (the error so far, the error of the routed experts) can be asked for on top, by `E[r x̂ᵀ]`.
"""

import torch

from quantkit.encoding.hessian import Hessian, damp


def cross_moment(x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [n, a], y [n, b], weight [n] -> the weighted mean of x yᵀ, float32 [a, b]. Weights as in second_moment."""
    share = (weight / weight.sum()).float()[:, None]
    return (x.float() * share).T @ y.float()


def retarget(
    weight: torch.Tensor, hessian: Hessian, cross: torch.Tensor | None = None, owed: torch.Tensor | None = None
) -> torch.Tensor:
    """The weights [rows, n] that give the wanted outputs from the quantized inputs, damped towards `weight`.

    hessian: of the quantized inputs. cross: E[x x̂ᵀ] [n, n], None for x = x̂. owed: E[r x̂ᵀ] [rows, n] or None.
    """
    damped = damp(hessian).matrix
    added = torch.diag(damped.diagonal() - hessian.matrix.diagonal())
    right = weight.float() @ ((hessian.matrix if cross is None else cross) + added)
    if owed is not None:
        right = right + owed
    precise = torch.float64 if damped.device.type == "cpu" else torch.float32
    return torch.linalg.solve(damped.to(precise), right.T.to(precise)).T.float().contiguous()
