"""Closed-form scales: all d (and dmin) of a row jointly, under the full Hessian, codes fixed."""

from dataclasses import replace

import torch

from quantkit.codecs.format import SUPERBLOCK, Format, to_fp16
from quantkit.encoding.guess import block_scale
from quantkit.encoding.hessian import Factor
from quantkit.encoding.search import compiled, kernels, runs_compiled, runs_fused

if kernels is not None:
    from quantkit.encoding.backends import triton_codebooks as fused

LOW, HIGH = 0.3, 3.0  # a refitted d outside this range of the old one is a sign of a near-singular system


def units(fmt: Format, state) -> torch.Tensor:
    """The row as a linear function of its scales: q = Σ_k scale_k · unit_k; [E, R, n] or, with mins, [E, R, 2, n]."""
    one = torch.ones_like(state.d[..., 0])
    s, o = block_scale(fmt, one, one, state.scale, state.offset)
    value = state.value.unflatten(-1, (-1, fmt.block))
    if fmt.n_mins:
        return torch.stack([s[..., None] * value, o[..., None].expand_as(value)], 2).flatten(3)
    return torch.addcmul(o[..., None], s[..., None], value).flatten(2)[:, :, None]


def pull(w: torch.Tensor, factor: Factor) -> torch.Tensor:
    """w H, [E, R, n]: the right-hand side before codes are known, the same for every refit of a row."""
    return w * factor.d.diagonal(dim1=-2, dim2=-1).flatten(1)[:, None] if factor.h is None else w @ factor.h


def normal_equations(unit: torch.Tensor, pulled: torch.Tensor, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, R, K, K] and b [E, R, K] of min (w − Σ x_k unit_k) H (…)ᵀ; K = superblocks × kinds, kinds fastest."""
    e, r, kinds, n = unit.shape
    blocks = n // SUPERBLOCK
    b = (unit * pulled[:, :, None]).view(e, r, kinds, blocks, SUPERBLOCK).sum(-1).mT.flatten(2)
    a = torch.zeros(e, r, blocks * kinds, blocks * kinds, device=unit.device)
    if runs_fused(unit) and factor.h is not None:  # sums of 256 and more products: 8 bits of each are enough for d
        unit, factor = unit.bfloat16(), replace(factor, h=factor.h.bfloat16())
    for k in range(blocks * kinds):  # A is symmetric: each superblock meets itself and those after it
        image = _image(unit[:, :, k % kinds], k // kinds, factor)
        if runs_fused(unit):
            fused.products(image, unit, a, k)
        elif runs_compiled(unit):
            for i in range(e):
                compiled.products(image[i].numpy(), unit[i].numpy(), a[i].numpy(), k)
        else:
            first = k // kinds * SUPERBLOCK
            for i in range(kinds):
                terms = image * unit[:, :, i, first : first + image.shape[-1]]
                a[:, :, k, k // kinds * kinds + i :: kinds][..., : terms.shape[-1] // SUPERBLOCK] = terms.unflatten(
                    -1, (-1, SUPERBLOCK)
                ).sum(-1)
    return a.triu() + a.triu(1).mT, b


def _image(unit: torch.Tensor, block: int, factor: Factor) -> torch.Tensor:
    """One superblock of unit [E, R, n], the rest taken as 0, times H: the columns from its own on, [E, R, m]; without
    coupling its own."""
    part = slice(block * SUPERBLOCK, (block + 1) * SUPERBLOCK)
    if factor.h is not None:
        return unit[..., part] @ factor.h[:, part, part.start :]
    return unit[..., part] * factor.d.diagonal(dim1=-2, dim2=-1).flatten(1)[:, None, part]


def refit(fmt: Format, pulled: torch.Tensor, factor: Factor, state) -> None:
    """Move d and dmin to the joint least-squares optimum wherever that lowers the row's output error after rounding.

    pulled: `pull` of the weights.
    """
    unit = units(fmt, state).contiguous()
    kinds = unit.shape[2]
    a, b = normal_equations(unit, pulled, factor)
    old = torch.stack([state.d, state.dmin], -1)[..., :kinds].flatten(2, 3)
    diag = a.diagonal(dim1=-2, dim2=-1)
    ridge = 1e-6 * diag + 1e-4 * diag.mean(-1, keepdim=True) * (diag <= 0) + 1e-30
    # Towards the old scales, so that empty superblocks stay as they are.
    solution = torch.linalg.solve_ex(a + torch.diag_embed(ridge), b + ridge * old)[0]
    ratio = torch.nan_to_num(solution / torch.where(old == 0, torch.ones_like(old), old), nan=1.0).clamp(LOW, HIGH)
    new = to_fp16(old * ratio)

    def cost(x):
        return (x * ((a @ x[..., None])[..., 0] - 2 * b)).sum(-1)

    new = torch.where((cost(new) < cost(old))[..., None], new, old).unflatten(-1, (-1, kinds))
    state.d = new[..., 0].contiguous()
    if kinds == 2:
        state.dmin = new[..., 1].contiguous()
    redecode(fmt, state)


def redecode(fmt: Format, state) -> None:
    per = SUPERBLOCK // fmt.block
    s, o = block_scale(
        fmt, state.d, state.dmin, state.scale.unflatten(-1, (-1, per)), state.offset.unflatten(-1, (-1, per))
    )
    value = state.value.unflatten(-1, (-1, per, fmt.block))
    state.q = torch.addcmul(o[..., None], s[..., None], value).flatten(2)
