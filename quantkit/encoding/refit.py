"""Closed-form scales: all d (and dmin) of a row jointly, under the full Hessian, codes fixed."""

from typing import Protocol

import torch

from quantkit.codecs.format import SUPERBLOCK, to_fp16
from quantkit.encoding.hessian import Factor
from quantkit.encoding.state import State, block_scale

LOW, HIGH = 0.3, 3.0  # a refitted d outside this range of the old one is a sign of a near-singular system


class Algebra(Protocol):
    """What a back end does of a refit: `reference.Backend` says how."""

    def gram(self, unit: torch.Tensor, factor: Factor) -> torch.Tensor:
        """unit [E, R, kinds, n] -> [E, R, K, K]."""

    def solve(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a [E, R, K, K], b [E, R, K] -> [E, R, K]."""


def units(state: State) -> torch.Tensor:
    """The row as a linear function of its scales, q = Σ_k scale_k · unit_k: [E, R, kinds, n], of d and, with mins, of
    dmin."""
    fmt, one = state.fmt, torch.ones_like(state.d[..., 0])
    s, o = block_scale(fmt, one, one, state.scale, state.offset)
    value = state.value.unflatten(-1, (-1, fmt.block))
    if fmt.n_mins:
        return torch.stack([s[..., None] * value, o[..., None].expand_as(value)], 2).flatten(3)
    return torch.addcmul(o[..., None], s[..., None], value).flatten(2)[:, :, None]


def pull(w: torch.Tensor, factor: Factor) -> torch.Tensor:
    """w H, [E, R, n]: the right-hand side before codes are known, the same for every refit of a row."""
    return w @ factor.h if factor.coupled else w * factor.weights[:, None]


def normal_equations(
    unit: torch.Tensor, pulled: torch.Tensor, factor: Factor, backend: Algebra
) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, R, K, K] and b [E, R, K] of min (w − Σ x_k unit_k) H (…)ᵀ; K = superblocks × kinds, kinds fastest."""
    e, r, kinds, n = unit.shape
    b = (unit * pulled[:, :, None]).view(e, r, kinds, n // SUPERBLOCK, SUPERBLOCK).sum(-1).mT.flatten(2)
    return backend.gram(unit, factor), b


def refit(pulled: torch.Tensor, factor: Factor, state: State, backend: Algebra) -> None:
    """Move d and dmin to the joint least-squares optimum wherever that lowers the row's output error after rounding.

    pulled: `pull` of the weights.
    """
    unit = units(state).contiguous()
    kinds = unit.shape[2]
    a, b = normal_equations(unit, pulled, factor, backend)
    old = torch.stack([state.d, state.dmin], -1)[..., :kinds].flatten(2, 3)
    diag = a.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diag + 1e-4 * diag.mean(-1, keepdim=True) * (diag <= 0) + 1e-30
    # Towards the old scales, so that empty superblocks stay as they are.
    solution = backend.solve(a + torch.diag_embed(ridge), b + ridge * old)
    ratio = torch.nan_to_num(solution / torch.where(old == 0, torch.ones_like(old), old), nan=1.0).clamp(LOW, HIGH)
    new = to_fp16(old * ratio)

    def cost(x: torch.Tensor) -> torch.Tensor:
        return (x * ((a @ x[..., None])[..., 0] - 2 * b)).sum(-1)

    new = torch.where((cost(new) < cost(old))[..., None], new, old).unflatten(-1, (-1, kinds))
    state.d = new[..., 0].contiguous()
    if kinds == 2:
        state.dmin = new[..., 1].contiguous()
    state.decode()
