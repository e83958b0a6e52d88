"""The back end of a CPU: the passes over a matrix's rows, around kernels that numba compiles."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

import numpy as np
import torch

from quantkit.codecs.format import GROUP, SUPERBLOCK, Format, Rounding
from quantkit.encoding.backends import numba_codebooks, numba_levels, numba_refit
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.guess import CURVE, Guess, guess_codebook, guess_levels, min_stretches, signed_stretches
from quantkit.encoding.hessian import Factor
from quantkit.encoding.search import unit_upper
from quantkit.encoding.state import Effort, State, near_mins

GROUPS = SUPERBLOCK // GROUP
WHOLE = np.empty((0, 0), np.int16)
LONG = 1024  # entries from which a short list pays
LEAST_ROWS = 16  # for which another thread is worth waking
SHORT_LIST = 32  # entries per vector: costs 0.2 % of the output error at IQ1_S, 0.4 % at IQ2_S


Codes = TypeVar("Codes", numba_codebooks.Chosen, numba_levels.Chosen)


@cache
def _pool(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, "rows")


def by_rows(work: Callable[[slice], object], n_rows: int, step: int = 1) -> None:
    """work(rows) for all of n_rows, in parts that begin at multiples of `step`: one here, the others in
    threads, as many as torch has. Kernels treat each row alone, and drop the GIL."""
    n = max(1, min(n_threads := torch.get_num_threads(), n_rows // LEAST_ROWS))
    each = -(-n_rows // (n * step)) * step
    first, *others = [slice(begin, min(begin + each, n_rows)) for begin in range(0, n_rows, each)] or [slice(0, 0)]
    waiting = [_pool(n_threads).submit(work, rows) for rows in others]
    try:
        work(first)
    finally:  # nobody writes into arrays that their owner has given up
        for future in waiting:
            future.exception()
    for future in waiting:
        future.result()


def rows_of(out: Codes, rows: slice) -> Codes:
    """Some rows of what a kernel fills."""
    return type(out)(*(part[rows] for part in out))


def array(t: torch.Tensor, rows: int | None = None) -> np.ndarray:
    """A contiguous array of t, filled with zeros up to `rows`."""
    if rows is not None and len(t) < rows:
        t = torch.cat([t, t.new_zeros(rows - len(t), *t.shape[1:])])
    return t.contiguous().numpy()


# -- constants of a type ----------------------------------------------------------------------------------------------


@cache
def sampling(rounding: Rounding) -> tuple[numba_codebooks.Sampling, np.ndarray]:
    """What `sampled` takes, and the sampled points as 2^-p: float32 [shifts, points]."""
    step, n_shifts = rounding.levels[1] - rounding.levels[0], len(rounding.shifts)
    zero = (rounding.levels[0] + np.array(rounding.shifts, np.float32))[:, None] / step
    offset = np.repeat(zero, len(CURVE), 1).astype(np.float32)
    points = np.repeat(2.0 ** -CURVE.astype(np.float32)[None], n_shifts, 0)
    return numba_codebooks.Sampling(offset, points, np.float32(len(rounding.levels) - 1), rounding.span), points


@cache
def book(fmt: Format) -> numba_codebooks.Book:
    """A codebook type, all of its entries to be searched."""
    assert fmt.grid is not None
    values = np.unique(fmt.grid)[:3]
    return numba_codebooks.Book(
        grid=np.ascontiguousarray(fmt.grid.reshape(-1, numba_codebooks.TILE, fmt.width).transpose(0, 2, 1)),
        points=fmt.grid,
        near=WHOLE,
        middles=(values[1:] + values[:-1]) / 2,
        multipliers=np.array(fmt.multipliers, np.float32),
        shifts=np.array(fmt.shifts, np.float32),
        signs=numba_codebooks.SIGNS[fmt.signs],
        block=fmt.block,
    )


@cache
def short_book(fmt: Format) -> numba_codebooks.Book:
    """The same, with the entries closest to every vector of three levels, numbered in base 3: int16 [3^8, SHORT_LIST].
    Only of long codebooks of three levels."""
    whole = book(fmt)
    grid = torch.from_numpy(whole.points)
    if len(grid) < LONG or len(grid.unique()) != 3:
        return whole
    distance = torch.cdist(torch.cartesian_prod(*[grid.unique()] * GROUP), grid)
    return whole._replace(near=distance.topk(SHORT_LIST, largest=False).indices.to(torch.int16).numpy())


@cache
def features(fmt: Format) -> torch.Tensor:
    """What a metric's numbers must be multiplied by to give every entry's energy: [64, entries] where signs are in the
    grid (full metric), else [width, entries] (diagonal)."""
    entries = torch.from_numpy(fmt.grid)
    products = (entries[:, :, None] * entries[:, None]).flatten(1) if fmt.signs == "grid" else entries.square()
    return products.T.contiguous()


def bias_of(fmt: Format, metric: torch.Tensor) -> np.ndarray:
    """metric [32, 8, 8] -> energy of every entry in every group: [32, 8/width, tiles, TILE]."""
    terms = metric.flatten(1) if fmt.signs == "grid" else metric.diagonal(dim1=1, dim2=2).reshape(-1, fmt.width)
    return (terms @ features(fmt)).view(GROUPS, GROUP // fmt.width, -1, numba_codebooks.TILE).numpy()


@cache
def kind(fmt: Format) -> numba_levels.Levels:
    """A type that rounds each weight alone."""
    return numba_levels.Levels(
        low=np.float32(fmt.levels[0]),
        high=np.float32(fmt.levels[-1]),
        halves=fmt.half_steps,
        stretches=np.array(min_stretches(fmt) if fmt.n_mins else signed_stretches(fmt), np.float32),
        multipliers=np.array(fmt.multipliers, np.float32),
        n_mins=fmt.n_mins,
        block=fmt.block,
    )


def level_index(fmt: Format, value: np.ndarray) -> np.ndarray:
    """Levels -> their indices."""
    if fmt.half_steps is None:
        return (value - np.float32(fmt.levels[0])).astype(np.int32)
    return np.searchsorted(fmt.levels, value).astype(np.int32)


def padded(rows: int) -> int:
    """Rows that the kernels of types without a codebook take."""
    return -(-rows // numba_levels.LANES) * numba_levels.LANES


# -- first guesses ----------------------------------------------------------------------------------------------------


def _sample(
    x: np.ndarray, weights: np.ndarray, unit: np.ndarray, how: numba_codebooks.Sampling, out: np.ndarray
) -> None:
    by_rows(lambda r: numba_codebooks.sampled(x[r], weights, unit[r], how, out[r]), len(x))


def sampled(x: torch.Tensor, weights: torch.Tensor, base: torch.Tensor, rounding: Rounding) -> torch.Tensor:
    """As guess.sampled."""
    (how, points), (e, n, width) = sampling(rounding), x.shape
    unit = base * (rounding.levels[1] - rounding.levels[0])
    out = torch.empty(e, n, width // rounding.span, *points.shape)
    for i in range(e):
        _sample(array(x[i]), array(weights[i]), (1 / unit[i]).numpy(), how, out[i].numpy())
    return out * unit.square()[..., None, None, None] * torch.from_numpy(points) ** -2


def _fit_rows(fmt: Format, x: np.ndarray, weights: np.ndarray, s: np.ndarray, m: np.ndarray) -> None:
    def work(r: slice) -> None:
        if fmt.n_mins:
            numba_levels.fit_mins(x[r], weights, kind(fmt), s[r], m[r])
        else:
            numba_levels.fit_signed(x[r], weights, kind(fmt), s[r])

    by_rows(work, len(x))


def fit_blocks(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As guess.fit_blocks."""
    s, m = torch.zeros(x.shape[:-1]), torch.zeros(x.shape[:-1])
    for e in range(len(x)):
        _fit_rows(fmt, array(x[e]), array(weights[e, 0]), s[e].numpy(), m[e].numpy())
    return s, m


# -- one superblock of one matrix -------------------------------------------------------------------------------------


def encode_grid(
    fmt: Format, target: torch.Tensor, w: torch.Tensor, first: Guess, metric: torch.Tensor, u: np.ndarray
) -> numba_codebooks.Chosen:
    """Encode 256 columns of a codebook type: target, w [R, 256]; metric [32, 8, 8]; u as in numba_codebooks.Local."""
    rows, count = len(w), SUPERBLOCK // fmt.block
    out = numba_codebooks.Chosen(
        np.zeros((rows, count), np.int32),
        np.zeros((rows, count), np.int32),
        np.empty((rows, SUPERBLOCK // fmt.width), np.int32),
        np.zeros((rows, GROUPS), np.int32),
        np.empty((rows, SUPERBLOCK), np.float32),
        np.empty((rows, SUPERBLOCK), np.float32),
    )
    # Under a diagonal a few entries serve as well as all; where errors are fed back, all are scored.
    alone = not len(u) and torch.equal(metric, torch.diag_embed(metric.diagonal(dim1=-2, dim2=-1)))
    codes = array(torch.stack([first.scale, first.offset], -1).int())
    local = numba_codebooks.Local(array(metric), bias_of(fmt, metric), u)
    here = short_book(fmt) if alone else book(fmt)
    moved, weights, d = array(target), array(w), array(first.d)

    def work(r: slice) -> None:
        numba_codebooks.feedback_grid(moved[r], weights[r], d[r], codes[r], here, local, rows_of(out, r))

    by_rows(work, rows)
    return out


def encode_levels(
    fmt: Format, target: torch.Tensor, w: torch.Tensor, first: Guess, metric: torch.Tensor, u: np.ndarray, near: int
) -> numba_levels.Chosen:
    """The same of a type that rounds each weight alone; rows are filled up to a multiple of LANES."""
    rows = padded(len(w))
    upper, diagonal = unit_upper(metric)
    weights = metric.diagonal(dim1=-2, dim2=-1).flatten()
    local = numba_levels.Local(array(weights), array(upper), array(diagonal.flatten()), u)
    out = numba_levels.Chosen(
        array(first.scale[..., 0].int(), rows),
        array(first.offset[..., 0].int(), rows),
        np.empty((rows, SUPERBLOCK), np.float32),
        np.empty((rows, SUPERBLOCK), np.float32),
    )
    steps = array(first.d, rows), array(first.dmin, rows)
    reach = near, near_mins(fmt, near)
    moved, old = array(target, rows), array(w, rows)

    def work(r: slice) -> None:
        each = steps[0][r], steps[1][r]
        numba_levels.feedback_levels(moved[r], old[r], each, reach, kind(fmt), local, rows_of(out, r))

    by_rows(work, rows, numba_levels.LANES)
    return out


class Window:
    """The codes of one superblock of matrix e in a state."""

    def __init__(self, state: State, e: int, start: int):
        self.fmt = state.fmt
        each = {"scale": self.fmt.block, "offset": self.fmt.block, "entry": self.fmt.width, "sign": GROUP}
        each |= {"value": 1, "q": 1}
        self.codes = {
            name: getattr(state, name)[e, :, start // k : (start + SUPERBLOCK) // k] for name, k in each.items()
        }
        self.d, self.dmin = (t[e, :, start // SUPERBLOCK] for t in (state.d, state.dmin))

    def read(self, name: str, rows: int | None = None) -> np.ndarray:
        """A copy for a kernel: [rows, …]."""
        t = self.codes[name]
        return array(t.int() if name in ("scale", "offset") else t.clone(), rows)

    def write(self, out: numba_codebooks.Chosen | numba_levels.Chosen) -> None:
        """Keep what a kernel has chosen."""
        new = out._asdict()
        if isinstance(out, numba_levels.Chosen):
            new["entry"] = level_index(self.fmt, out.value)
        for name, values in new.items():
            self.codes[name].copy_(torch.from_numpy(values[: len(self.d)]))


def revise_grid(
    window: Window, gradient: torch.Tensor, h: torch.Tensor, metric: torch.Tensor, inverse: torch.Tensor
) -> None:
    """Descend over one superblock of a codebook type.

    gradient [R, 256] of half the cost; h [256, 256], metric and inverse [32, 8, 8]: its blocks and their inverses.
    """
    fmt = window.fmt
    out = numba_codebooks.Chosen(*(window.read(name) for name in numba_codebooks.Chosen._fields))
    local = numba_codebooks.Curvature(array(metric), bias_of(fmt, metric), array(h), array(inverse))
    slope, d = array(gradient), array(window.d)
    by_rows(lambda r: numba_codebooks.descent_grid(slope[r], d[r], book(fmt), local, rows_of(out, r)), len(d))
    window.write(out)


def revise_levels(
    window: Window, gradient: torch.Tensor, h: torch.Tensor, metric: torch.Tensor, inverse: torch.Tensor
) -> None:
    """The same of a type that rounds each weight alone."""
    fmt, rows = window.fmt, padded(len(gradient))
    upper, diagonal = unit_upper(metric)
    out = numba_levels.Chosen(*(window.read(name, rows) for name in numba_levels.Chosen._fields))
    local = numba_levels.Curvature(array(h), array(inverse), array(upper), array(diagonal.flatten()))
    slope, d, dmin = array(gradient, rows), array(window.d, rows), array(window.dmin, rows)

    def work(r: slice) -> None:
        numba_levels.descent_levels(slope[r], (d[r], dmin[r]), kind(fmt), local, rows_of(out, r))

    by_rows(work, rows, numba_levels.LANES)
    window.write(out)


# -- passes -----------------------------------------------------------------------------------------------------------


class NumbaBackend(Backend):
    """Encodes a superblock of all rows of a matrix in one call of a kernel. Matrices are on the CPU."""

    def guess(self, fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int | None) -> Guess:
        """See guess.guess."""
        if fmt.grid is not None:
            return guess_codebook(fmt, x, weights, tries, sampled)
        return guess_levels(fmt, x, weights, fit_blocks)

    def plain_pass(self, fmt: Format, w: torch.Tensor, d: torch.Tensor, effort: Effort) -> State:
        """See reference.Backend; a superblock after the other."""
        state, uncoupled = State.empty(fmt, w), d.new_empty(len(w), 0, 0)
        for start in range(0, w.shape[-1], SUPERBLOCK):
            self._encode(state, w, w[..., start : start + SUPERBLOCK].contiguous(), d, uncoupled, start, effort)
        return state

    def superblock(
        self,
        state: State,
        w: torch.Tensor,
        target: torch.Tensor,
        error: torch.Tensor,
        factor: Factor,
        start: int,
        effort: Effort,
    ) -> None:
        """See reference.Backend."""
        part = slice(start, start + SUPERBLOCK)
        self._encode(state, w, target, factor.d, factor.u[:, part, part], start, effort)
        torch.sub(w[..., part], state.q[..., part], out=error[..., part])

    def _encode(
        self,
        state: State,
        w: torch.Tensor,
        target: torch.Tensor,
        d: torch.Tensor,
        u: torch.Tensor,
        start: int,
        effort: Effort,
    ) -> None:
        """d [E, n/8, 8, 8]; u [E, 256, 256] of these columns, or [E, 0, 0]."""
        fmt = state.fmt
        metric = d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
        first = self.guess(fmt, target, metric.diagonal(dim1=-2, dim2=-1).flatten(1), effort.tries)
        state.d[..., start // SUPERBLOCK], state.dmin[..., start // SUPERBLOCK] = first.d, first.dmin
        for e in range(len(w)):
            window, old = Window(state, e, start), w[e, :, start : start + SUPERBLOCK]
            one = Guess(first.d[e], first.dmin[e], first.scale[e], first.offset[e])
            if fmt.grid is not None:
                window.write(encode_grid(fmt, target[e], old, one, metric[e], array(u[e])))
            else:
                window.write(encode_levels(fmt, target[e], old, one, metric[e], array(u[e]), effort.near))

    def descend_groups(self, w: torch.Tensor, factor: Factor, state: State) -> None:
        """See reference.Backend."""
        revise = revise_levels if state.fmt.grid is None else revise_grid
        for e in range(len(w)):
            h = factor.h[e]
            metrics, inverses = factor.metrics[e], factor.inverses[e]
            error = state.q[e] - w[e]
            for start in range(0, w.shape[-1], SUPERBLOCK):
                part, groups = slice(start, start + SUPERBLOCK), slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
                window = Window(state, e, start)
                revise(window, error @ h[:, part], h[part, part], metrics[groups], inverses[groups])
                error[:, part] = state.q[e, :, part] - w[e, :, part]

    def products(self, image: torch.Tensor, unit: torch.Tensor, a: torch.Tensor, k: int) -> None:
        """See reference.Backend."""
        for e in range(len(unit)):
            _products(image[e].numpy(), unit[e].numpy(), a[e].numpy(), k)


def _products(image: np.ndarray, unit: np.ndarray, a: np.ndarray, k: int) -> None:
    by_rows(lambda r: numba_refit.products(image[r], unit[r], a[r], k), len(image))
