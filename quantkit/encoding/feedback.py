"""Error feedback: encode the rows of a matrix so that the *output* error under its Hessian is small.

Columns left to right, a superblock of 256 at a time. Within it block by block: every hypothesis (scale code × shift or
min) encodes the block's groups of 8 in turn, each group's target moved by the errors before it (hessian.py), and the
cheapest hypothesis stays. Then all d of a row are refitted jointly and the codes revised by coordinate descent.
"""

from dataclasses import dataclass

import torch

from quantkit.codecs.format import SUPERBLOCK, Format
from quantkit.encoding.guess import block_scale, guess, refresh
from quantkit.encoding.hessian import GROUP, Factor, blocks, factorize
from quantkit.encoding.refit import pull, refit
from quantkit.encoding.search import compiled, kernels, nearest, quadratic, runs_compiled, runs_fused

if compiled is not None:
    from quantkit.encoding.backends import numba_passes as cpu
if kernels is not None:
    from quantkit.encoding.backends import triton_codebooks as fused
    from quantkit.encoding.backends import triton_levels as fused_levels


@dataclass(frozen=True)
class Effort:
    """How long to search.

    feedback: carry errors forward (else each block alone). tries: pairs of scale and shift of a codebook type to try
    in each block, best guesses first, None for all. near: neighbours to try of the scale (Q2_K: and the min) of types
    that round each weight alone. passes: coordinate-descent passes over groups; block_passes: so many of them are
    preceded by one over whole blocks, with neighbouring scales. beta: share of the error that is fed back.
    """

    feedback: bool
    tries: int | None
    near: int
    passes: int
    block_passes: int = 0
    refit: bool = True
    beta: float = 1.0


EFFORTS = {
    "fast": Effort(feedback=False, tries=1, near=0, passes=0, refit=False),
    "normal": Effort(feedback=True, tries=2, near=1, passes=1),
    "best": Effort(feedback=True, tries=None, near=1, passes=3, block_passes=2),
}


@dataclass
class State:
    """Codes in the making of E matrices of R rows; see format.Codes. value: v of each weight; q: decoded weights."""

    d: torch.Tensor  # [E, R, superblocks]
    dmin: torch.Tensor
    scale: torch.Tensor  # int64 [E, R, blocks]
    offset: torch.Tensor
    entry: torch.Tensor  # int32 [E, R, n / width]
    sign: torch.Tensor  # int32 [E, R, n / 8]
    value: torch.Tensor  # [E, R, n]
    q: torch.Tensor

    @staticmethod
    def empty(fmt: Format, w: torch.Tensor) -> "State":
        e, r, n = w.shape

        def zeros(count, dtype=torch.float32):
            return torch.zeros(e, r, count, dtype=dtype, device=w.device)

        blocks_ = n // fmt.block
        return State(
            zeros(n // SUPERBLOCK),
            zeros(n // SUPERBLOCK),
            zeros(blocks_, torch.int64),
            zeros(blocks_, torch.int64),
            zeros(n // fmt.width, torch.int32),
            zeros(n // GROUP, torch.int32),
            zeros(n),
            zeros(n),
        )


def around(code: torch.Tensor, near: int, top: int) -> torch.Tensor:
    """Codes within `near` of code [...], clamped to 0 … top − 1: [..., 2 near + 1]."""
    return (code[..., None] + torch.arange(-near, near + 1, device=code.device)).clamp(0, top - 1)


def combine(scales: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every pair of scale codes [..., K] and offset codes [..., M]: two tensors [..., K · M]."""
    shape = (*scales.shape, offsets.shape[-1])
    return scales[..., None].expand(shape).flatten(-2), offsets[..., None, :].expand(shape).flatten(-2)


def hypotheses(fmt: Format, scale: torch.Tensor, offset: torch.Tensor, near: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes to try in a block. Codebook types: the guessed pairs [E, R, …, K] themselves. Others: the neighbours of
    the first guess -> scale and offset codes [E, R, …, H]."""
    if fmt.grid is not None:
        return scale, offset
    # A finer min than Q2_K's is near enough as it was fitted.
    mins = around(offset[..., 0], near if fmt.n_mins == 16 else 0, max(fmt.n_mins, 1))
    return combine(around(scale[..., 0], near, len(fmt.multipliers)), mins)


def neighbours(fmt: Format, scale: torch.Tensor, offset: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What to try instead of the codes [E, R] that a block has."""
    scales = around(scale, 1, len(fmt.multipliers))
    if len(fmt.shifts) > 1:
        return combine(scales, torch.arange(len(fmt.shifts), device=scale.device).expand(*scale.shape, -1))
    return combine(scales, around(offset, 1 if fmt.n_mins == 16 else 0, max(fmt.n_mins, 1)))


def encode_span(fmt: Format, target, weight, s, o, d, u, beta: float = 1.0):
    """Encode neighbouring groups in turn for every hypothesis, and keep the cheapest.

    target, weight: [E, R, span]; s, o: [E, R, H]; d: [E, span/8, 8, 8]; u: [E, span, span] or None.
    Returns (cost [E, R], best [E, R], entry, sign, value) of the winners.
    """
    e, r, span = target.shape
    h = s.shape[-1]
    flat_s, flat_o = s.reshape(e, r * h), o.reshape(e, r * h, 1)
    cost, errors, entries, signs, values = 0, [], [], [], []
    for g in range(span // GROUP):
        part = slice(g * GROUP, (g + 1) * GROUP)
        x = target[:, :, None, part].expand(e, r, h, GROUP).reshape(e, r * h, GROUP) - flat_o
        if g and u is not None:
            x = x + torch.cat(errors, -1) @ u[:, : g * GROUP, part]
        choice = nearest(fmt, x, flat_s, d[:, g])
        q = flat_s[..., None] * choice.value
        cost = cost + quadratic(x - q, d[:, g])
        w = weight[:, :, None, part].expand(e, r, h, GROUP).reshape(e, r * h, GROUP)
        errors.append((w - q - flat_o) * beta)
        entries.append(choice.entry)
        signs.append(choice.sign[..., None])
        values.append(choice.value)
    cost, best = cost.view(e, r, h).min(-1)

    def winners(parts):
        t = torch.cat(parts, -1).view(e, r, h, -1)
        return t.gather(2, best[..., None, None].expand(e, r, 1, t.shape[-1])).squeeze(2)

    return cost, best, winners(entries), winners(signs), winners(values)


def pick(options: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    return options.gather(-1, best[..., None]).squeeze(-1)


def store(fmt: Format, state: State, start: int, span: int, entry, sign, value, s, o) -> None:
    part = slice(start, start + span)
    state.entry[..., start // fmt.width : (start + span) // fmt.width] = entry
    state.sign[..., start // GROUP : (start + span) // GROUP] = sign
    state.value[..., part] = value
    state.q[..., part] = s[..., None] * value + o[..., None]


def feedback_pass(fmt: Format, w: torch.Tensor, factor: Factor, effort: Effort) -> State:
    """w [E, R, n] -> State, with the errors of earlier columns in later targets."""
    state = State.empty(fmt, w)
    n = w.shape[-1]
    error = torch.empty_like(w)  # beta · (w − q) of the columns that are done
    for start in range(0, n, SUPERBLOCK):
        part = slice(start, start + SUPERBLOCK)
        target = w[..., part].clone(memory_format=torch.contiguous_format)
        if start:
            target.baddbmm_(error[..., :start], factor.u[:, :start, part])
        if runs_fused(w) and effort.beta == 1:
            if fmt.grid is not None:
                _superblock_fused(fmt, state, w, target, error, factor, start, effort)
                continue
            fused_levels.superblock(fmt, state, w, target, factor, start, effort)
        elif runs_compiled(w) and effort.beta == 1:
            cpu.superblock(fmt, state, w, target, factor, start, effort)
        else:
            _superblock(fmt, state, w, target, factor, start, effort)
        error[..., part] = (w[..., part] - state.q[..., part]) * effort.beta
    return state


def _superblock_fused(fmt, state, w, target, error, factor, start, effort) -> None:
    """As _superblock, with a kernel for each block; the block's errors go to `error` [E, R, n]."""
    metric = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP].contiguous()
    first = guess(fmt, target, metric.diagonal(dim1=-2, dim2=-1).flatten(1), effort.tries)
    state.d[..., start // SUPERBLOCK] = first.d
    grid = fused.padded_grid(fmt, w.device)
    prepared = grid, *fused.score_tables(fmt, metric, grid)
    codes = (first.scale + 256 * first.offset).int().contiguous()
    for lo in range(0, SUPERBLOCK, fmt.block):
        before, here = slice(start, start + lo), slice(start + lo, start + lo + fmt.block)
        if lo:
            target[..., lo : lo + fmt.block].baddbmm_(error[..., before], factor.u[:, before, here])
        fused.feedback_block(fmt, state, w, target, factor, metric, prepared, codes, start + lo, lo)
        torch.sub(w[..., here], state.q[..., here], out=error[..., here])


def plain_pass(fmt: Format, w: torch.Tensor, d: torch.Tensor, effort: Effort) -> State:
    """As feedback_pass where nothing couples the columns (d [E, n/8, 8, 8]): every block of every row at once."""
    e, r, n = w.shape
    count, per = n // SUPERBLOCK, SUPERBLOCK // fmt.block
    superblocks = w.view(e, r, count, SUPERBLOCK).transpose(1, 2).flatten(0, 1)
    metric = d.view(e * count * per, fmt.block // GROUP, GROUP, GROUP)
    weights = d.diagonal(dim1=-2, dim2=-1).reshape(e * count, SUPERBLOCK)
    if runs_fused(w) and fmt.grid is None:
        first = fused_levels.guess(fmt, superblocks.mT.contiguous(), weights)
    else:
        first = guess(fmt, superblocks, weights, effort.tries)
    scales, offsets = hypotheses(fmt, first.scale, first.offset, effort.near)  # [E·count, R, blocks, H]
    s, o = block_scale(fmt, first.d, first.dmin, scales, offsets)

    def by_block(t: torch.Tensor) -> torch.Tensor:  # [E·count, R, blocks, k] -> [E·count·blocks, R, k]
        return t.transpose(1, 2).flatten(0, 1)

    def by_row(t: torch.Tensor) -> torch.Tensor:  # and back, to [E, R, n/block · k]
        return t.view(e, count * per, r, -1).transpose(1, 2).reshape(e, r, -1)

    x, s, o = by_block(superblocks.view(e * count, r, per, fmt.block)), by_block(s), by_block(o)
    _, best, entry, sign, value = encode_span(fmt, x, x, s, o, metric, None)
    q = pick(s, best)[..., None] * value + pick(o, best)[..., None]
    scale, offset = pick(by_block(scales), best), pick(by_block(offsets), best)
    d_, dmin = (t.view(e, count, r).transpose(1, 2).contiguous() for t in (first.d, first.dmin))
    return State(d_, dmin, by_row(scale), by_row(offset), by_row(entry), by_row(sign), by_row(value), by_row(q))


def _superblock(fmt, state, w, target, factor, start, effort) -> None:
    groups = factor.d[:, start // GROUP : (start + SUPERBLOCK) // GROUP]
    weights = groups.diagonal(dim1=-2, dim2=-1).flatten(1)  # [E, 256]
    first = guess(fmt, target, weights, effort.tries)
    sb = start // SUPERBLOCK
    state.d[..., sb], state.dmin[..., sb] = first.d, first.dmin
    per_block = fmt.block // GROUP
    for b in range(SUPERBLOCK // fmt.block):
        lo, hi = b * fmt.block, (b + 1) * fmt.block
        here = slice(start + lo, start + hi)
        scale, offset = first.scale[..., b, :], first.offset[..., b, :]
        if fmt.grid is None and b:
            scale, offset = refresh(fmt, target[..., lo:hi], weights[:, lo:hi], first.d, first.dmin)
            scale, offset = scale[..., None], offset[..., None]
        scales, offsets = hypotheses(fmt, scale, offset, effort.near)
        s, o = block_scale(fmt, first.d, first.dmin, scales, offsets)
        u = factor.u[:, here, here]
        d = groups[:, b * per_block : (b + 1) * per_block]
        _, best, *codes = encode_span(fmt, target[..., lo:hi], w[..., here], s, o, d, u, effort.beta)
        index = here.start // fmt.block
        state.scale[..., index], state.offset[..., index] = pick(scales, best), pick(offsets, best)
        store(fmt, state, here.start, fmt.block, *codes, pick(s, best), pick(o, best))
        if hi < SUPERBLOCK:
            error = (w[..., here] - state.q[..., here]) * effort.beta
            target[..., hi:].baddbmm_(error, factor.u[:, here, start + hi : start + SUPERBLOCK])


def fused_descent_pass(fmt: Format, w: torch.Tensor, factor: Factor, state: State) -> None:
    """As descent_pass with spans of 8, with a kernel for every 32 columns."""
    h, grid = factor.h, fused.padded_grid(fmt, w.device)
    metrics = blocks(h)
    inverses = torch.linalg.inv(metrics)
    error, change = state.q - w, w.new_empty(*w.shape[:2], SUPERBLOCK)
    for start in range(0, w.shape[-1], SUPERBLOCK):
        groups = slice(start // GROUP, (start + SUPERBLOCK) // GROUP)
        gradient = error @ h[:, :, start : start + SUPERBLOCK]
        metric, inverse = metrics[:, groups].contiguous(), inverses[:, groups].contiguous()
        prepared = grid, *fused.score_tables(fmt, metric, grid)
        for lo in range(0, SUPERBLOCK, 32):
            before, here = slice(start, start + lo), slice(start + lo, start + lo + 32)
            if lo:
                gradient[..., lo : lo + 32].baddbmm_(change[..., :lo], h[:, before, here])
            fused.descent_block(fmt, state, gradient, change, h, metric, inverse, prepared, start + lo, lo)
        error[..., start : start + SUPERBLOCK] += change


def descent_pass(fmt: Format, w: torch.Tensor, factor: Factor, state: State, span: int) -> None:
    """Revise `span` columns at a time (8, or a whole block with its scale), all others fixed; only true decreases."""
    h, n = factor.h, w.shape[-1]
    local = factorize(blocks(h, span).flatten(0, 1))
    inverse = torch.linalg.inv(local.h).unflatten(0, (len(h), n // span))
    d = local.d.unflatten(0, (len(h), n // span))
    u = local.u.unflatten(0, (len(h), n // span))
    for start in range(0, n, SUPERBLOCK):
        part = slice(start, start + SUPERBLOCK)
        gradient = (state.q - w) @ h[:, :, part]
        for lo in range(0, SUPERBLOCK, span):
            here = slice(start + lo, start + lo + span)
            i = here.start // span
            target = state.q[..., here] - gradient[..., lo : lo + span] @ inverse[:, i]
            change = _revise(fmt, state, target, h[:, here, here], d[:, i], u[:, i], here.start, span)
            gradient += change @ h[:, here, part]


def _revise(fmt, state, target, h, d, u, start, span) -> torch.Tensor:
    """Re-encode one span towards its unconstrained optimum; returns the change of q."""
    here, index, sb = slice(start, start + span), start // fmt.block, start // SUPERBLOCK
    old_scale, old_offset = state.scale[..., index], state.offset[..., index]
    scales, offsets = old_scale[..., None], old_offset[..., None]
    if span == fmt.block:
        scales, offsets = neighbours(fmt, old_scale, old_offset)
    s, o = block_scale(fmt, state.d[..., sb], state.dmin[..., sb], scales, offsets)
    _, best, entry, sign, value = encode_span(fmt, target, target, s, o, d, u)
    s, o = pick(s, best), pick(o, best)
    q = s[..., None] * value + o[..., None]
    old = state.q[..., here]
    better = quadratic(q - target, h) < quadratic(old - target, h) * (1 - 1e-6)
    keep = ~better[..., None]
    width = slice(start // fmt.width, (start + span) // fmt.width)
    groups = slice(start // GROUP, (start + span) // GROUP)
    change = torch.where(keep, torch.zeros_like(q), q - old)
    state.entry[..., width] = torch.where(keep, state.entry[..., width], entry)
    state.sign[..., groups] = torch.where(keep, state.sign[..., groups], sign)
    state.value[..., here] = torch.where(keep, state.value[..., here], value)
    state.q[..., here] = torch.where(keep, old, q)
    state.scale[..., index] = torch.where(better, pick(scales, best), old_scale)
    state.offset[..., index] = torch.where(better, pick(offsets, best), old_offset)
    return change


def encode_rows(fmt: Format, w: torch.Tensor, factor: Factor, effort: Effort) -> State:
    """w float32 [E, R, n], finite -> State."""
    coupled = effort.feedback and factor.u is not None
    if coupled:
        state = feedback_pass(fmt, w, factor, effort)
    elif runs_compiled(w):
        state = State.empty(fmt, w)
        cpu.plain_pass(fmt, state, w, factor.d, effort)
    else:
        state = plain_pass(fmt, w, factor.d, effort)
    pulled = pull(w, factor) if effort.refit else None
    if coupled:
        for i in range(max(effort.passes, effort.block_passes)):
            if pulled is not None:  # before descent: codes chosen under a d that is too small shrink the output
                refit(fmt, pulled, factor, state)
            if i < effort.block_passes:
                descent_pass(fmt, w, factor, state, fmt.block)
            if i < effort.passes:
                group_descent_pass(fmt, w, factor, state)
    if pulled is not None:
        refit(fmt, pulled, factor, state)
    return state


def group_descent_pass(fmt: Format, w: torch.Tensor, factor: Factor, state: State) -> None:
    if runs_fused(w):
        run = fused_descent_pass if fmt.grid is not None else fused_levels.descent_pass
        run(fmt, w, factor, state)
    elif runs_compiled(w):
        cpu.descent_pass(fmt, w, factor, state)
    else:
        descent_pass(fmt, w, factor, state, GROUP)
