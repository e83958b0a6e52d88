"""Closed-form scales: all d (and dmin) of a row jointly, under the full Hessian, codes fixed."""

import torch

from quantkit.encoders.format import SUPERBLOCK, Format
from quantkit.encoders.hessian import Factor
from quantkit.encoders.scales import block_scale, to_fp16
from quantkit.encoders.search import compiled, kernels, runs_compiled

if kernels is not None:
    from quantkit.encoders import fused
else:
    fused = None

LOW, HIGH = 0.3, 3.0  # a refitted d outside this range of the old one is a sign of a near-singular system


def units(fmt: Format, state) -> torch.Tensor:
    """The row as a linear function of its scales: q = Σ_k scale_k · unit_k; [E, R, n] or, with mins, [E, R, 2, n]."""
    s, o = block_scale(
        fmt, torch.ones_like(state.d[..., 0]), torch.ones_like(state.d[..., 0]), state.scale, state.offset
    )
    s, o = s.repeat_interleave(fmt.block, -1), o.repeat_interleave(fmt.block, -1)
    if fmt.n_mins:
        return torch.stack([s * state.value, o], 2)
    return (s * state.value + o)[:, :, None]


def normal_equations(w: torch.Tensor, unit: torch.Tensor, factor: Factor) -> tuple[torch.Tensor, torch.Tensor]:
    """A [E, R, K, K] and b [E, R, K] of min (w − Σ x_k unit_k) H (…)ᵀ; K = superblocks × kinds, kinds fastest."""
    e, r, kinds, n = unit.shape
    blocks = n // SUPERBLOCK
    a = torch.empty(e, r, blocks * kinds, blocks * kinds, device=w.device)
    b = torch.empty(e, r, blocks * kinds, device=w.device)
    for k in range(blocks * kinds):
        image = _image(unit[:, :, k % kinds], k // kinds, factor)
        if w.is_cuda and fused is not None:
            fused.products(image, unit, w, a, b, k)
            continue
        if runs_compiled(w):
            for i in range(e):
                compiled.products(*(t[i].numpy() for t in (image, unit, w, a, b)), k)
            continue
        b[:, :, k] = (image * w).sum(-1)
        for i in range(kinds):
            a[:, :, k, i::kinds] = (image * unit[:, :, i]).view(e, r, blocks, SUPERBLOCK).sum(-1)
    return a, b


def _image(unit: torch.Tensor, block: int, factor: Factor) -> torch.Tensor:
    """One superblock of unit [E, R, n], the rest taken as 0, times H: [E, R, n]."""
    part = slice(block * SUPERBLOCK, (block + 1) * SUPERBLOCK)
    if factor.h is not None:
        return unit[..., part] @ factor.h[:, part, :]
    image = torch.zeros_like(unit)
    image[..., part] = unit[..., part] * factor.d.diagonal(dim1=-2, dim2=-1).flatten(1)[:, None, part]
    return image


def refit(fmt: Format, w: torch.Tensor, factor: Factor, state) -> None:
    """Move d and dmin to the joint least-squares optimum wherever that lowers the row's output error after rounding."""
    unit = units(fmt, state).contiguous()
    kinds = unit.shape[2]
    a, b = normal_equations(w, unit, factor)
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
    s, o = (t.flatten(2).repeat_interleave(fmt.block, -1) for t in (s, o))
    state.q = s * state.value + o
