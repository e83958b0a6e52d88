"""The passes over a matrix's rows on the CPU, around the compiled kernels: twins of engine.plain_pass, of what
engine._superblock does, and of engine.descent_pass with spans of 8."""

from functools import cache

import numpy as np
import torch

from quantkit.codecs.codebooks import ggml_grid
from quantkit.codecs.format import SUPERBLOCK, Format
from quantkit.encoding.backends import numba_kernels as compiled
from quantkit.encoding.guess import guess, min_stretches, signed_stretches
from quantkit.encoding.hessian import GROUP, Factor, blocks
from quantkit.encoding.search import half_steps, unit_upper

GROUPS = SUPERBLOCK // GROUP
UNCOUPLED = np.empty((0, 0), np.float32)
WHOLE = np.empty((0, 0), np.int16)
LONG_GRIDS = ("IQ1_S", "IQ2_S")
SHORT_LIST = 32  # entries per vector: costs 0.2 % of the output error at IQ1_S, 0.4 % at IQ2_S
_codebooks: dict[str, tuple[np.ndarray, torch.Tensor]] = {}


def codebook(fmt: Format) -> tuple[np.ndarray, torch.Tensor]:
    """The grid as [tiles, width, TILE], and what a metric's numbers must be multiplied by to give every entry's
    energy: [64, entries] where signs are in the grid (full metric), else [width, entries] (diagonal)."""
    if fmt.qtype not in _codebooks:
        entries = torch.from_numpy(fmt.grid)
        tiles = entries.view(-1, compiled.TILE, fmt.width).transpose(1, 2).contiguous().numpy()
        full = fmt.signs == "grid"
        features = (entries[:, :, None] * entries[:, None]).flatten(1) if full else entries.square()
        _codebooks[fmt.qtype] = tiles, features.T.contiguous()
    return _codebooks[fmt.qtype]


def bias_of(fmt: Format, metric: torch.Tensor) -> np.ndarray:
    """metric [32, 8, 8] -> energy of every entry in every group: [32, 8/width, tiles, TILE]."""
    terms = metric.flatten(1) if fmt.signs == "grid" else metric.diagonal(dim1=1, dim2=2).reshape(-1, fmt.width)
    return (terms @ codebook(fmt)[1]).view(GROUPS, GROUP // fmt.width, -1, compiled.TILE).numpy()


def middles(fmt: Format) -> np.ndarray:
    """What separates the three levels of a codebook of 8 weights."""
    levels = np.unique(fmt.grid)[:3]
    return (levels[1:] + levels[:-1]) / 2


@cache
def short_list(qtype: str) -> np.ndarray:
    """The entries closest to every vector of three levels, numbered in base 3: int16 [3^8, SHORT_LIST]."""
    grid = torch.from_numpy(ggml_grid(qtype))
    distance = torch.cdist(torch.cartesian_prod(*[grid.unique()] * GROUP), grid)
    return distance.topk(SHORT_LIST, largest=False).indices.to(torch.int16).numpy()


def array(t: torch.Tensor, rows: int | None = None) -> np.ndarray:
    """A contiguous array of t, filled with zeros up to `rows`."""
    if rows is not None and len(t) < rows:
        t = torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])])
    return t.contiguous().numpy()


def constants(fmt: Format) -> tuple[np.ndarray, np.ndarray]:
    """Multipliers and shifts."""
    return np.array(fmt.multipliers, np.float32), np.array(fmt.shifts, np.float32)


def padded(fmt: Format, rows: int) -> int:
    return rows if fmt.grid is not None else -(-rows // compiled.LANES) * compiled.LANES


def level_index(fmt: Format, value: np.ndarray) -> np.ndarray:
    """Levels -> their indices."""
    if half_steps(fmt) is None:
        return (value - np.float32(fmt.levels[0])).astype(np.int32)
    return np.searchsorted(fmt.levels, value).astype(np.int32)


def codes_at(fmt: Format, state, e: int, start: int) -> list[tuple[torch.Tensor, slice]]:
    """Scale, offset, entry, sign, value and q of matrix e, each with its slice of a superblock."""
    per = (state.scale, fmt.block), (state.offset, fmt.block), (state.entry, fmt.width), (state.sign, GROUP)
    per += (state.value, 1), (state.q, 1)
    return [(t[e], slice(start // k, (start + SUPERBLOCK) // k)) for t, k in per]


def plain_pass(fmt: Format, state, w: torch.Tensor, d: torch.Tensor, effort) -> None:
    """Nothing couples the columns: fills state superblock by superblock; d [E, n/8, 8, 8]."""
    for start in range(0, w.shape[-1], SUPERBLOCK):
        superblock(fmt, state, w, w[..., start : start + SUPERBLOCK], Factor(None, None, d), start, effort)


def superblock(fmt: Format, state, w: torch.Tensor, target: torch.Tensor, factor: Factor, start: int, effort) -> None:
    """Encode 256 columns of w [E, R, n] for target [E, R, 256]: fills their part of state."""
    part = slice(start, start + SUPERBLOCK)
    metric = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
    weights = metric.diagonal(dim1=-2, dim2=-1).flatten(1)
    target = target.contiguous()
    first = guess(fmt, target, weights, effort.tries)
    state.d[..., start // SUPERBLOCK], state.dmin[..., start // SUPERBLOCK] = first.d, first.dmin
    multipliers, shifts = constants(fmt)
    rows, count = padded(fmt, w.shape[1]), SUPERBLOCK // fmt.block
    for e in range(len(w)):
        u = UNCOUPLED if factor.u is None else array(factor.u[e, part, part])
        x, old = array(target[e].clone() if len(u) else target[e], rows), array(w[e, :, part], rows)
        d, dmin = array(first.d[e], rows), array(first.dmin[e], rows)
        scale, offset = np.zeros((rows, count), np.int32), np.zeros((rows, count), np.int32)
        entry = np.empty((rows, SUPERBLOCK // fmt.width), np.int32)
        sign = np.zeros((rows, GROUPS), np.int32)
        value, q = np.empty((rows, SUPERBLOCK), np.float32), np.empty((rows, SUPERBLOCK), np.float32)
        if fmt.grid is not None:
            # Under a diagonal a few entries serve as well as all; where errors are fed back, all are scored.
            alone = not len(u) and torch.equal(metric[e], torch.diag_embed(weights[e].view(GROUPS, GROUP)))
            near = short_list(fmt.qtype) if alone and fmt.qtype in LONG_GRIDS else WHOLE
            codes = array(torch.stack([first.scale[e], first.offset[e]], -1).int())
            compiled.feedback_grid(
                x,
                old,
                d,
                codes,
                multipliers,
                shifts,
                array(metric[e]),
                u,
                codebook(fmt)[0],
                bias_of(fmt, metric[e]),
                near,
                fmt.grid,
                middles(fmt),
                compiled.SIGNS[fmt.signs],
                fmt.block,
                scale,
                offset,
                entry,
                sign,
                value,
                q,
            )
        else:
            scale[: w.shape[1]], offset[: w.shape[1]] = first.scale[e, ..., 0], first.offset[e, ..., 0]
            upper, diagonal = unit_upper(metric[e])
            levels = np.array([fmt.levels[0], fmt.levels[-1]], np.float32)
            stretches = np.array(min_stretches(fmt) if fmt.n_mins else signed_stretches(fmt), np.float32)
            compiled.feedback_levels(
                x,
                old,
                d,
                dmin,
                multipliers,
                fmt.n_mins,
                levels,
                half_steps(fmt),
                stretches,
                array(weights[e]),
                array(upper),
                array(diagonal.flatten()),
                u,
                effort.near,
                fmt.block,
                scale,
                offset,
                value,
                q,
            )
            entry = level_index(fmt, value)
        keep(fmt, state, e, start, (scale, offset, entry, sign, value, q))


def keep(fmt: Format, state, e: int, start: int, codes) -> None:
    for (t, part), new in zip(codes_at(fmt, state, e, start), codes, strict=True):
        t[:, part] = torch.from_numpy(new[: len(t)])


def descent_pass(fmt: Format, w: torch.Tensor, factor: Factor, state) -> None:
    """As engine.descent_pass with spans of 8."""
    multipliers, shifts = constants(fmt)
    rows = padded(fmt, w.shape[1])
    for e in range(len(w)):
        h = factor.h[e]
        metrics = blocks(h[None])[0]
        inverses = torch.linalg.inv(metrics)
        error = state.q[e] - w[e]
        for start in range(0, w.shape[-1], SUPERBLOCK):
            part, groups = slice(start, start + SUPERBLOCK), slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
            gradient = array(error @ h[:, part], rows)
            d, dmin = (array(t[e, :, start // SUPERBLOCK], rows) for t in (state.d, state.dmin))
            codes = [array(t[:, at], rows) for t, at in codes_at(fmt, state, e, start)]
            scale, offset = (c.astype(np.int32) for c in codes[:2])
            entry, sign, value, q = codes[2:]
            metric, inverse, local = metrics[groups], array(inverses[groups]), array(h[part, part])
            if fmt.grid is not None:
                compiled.descent_grid(
                    gradient,
                    array(state.d[e, :, start // SUPERBLOCK]),
                    multipliers,
                    shifts,
                    local,
                    array(metric),
                    inverse,
                    codebook(fmt)[0],
                    bias_of(fmt, metric),
                    WHOLE,
                    fmt.grid,
                    middles(fmt),
                    compiled.SIGNS[fmt.signs],
                    fmt.block,
                    scale,
                    offset,
                    entry,
                    sign,
                    value,
                    q,
                )
            else:
                upper, diagonal = unit_upper(metric)
                levels = np.array([fmt.levels[0], fmt.levels[-1]], np.float32)
                compiled.descent_levels(
                    gradient,
                    d,
                    dmin,
                    multipliers,
                    levels,
                    half_steps(fmt),
                    local,
                    inverse,
                    array(upper),
                    array(diagonal.flatten()),
                    fmt.block,
                    scale,
                    offset,
                    value,
                    q,
                )
                entry = level_index(fmt, value)
            keep(fmt, state, e, start, (scale, offset, entry, sign, value, q))
            error[:, part] = state.q[e, :, part] - w[e, :, part]
