"""The back end of a CUDA GPU: the passes over all rows of all matrices, around Triton's kernels."""

from functools import partial

import torch

from quantkit.codecs.format import GROUP, SUPERBLOCK, Format, tables
from quantkit.encoding.backends import triton_codebooks, triton_levels, triton_refit, triton_search
from quantkit.encoding.backends.recorded import Recorded, Work
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.guess import Guess, share
from quantkit.encoding.hessian import Factor, blocks
from quantkit.encoding.search import unit_upper
from quantkit.encoding.state import Effort, State, block_scale

SPAN = 32  # columns that one launch of a descent revises


class TritonBackend(Backend):
    """Encodes a block of all rows of all matrices in one launch."""

    def repeated(self, work: Work, like: list[torch.Tensor]) -> Work:
        """See reference.Backend: a CUDA graph, if this file solves the systems of a row: torch waits for them."""
        few = like[0].shape[-1] // SUPERBLOCK * 2 <= triton_refit.MOST_SCALES
        return Recorded(work, like) if like[0].is_cuda and few else work

    def best_entry(
        self, linear: torch.Tensor, square: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See search.best_entry."""
        return triton_search.best_entry(linear, square, grid, bias)

    def guess(self, fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int | None) -> Guess:
        """See guess.guess."""
        if fmt.grid is None:
            return _guess_levels(fmt, x.mT.contiguous(), weights)
        if tries is None:
            return super().guess(fmt, x, weights, tries)
        d, pairs = triton_search.guess(fmt, x, weights, tries)
        return Guess(d, torch.zeros_like(d), (pairs & 255).long(), (pairs >> 8).long())

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
        if state.fmt.grid is not None:
            weights = factor.derived(("weights", start), lambda: _weights(factor, start).contiguous())
            first = self.guess(state.fmt, target, weights, effort.tries)
            _codebook_superblock(state, w, target, error, factor, start, first)
        else:
            _levels_superblock(state, w, target, factor, start, effort.near)
            part = slice(start, start + SUPERBLOCK)
            torch.sub(w[..., part], state.q[..., part], out=error[..., part])

    def descend_groups(self, w: torch.Tensor, factor: Factor, state: State) -> None:
        """See reference.Backend."""
        descend = _descend_levels if state.fmt.grid is None else _descend_codebook
        descend(w, factor, state)

    def gram(self, unit: torch.Tensor, factor: Factor) -> torch.Tensor:
        """See reference.Backend."""
        if factor.coupled:  # sums of 256 and more products: 8 bits of each are enough for d
            unit, factor = unit.bfloat16(), Factor(factor.coarse, factor.u, factor.d)
        return super().gram(unit, factor)

    def solve(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """See reference.Backend."""
        few = b.shape[-1] <= triton_refit.MOST_SCALES
        return triton_refit.solve(a, b) if few else super().solve(a, b)

    def products(self, image: torch.Tensor, unit: torch.Tensor, a: torch.Tensor, k: int) -> None:
        """See reference.Backend."""
        triton_refit.products(image, unit, a, k)


# -- codebooks --------------------------------------------------------------------------------------------------------


def _codebook_superblock(
    state: State, w: torch.Tensor, target: torch.Tensor, error: torch.Tensor, factor: Factor, start: int, first: Guess
) -> None:
    """From the guess `first` on, with a kernel for each block."""
    fmt = state.fmt
    state.d[..., start // SUPERBLOCK] = first.d

    def scores_of() -> triton_codebooks.Scores:
        metric = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP].contiguous()
        return triton_codebooks.scores_of(fmt, metric, metric)  # no inverse is needed

    scores = factor.derived((fmt, "feedback", start), scores_of)
    codes = (first.scale + 256 * first.offset).int().contiguous()
    for lo in range(0, SUPERBLOCK, fmt.block):
        before, here = slice(start, start + lo), slice(start + lo, start + lo + fmt.block)
        if lo:
            target[..., lo : lo + fmt.block].baddbmm_(error[..., before], factor.u[:, before, here])
        triton_codebooks.feedback_block(state, w, target, factor, scores, codes, start + lo)
        torch.sub(w[..., here], state.q[..., here], out=error[..., here])


def _descend_codebook(w: torch.Tensor, factor: Factor, state: State) -> None:
    """With a kernel for every 32 columns."""
    h = factor.h
    error, change = state.q - w, w.new_empty(*w.shape[:2], SUPERBLOCK)
    for start in range(0, w.shape[-1], SUPERBLOCK):
        gradient = error @ h[:, :, start : start + SUPERBLOCK]
        scores = factor.derived((state.fmt, "descent", start), partial(_descent_scores, state.fmt, factor, start))
        for lo in range(0, SUPERBLOCK, SPAN):
            before, here = slice(start, start + lo), slice(start + lo, start + lo + SPAN)
            if lo:
                gradient[..., lo : lo + SPAN].baddbmm_(change[..., :lo], h[:, before, here])
            triton_codebooks.descent_block(state, gradient, change, h, scores, start + lo)
        error[..., start : start + SUPERBLOCK] += change


def _descent_scores(fmt: Format, factor: Factor, start: int) -> triton_codebooks.Scores:
    groups = slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
    metric, inverse = (t[:, groups].contiguous() for t in (factor.metrics, factor.inverses))
    return triton_codebooks.scores_of(fmt, metric, inverse)


def _weights(factor: Factor, start: int) -> torch.Tensor:
    """The metric's diagonal in a superblock, [E, 256]."""
    groups = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
    return groups.diagonal(dim1=-2, dim2=-1).flatten(1)


# -- weights rounded alone --------------------------------------------------------------------------------------------


def _guess_levels(fmt: Format, x: torch.Tensor, weights: torch.Tensor) -> Guess:
    """As guess.guess, but of x [E, 256, N]; weights [E, 256]."""
    return share(fmt, *triton_levels.fit(fmt, x, weights), weights.view(len(weights), 1, -1, fmt.block).sum(-1))


def _levels_superblock(
    state: State, w: torch.Tensor, target: torch.Tensor, factor: Factor, start: int, near: int
) -> None:
    """With a kernel for each block; the superblock in hand is kept as [E, 256, R]."""
    fmt, (e, r, _) = state.fmt, w.shape
    part, count = slice(start, start + SUPERBLOCK), SUPERBLOCK // fmt.block
    metric = factor.derived((fmt.block, "metric", start), partial(_levels_metric, fmt, factor, start))
    target, old = target.mT.contiguous(), w[..., part].mT.contiguous()
    first = _guess_levels(fmt, target, metric.weights)
    columns = triton_levels.Columns(target, old, torch.empty_like(target), torch.empty_like(target))
    codes = torch.empty(2, e, count, r, dtype=torch.int32, device=w.device)
    steps = triton_levels.Steps(codes[0], codes[1], first.d.contiguous(), first.dmin.contiguous())
    for b in range(count):
        triton_levels.feedback_block(fmt, b, near, columns, steps, metric)
        lo, hi = b * fmt.block, (b + 1) * fmt.block
        if hi < SUPERBLOCK:
            rest = factor.u[:, start + lo : start + hi, start + hi : start + SUPERBLOCK]
            target[:, hi:].baddbmm_(rest.mT, columns.error[:, lo:hi])
    here = slice(start // fmt.block, start // fmt.block + count)
    state.d[..., start // SUPERBLOCK], state.dmin[..., start // SUPERBLOCK] = steps.d, steps.dmin
    state.scale[..., here], state.offset[..., here] = steps.scale.mT, steps.offset.mT
    _keep(state, start, columns.value)


def _levels_metric(fmt: Format, factor: Factor, start: int) -> triton_levels.Metric:
    part, groups = slice(start, start + SUPERBLOCK), slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
    upper, diagonal = (t.contiguous() for t in unit_upper(factor.d[:, groups]))
    return triton_levels.Metric(
        _weights(factor, start).contiguous(), upper, diagonal, blocks(factor.u[:, part, part], fmt.block)
    )


def _keep(state: State, start: int, value: torch.Tensor) -> None:
    """Levels of one superblock [E, 256, R], and what follows from them, into the state."""
    fmt, part = state.fmt, slice(start, start + SUPERBLOCK)
    state.value[..., part] = value.mT
    s, o = _scales(state, start)
    v = state.value[..., part].unflatten(-1, (-1, fmt.block))
    state.q[..., part] = (s[..., None] * v + o[..., None]).flatten(-2)
    if fmt.half_steps is None:
        state.entry[..., part] = state.value[..., part] - fmt.levels[0]
    else:
        state.entry[..., part] = torch.bucketize(state.value[..., part].contiguous(), tables(fmt, value.device).levels)


def _scales(state: State, start: int) -> tuple[torch.Tensor, torch.Tensor]:
    """s and o of a superblock's blocks: [E, R, 256 / block]."""
    fmt, sb = state.fmt, start // SUPERBLOCK
    here = slice(start // fmt.block, (start + SUPERBLOCK) // fmt.block)
    return block_scale(fmt, state.d[..., sb], state.dmin[..., sb], state.scale[..., here], state.offset[..., here])


def _descend_levels(w: torch.Tensor, factor: Factor, state: State) -> None:
    """With a kernel for every 32 columns."""
    (e, r, n), h = w.shape, factor.h
    curvatures = factor.derived("curvature", lambda: _curvatures(factor))
    error = state.q - w
    for start in range(0, n, SUPERBLOCK):
        part, curvature = slice(start, start + SUPERBLOCK), curvatures[start // SUPERBLOCK]
        gradient = h[:, part] @ error.mT  # H is symmetric
        value, s = state.value[..., part].mT.contiguous(), _scales(state, start)[0].mT.contiguous()
        descent = triton_levels.Descent(gradient, value, torch.empty(e, SPAN, r, device=w.device), s)
        for i in range(SUPERBLOCK // SPAN):
            triton_levels.descent_part(state.fmt, i, descent, curvature)
            lo, hi = start + i * SPAN, start + (i + 1) * SPAN
            gradient[:, hi - start :].baddbmm_(h[:, lo:hi, hi : part.stop].mT, descent.change)
        _keep(state, start, value)
        torch.sub(state.q[..., part], w[..., part], out=error[..., part])


def _curvatures(factor: Factor) -> list[triton_levels.Curvature]:
    """Of each superblock."""
    tables = factor.inverses, *unit_upper(factor.metrics), blocks(factor.h, SPAN)
    each = (t.split(t.shape[1] * SUPERBLOCK // factor.h.shape[-1], 1) for t in tables)
    return [triton_levels.Curvature(*(t.contiguous() for t in parts)) for parts in zip(*each, strict=True)]
