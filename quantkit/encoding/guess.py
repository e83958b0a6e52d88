"""First guesses for one superblock: its fp16 d (and dmin) and the scale code of each block, by plain rounding.

Rounding each weight alone ranks scales as well as the codebook does, at a fraction of the cost. All functions take
x [E, N, 256] (targets), weights [E, 256] (diagonal of the metric).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from quantkit.codecs.format import SUPERBLOCK, Format, Rounding, to_fp16

CURVE = np.arange(-10, 9) / 4  # log2 of the sampled scales, relative to the superblock's rms
CANDIDATES = np.arange(-4, 19) / 8  # log2 of the candidates for d · max(multipliers), likewise

Sample = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Rounding], torch.Tensor]
"""sampled, or its twin."""
Fit = Callable[[Format, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""fit_blocks, or its twin."""


@dataclass(frozen=True)
class Guess:
    """d, dmin: float32 [E, N], exact in fp16. scale, offset: int64 [E, N, blocks, K] pairs of codes, the best first."""

    d: torch.Tensor
    dmin: torch.Tensor
    scale: torch.Tensor
    offset: torch.Tensor


def guess(fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int | None) -> Guess:
    """tries: how many pairs of scale and shift of a codebook type to keep for each block; None for all."""
    if fmt.grid is not None:
        return guess_codebook(fmt, x, weights, tries, sampled)
    return guess_levels(fmt, x, weights, fit_blocks)


# -- codebooks ------------------------------------------------------------------------------------------------------


@cache
def codebook_level(fmt: Format) -> float:
    """The rms of a codebook's weights."""
    return math.sqrt(float((fmt.grid**2).mean())) if fmt.grid is not None else 1.0


@cache
def interpolation(multipliers: tuple[float, ...]) -> np.ndarray:
    """[curve points, codes · candidates]: cost at the scale of every (code, candidate d), linear in log2 scale."""
    s = CANDIDATES + np.log2(np.array(multipliers) / max(multipliers))[:, None]
    position = np.clip((s.ravel() - CURVE[0]) / (CURVE[1] - CURVE[0]), 0, len(CURVE) - 1 - 1e-6)
    low = position.astype(int)
    matrix = np.zeros((len(CURVE), s.size), np.float32)
    matrix[low, np.arange(s.size)] = 1 - (position - low)
    matrix[low + 1, np.arange(s.size)] = position - low
    return matrix


def _curves(fmt: Format, x: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, sample: Sample) -> torch.Tensor:
    """Cost of every block at the sampled scales, for each shift of the block: [E, N, blocks, shifts, points]."""
    n_shifts, (e, n, _) = len(fmt.rounding.shifts), x.shape
    cost = sample(x if fmt.signs == "grid" else x.abs(), weights, base, fmt.rounding)
    cost = cost.view(e, n, SUPERBLOCK // fmt.block, -1, n_shifts, len(CURVE))
    if len(fmt.shifts) < n_shifts:  # the shift belongs to the group: its better one counts
        cost = cost.amin(4, keepdim=True)
    return cost.sum(3)


def sampled(x: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """Cost of rounding every `span` weights at the sampled scales, multiples of base [E, N]: [E, N, 256/span, shifts,
    points]."""
    levels, shifts, span = rounding
    step, top = levels[1] - levels[0], len(levels) - 1
    owner = torch.arange(SUPERBLOCK, device=x.device)[:, None] // span
    sums = (owner == torch.arange(SUPERBLOCK // span, device=x.device)) * weights[..., None]  # [E, 256, spans]
    unit = x / (base * step)[..., None]
    out = []
    for shift in shifts:
        for point in CURVE:
            y = (unit * 2.0**-point).sub_((levels[0] + shift) / step)
            error = y.round().clamp_(0, top).sub_(y).square_()
            out.append((error @ sums) * (base * (2.0**point * step)).square()[..., None])
    return torch.stack(out, -1).unflatten(-1, (len(shifts), -1))


def guess_codebook(fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int | None, sample: Sample) -> Guess:
    """`guess` for codebook types, with `sampled` or its twin."""
    rms = ((x.square() * weights[:, None]).sum(-1) / weights.sum(-1)[:, None].clamp_min(1e-30)).sqrt()
    base = (rms / codebook_level(fmt)).clamp_min(1e-20)
    matrix = torch.from_numpy(interpolation(fmt.multipliers)).to(x.device)
    cost = (_curves(fmt, x, weights, base, sample) @ matrix).unflatten(-1, (-1, len(CANDIDATES))).flatten(3, 4)
    best = cost.amin(3).sum(2).argmin(-1)  # cost: [E, N, blocks, shifts · codes, candidates]
    d = to_fp16(base * 2.0 ** (torch.from_numpy(CANDIDATES).to(x)[best]) / max(fmt.multipliers))
    d = torch.where(rms > 0, d, torch.zeros_like(d))
    chosen = cost.gather(4, best[..., None, None, None].expand(*cost.shape[:4], 1)).squeeze(-1)
    pairs = least(chosen, chosen.shape[-1] if tries is None else tries)
    codes = len(fmt.multipliers)
    return Guess(d, torch.zeros_like(d), pairs % codes, pairs // codes)


def least(cost: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k least values along the last dimension, in order."""
    if k > 3:
        return cost.topk(k, dim=-1, largest=False).indices
    cost, out = cost.clone(), []
    for _ in range(k):
        out.append(cost.argmin(-1, keepdim=True))
        cost.scatter_(-1, out[-1], float("inf"))
    return torch.cat(out, -1)


# -- weights rounded alone --------------------------------------------------------------------------------------------


def signed_stretches(fmt: Format) -> tuple[float, ...]:
    """Scales to try, as multiples of a block's largest weight: it lies near the lowest level or near the highest."""
    if len(fmt.levels) < 32:
        return tuple(s / end for end in (fmt.levels[0], fmt.levels[-1]) for s in (0.85, 0.925, 1.0, 1.075))
    return tuple(s / fmt.levels[0] for s in (1.0, 1.04, 1.08, 1.12))  # of 64 levels, the ends hardly differ


def min_stretches(fmt: Format) -> tuple[float, ...]:
    """Steps to try, as multiples of the one that reaches from a block's least weight to its largest."""
    return (0.6, 0.7, 0.8, 0.9, 1.0, 1.1) if len(fmt.levels) == 4 else (0.85, 0.925, 1.0)


def fit_signed(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Least-squares scale of each block [..., block] -> [...]; negative where that serves the longer side better."""
    peak = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best_s, best_gain = torch.zeros_like(peak[..., 0]), torch.zeros_like(peak[..., 0])
    for stretch in signed_stretches(fmt):
        s = peak * stretch
        value = fmt.round_to_levels(x / torch.where(s == 0, torch.ones_like(s), s))[0]
        wq = weights * value
        xq, qq = (wq * x).sum(-1), (wq * value).sum(-1)
        gain = xq.square() / qq.clamp_min(1e-30)
        better = gain > best_gain
        best_gain = torch.where(better, gain, best_gain)
        best_s = torch.where(better, xq / qq.clamp_min(1e-30), best_s)
    return best_s


def fit_mins(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Least-squares scale s ≥ 0 and min m ≥ 0 of each block: x ≈ s v − m."""
    low, high = x.amin(-1).clamp_max(0), x.amax(-1).clamp_min(0)
    top = fmt.levels[-1]
    best = torch.full_like(low, float("inf"))
    best_s, best_m = (high - low) / top, -low
    sw, sx = weights.sum(-1), (weights * x).sum(-1)
    for stretch in min_stretches(fmt):
        s, m = (high - low) / top * stretch, -low * stretch
        for _ in range(2):
            safe = torch.where(s == 0, torch.ones_like(s), s)[..., None]
            value = ((x + m[..., None]) / safe).round().clamp(0, top)
            wq = weights * value
            sq, sqq, sxq = wq.sum(-1), (wq * value).sum(-1), (wq * x).sum(-1)
            det = sw * sqq - sq * sq
            ok = det > 1e-12 * sw * sqq
            s1 = torch.where(ok, (sw * sxq - sq * sx) / det.clamp_min(1e-30), s)
            m1 = (sq * s1 - sx) / sw
            negative = m1 < 0  # then the best without a min
            s = torch.where(negative, sxq / sqq.clamp_min(1e-30), s1).clamp_min(0)
            m = torch.where(negative, torch.zeros_like(m1), m1)
            error = s[..., None] * value - m[..., None] - x
            cost = (weights * error.square()).sum(-1)
            better = cost < best
            best, best_s, best_m = (torch.where(better, a, b) for a, b in ((cost, best), (s, best_s), (m, best_m)))
    return best_s, best_m


def fit_blocks(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and min (0 without mins) of each block: x [E, N, blocks, block], weights [E, 1, blocks, block] -> two
    tensors [E, N, blocks]."""
    if fmt.n_mins:
        return fit_mins(fmt, x, weights)
    s = fit_signed(fmt, x, weights)
    return s, torch.zeros_like(s)


def _codes(value: torch.Tensor, d: torch.Tensor, low: int, high: int) -> torch.Tensor:
    safe = torch.where(d == 0, torch.ones_like(d), d)[..., None]
    return (value / safe).round().clamp(low, high).long()


def guess_levels(fmt: Format, x: torch.Tensor, weights: torch.Tensor, fit: Fit) -> Guess:
    """`guess` for types that round each weight alone, with `fit_blocks` or its twin."""
    e, n, width = x.shape
    xb, wb = x.view(e, n, -1, fmt.block), weights.view(e, 1, width // fmt.block, fmt.block)
    return share(fmt, *fit(fmt, xb, wb), wb.sum(-1))


def share(fmt: Format, s: torch.Tensor, m: torch.Tensor, energy: torch.Tensor) -> Guess:
    """d (and dmin) for scales (and mins) [E, N, blocks] that were fitted to each block alone; energy: Σ weights of each
    block, [E, 1, blocks]."""
    if fmt.n_mins:
        d, scale = _shared(s, len(fmt.multipliers) - 1, energy * s.square().clamp_min(1e-30))
        dmin, offset = _shared(m, fmt.n_mins - 1, energy)
        return Guess(d, dmin, scale[..., None], offset[..., None])
    low, high = int(fmt.multipliers[0]), int(fmt.multipliers[-1])
    peak = s.gather(-1, s.abs().argmax(-1, keepdim=True))[..., 0]
    d = to_fp16(peak / low)  # the longest scale takes the longer side, as in ggml
    code = _codes(s, d, low, high) - low
    return Guess(d, torch.zeros_like(d), code[..., None], torch.zeros_like(code)[..., None])


def _shared(value: torch.Tensor, top: int, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One fp16 step for values [..., blocks] ≥ 0 with codes 0 … top: the least weighted rounding error of a few."""
    peak = value.amax(-1)
    best, best_d = torch.full_like(peak, float("inf")), peak
    for stretch in (0.9, 0.95, 1.0, 1.06, 1.12):
        d = to_fp16(peak / top * stretch)
        cost = (energy * (_codes(value, d, 0, top) * d[..., None] - value).square()).sum(-1)
        better = cost < best
        best, best_d = torch.where(better, cost, best), torch.where(better, d, best_d)
    return best_d, _codes(value, best_d, 0, top)


def refresh(
    fmt: Format, x: torch.Tensor, weights: torch.Tensor, d: torch.Tensor, dmin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of one block [E, N, block] for its current target, d and dmin being fixed; weights [E, block]."""
    w = weights[:, None]
    if fmt.n_mins:
        s, m = fit_mins(fmt, x, w)
        top = len(fmt.multipliers) - 1
        return _codes(s[..., None], d, 0, top)[..., 0], _codes(m[..., None], dmin, 0, fmt.n_mins - 1)[..., 0]
    s = fit_signed(fmt, x, w)
    low, high = int(fmt.multipliers[0]), int(fmt.multipliers[-1])
    code = _codes(s[..., None], d, low, high)[..., 0] - low
    return code, torch.zeros_like(code)
