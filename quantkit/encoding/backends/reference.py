"""The back end in plain torch, on any device: what the compiled ones (numba, Triton) derive from and must agree with.

Within a superblock block by block: every hypothesis (scale code × shift or min) encodes the block's groups of 8 in
turn, each group's target moved by the errors before it (hessian.py), and the cheapest hypothesis stays.
"""

from typing import NamedTuple

import torch

from quantkit.codecs.format import GROUP, SUPERBLOCK, Format
from quantkit.encoding.backends.recorded import Work
from quantkit.encoding.guess import Guess, guess, refresh
from quantkit.encoding.hessian import Factor, blocks, factorize
from quantkit.encoding.search import Choice, best_entry, nearest, quadratic
from quantkit.encoding.state import Effort, State, block_scale, near_mins


class Hypotheses(NamedTuple):
    """Scale and offset codes to try in a block, and the s and o that they stand for: four tensors [..., H]."""

    scale: torch.Tensor
    offset: torch.Tensor
    s: torch.Tensor
    o: torch.Tensor

    def of(self, best: torch.Tensor) -> "Hypotheses":
        """One of them for each block: best [...], its number -> four tensors [...]."""
        return Hypotheses(*(t.gather(-1, best[..., None]).squeeze(-1) for t in self))


class Backend:
    """The inner loops of the encoder. E matrices of R rows and n columns are at work at once, w float32 [E, R, n]."""

    def repeated(self, work: Work, like: list[torch.Tensor]) -> Work:
        """`work`, made ready to be done many times to tensors like these. What it returns may be overwritten by the
        next call, what it takes may not."""
        return work

    def best_entry(
        self, linear: torch.Tensor, square: torch.Tensor, grid: torch.Tensor, bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See search.best_entry."""
        return best_entry(linear, square, grid, bias)

    def guess(self, fmt: Format, x: torch.Tensor, weights: torch.Tensor, tries: int | None) -> Guess:
        """See guess.guess."""
        return guess(fmt, x, weights, tries)

    def plain_pass(self, fmt: Format, w: torch.Tensor, d: torch.Tensor, effort: Effort) -> State:
        """Encode where nothing couples the columns (d [E, n/8, 8, 8]): every block of every row at once."""
        e, r, n = w.shape
        count, per = n // SUPERBLOCK, SUPERBLOCK // fmt.block
        superblocks = w.view(e, r, count, SUPERBLOCK).transpose(1, 2).flatten(0, 1)
        metric = d.view(e * count * per, fmt.block // GROUP, GROUP, GROUP)
        weights = d.diagonal(dim1=-2, dim2=-1).reshape(e * count, SUPERBLOCK)
        first = self.guess(fmt, superblocks, weights, effort.tries)
        tried = hypotheses(fmt, first, first.scale, first.offset, effort.near)  # [E·count, R, blocks, H]

        def by_block(t: torch.Tensor) -> torch.Tensor:  # [E·count, R, blocks, k] -> [E·count·blocks, R, k]
            return t.transpose(1, 2).flatten(0, 1)

        def by_row(t: torch.Tensor) -> torch.Tensor:  # and back, to [E, R, n/block · k]
            return t.view(e, count * per, r, -1).transpose(1, 2).reshape(e, r, -1)

        tried = Hypotheses(*map(by_block, tried))
        x = by_block(superblocks.view(e * count, r, per, fmt.block))
        best, choice = self.encode_span(fmt, x, x, tried, metric, None)
        won = tried.of(best)
        q = won.s[..., None] * choice.value + won.o[..., None]
        d_, dmin = (t.view(e, count, r).transpose(1, 2).contiguous() for t in (first.d, first.dmin))
        codes = won.scale, won.offset, choice.entry, choice.sign, choice.value, q
        return State(fmt, d_, dmin, *map(by_row, codes))

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
        """Encode the 256 columns at `start` with feedback between them: fills their part of state and of error.

        target [E, R, 256]: w of these columns, moved by the errors before them; it is spent. error [E, R, n]: w − q.
        """
        fmt, sb = state.fmt, start // SUPERBLOCK
        groups = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
        weights = groups.diagonal(dim1=-2, dim2=-1).flatten(1)  # [E, 256]
        first = self.guess(fmt, target, weights, effort.tries)
        state.d[..., sb], state.dmin[..., sb] = first.d, first.dmin
        per_block = fmt.block // GROUP
        for b in range(SUPERBLOCK // fmt.block):
            lo, hi = b * fmt.block, (b + 1) * fmt.block
            here = slice(start + lo, start + hi)
            scale, offset = first.scale[..., b, :], first.offset[..., b, :]
            if fmt.grid is None and b:
                scale, offset = refresh(fmt, target[..., lo:hi], weights[:, lo:hi], first.d, first.dmin)
                scale, offset = scale[..., None], offset[..., None]
            tried = hypotheses(fmt, first, scale, offset, effort.near)
            u, d = factor.u[:, here, here], groups[:, b * per_block : (b + 1) * per_block]
            best, choice = self.encode_span(fmt, target[..., lo:hi], w[..., here], tried, d, u)
            store(state, here, choice, tried.of(best))
            fresh = w[..., here] - state.q[..., here]
            error[..., here] = fresh
            if hi < SUPERBLOCK:
                target[..., hi:].baddbmm_(fresh, factor.u[:, here, start + hi : start + SUPERBLOCK])

    def encode_span(
        self,
        fmt: Format,
        target: torch.Tensor,
        weight: torch.Tensor,
        tried: Hypotheses,
        d: torch.Tensor,
        u: torch.Tensor | None,
    ) -> tuple[torch.Tensor, Choice]:
        """Encode neighbouring groups in turn for every hypothesis, and keep the cheapest.

        target, weight: [E, R, span]; tried: [E, R, H]; d: [E, span/8, 8, 8]; u: [E, span, span] or None.
        Returns the number of the winner [E, R] and its codes.
        """
        e, r, span = target.shape
        h = tried.s.shape[-1]
        flat_s, flat_o = tried.s.reshape(e, r * h), tried.o.reshape(e, r * h, 1)
        cost = torch.zeros_like(flat_s)
        errors: list[torch.Tensor] = []
        choices = []
        for g in range(span // GROUP):
            part = slice(g * GROUP, (g + 1) * GROUP)
            x = target[:, :, None, part].expand(e, r, h, GROUP).reshape(e, r * h, GROUP) - flat_o
            if g and u is not None:
                x = x + torch.cat(errors, -1) @ u[:, : g * GROUP, part]
            choice = nearest(fmt, x, flat_s, d[:, g], self.best_entry)
            q = flat_s[..., None] * choice.value
            cost = cost + quadratic(x - q, d[:, g])
            w = weight[:, :, None, part].expand(e, r, h, GROUP).reshape(e, r * h, GROUP)
            errors.append(w - q - flat_o)
            choices.append(choice)
        best = cost.view(e, r, h).min(-1).indices

        def winners(parts: list[torch.Tensor]) -> torch.Tensor:
            t = torch.cat(parts, -1).view(e, r, h, -1)
            return t.gather(2, best[..., None, None].expand(e, r, 1, t.shape[-1])).squeeze(2)

        entries, signs = [c.entry for c in choices], [c.sign[..., None] for c in choices]
        return best, Choice(winners(entries), winners(signs), winners([c.value for c in choices]))

    def descend_groups(self, w: torch.Tensor, factor: Factor, state: State) -> None:
        """Revise every group of 8 columns once, all others fixed; only true decreases of the output error."""
        self._descend(w, factor, state, GROUP)

    def descend_blocks(self, w: torch.Tensor, factor: Factor, state: State) -> None:
        """The same with whole blocks, each with its scale."""
        self._descend(w, factor, state, state.fmt.block)

    def _descend(self, w: torch.Tensor, factor: Factor, state: State, span: int) -> None:
        h, n = factor.h, w.shape[-1]
        local = factorize(blocks(h, span).flatten(0, 1))
        inverse = torch.linalg.inv(local.h).unflatten(0, (len(h), n // span))
        d, u = (t.unflatten(0, (len(h), n // span)) for t in (local.d, local.u))
        for start in range(0, n, SUPERBLOCK):
            part = slice(start, start + SUPERBLOCK)
            gradient = (state.q - w) @ h[:, :, part]
            for lo in range(0, SUPERBLOCK, span):
                here = slice(start + lo, start + lo + span)
                i = here.start // span
                target = state.q[..., here] - gradient[..., lo : lo + span] @ inverse[:, i]
                change = self.revise(state, target, Factor(h[:, here, here], u[:, i], d[:, i]), here)
                gradient += change @ h[:, here, part]

    def revise(self, state: State, target: torch.Tensor, local: Factor, here: slice) -> torch.Tensor:
        """Encode the columns `here` anew towards target, their unconstrained optimum; returns the change of q."""
        fmt, start, span = state.fmt, here.start, here.stop - here.start
        index, sb = start // fmt.block, start // SUPERBLOCK
        old_scale, old_offset = state.scale[..., index], state.offset[..., index]
        scales, offsets = old_scale[..., None], old_offset[..., None]
        if span == fmt.block:
            scales, offsets = neighbours(fmt, old_scale, old_offset)
        s, o = block_scale(fmt, state.d[..., sb], state.dmin[..., sb], scales, offsets)
        tried = Hypotheses(scales, offsets, s, o)
        best, choice = self.encode_span(fmt, target, target, tried, local.d, local.u)
        won = tried.of(best)
        q, old = won.s[..., None] * choice.value + won.o[..., None], state.q[..., here]
        better = quadratic(q - target, local.h) < quadratic(old - target, local.h) * (1 - 1e-6)
        keep = ~better[..., None]
        change = torch.where(keep, torch.zeros_like(q), q - old)
        width, groups = _columns(here, fmt.width), _columns(here, GROUP)
        state.entry[..., width] = torch.where(keep, state.entry[..., width], choice.entry)
        state.sign[..., groups] = torch.where(keep, state.sign[..., groups], choice.sign)
        state.value[..., here] = torch.where(keep, state.value[..., here], choice.value)
        state.q[..., here] = torch.where(keep, old, q)
        state.scale[..., index] = torch.where(better, won.scale, old_scale)
        state.offset[..., index] = torch.where(better, won.offset, old_offset)
        return change

    def gram(self, unit: torch.Tensor, factor: Factor) -> torch.Tensor:
        """What units that scale share [E, R, kinds, n] are to each other under H: symmetric [E, R, K, K], K =
        superblocks × kinds, kinds fastest."""
        e, r, kinds, n = unit.shape
        k_all = n // SUPERBLOCK * kinds
        a = torch.zeros(e, r, k_all, k_all, device=unit.device)
        for k in range(k_all):  # each superblock meets itself and those after it
            self.products(_image(unit[:, :, k % kinds], k // kinds, factor), unit, a, k)
        return a.triu() + a.triu(1).mT

    def solve(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a [E, R, K, K] symmetric positive definite, b [E, R, K] -> x with a x = b."""
        return torch.linalg.solve_ex(a, b)[0]

    def products(self, image: torch.Tensor, unit: torch.Tensor, a: torch.Tensor, k: int) -> None:
        """Fill row k of a [E, R, K, K] from superblock k // kinds on: sums over each superblock of image · unit."""
        kinds = unit.shape[2]
        first = k // kinds * SUPERBLOCK
        for i in range(kinds):
            terms = image * unit[:, :, i, first : first + image.shape[-1]]
            sums = terms.unflatten(-1, (-1, SUPERBLOCK)).sum(-1)
            a[:, :, k, k // kinds * kinds + i :: kinds][..., : sums.shape[-1]] = sums


def _image(unit: torch.Tensor, block: int, factor: Factor) -> torch.Tensor:
    """One superblock of unit [E, R, n], the rest taken as 0, times H: the columns from its own on, [E, R, m]; without
    coupling its own."""
    part = slice(block * SUPERBLOCK, (block + 1) * SUPERBLOCK)
    if factor.coupled:
        return unit[..., part] @ factor.h[:, part, part.start :]
    return unit[..., part] * factor.weights[:, None, part]


def _columns(here: slice, width: int) -> slice:
    """Where the codes of these columns stand, each of `width` of them."""
    return slice(here.start // width, here.stop // width)


def store(state: State, here: slice, choice: Choice, won: Hypotheses) -> None:
    """Write the codes of the columns `here`, one block, into the state."""
    fmt, index = state.fmt, here.start // state.fmt.block
    state.scale[..., index], state.offset[..., index] = won.scale, won.offset
    state.entry[..., _columns(here, fmt.width)] = choice.entry
    state.sign[..., _columns(here, GROUP)] = choice.sign
    state.value[..., here] = choice.value
    state.q[..., here] = won.s[..., None] * choice.value + won.o[..., None]


def around(code: torch.Tensor, near: int, top: int) -> torch.Tensor:
    """Codes within `near` of code [...], clamped to 0 … top − 1: [..., 2 near + 1]."""
    return (code[..., None] + torch.arange(-near, near + 1, device=code.device)).clamp(0, top - 1)


def combine(scales: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of scale codes [..., K] and offset codes [..., M]: two tensors [..., K · M]."""
    shape = (*scales.shape, offsets.shape[-1])
    return scales[..., None].expand(shape).flatten(-2), offsets[..., None, :].expand(shape).flatten(-2)


def hypotheses(fmt: Format, first: Guess, scale: torch.Tensor, offset: torch.Tensor, near: int) -> Hypotheses:
    """What to try in a block under the d and dmin of `first`: scale, offset [E, R, …, K] -> [E, R, …, H].

    Codebook types: these pairs themselves. Others: the neighbours of the first one.
    """
    if fmt.grid is None:
        mins = around(offset[..., 0], near_mins(fmt, near), max(fmt.n_mins, 1))
        scale, offset = combine(around(scale[..., 0], near, len(fmt.multipliers)), mins)
    return Hypotheses(scale, offset, *block_scale(fmt, first.d, first.dmin, scale, offset))


def neighbours(fmt: Format, scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to try instead of the codes [E, R] that a block has."""
    scales = around(scale, 1, len(fmt.multipliers))
    if len(fmt.shifts) > 1:
        return combine(scales, torch.arange(len(fmt.shifts), device=scale.device).expand(*scale.shape, -1))
    return combine(scales, around(offset, near_mins(fmt, 1), max(fmt.n_mins, 1)))
