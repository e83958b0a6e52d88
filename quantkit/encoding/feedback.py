"""Error feedback: encode the rows of a matrix so that the *output* error under its Hessian is small.

Columns left to right, a superblock of 256 at a time, each with a target that the errors before it have moved. Then all
d of a row are refitted jointly and the codes revised by coordinate descent. The loops inside are a back end's.
"""

import torch

from quantkit.codecs.format import SUPERBLOCK, Format
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.hessian import Factor
from quantkit.encoding.refit import pull, refit
from quantkit.encoding.state import Effort, State


def encode_rows(fmt: Format, w: torch.Tensor, factor: Factor, effort: Effort, backend: Backend) -> State:
    """w float32 [E, R, n], finite -> State."""
    coupled = effort.feedback and factor.coupled
    if coupled:
        state = feedback_pass(fmt, w, factor, effort, backend)
    else:
        state = backend.plain_pass(fmt, w, factor.d, effort)
    pulled = pull(w, factor) if effort.refit else None
    if coupled:
        for i in range(max(effort.passes, effort.block_passes)):
            if pulled is not None:  # before descent: codes chosen under a d that is too small shrink the output
                refit(pulled, factor, state, backend)
            if i < effort.block_passes:
                backend.descend_blocks(w, factor, state)
            if i < effort.passes:
                backend.descend_groups(w, factor, state)
    if pulled is not None:
        refit(pulled, factor, state, backend)
    return state


def feedback_pass(fmt: Format, w: torch.Tensor, factor: Factor, effort: Effort, backend: Backend) -> State:
    """w [E, R, n] -> State, with the errors of earlier columns in later targets."""
    state = State.empty(fmt, w)
    error = torch.empty_like(w)  # w − q of the columns that are done
    for start in range(0, w.shape[-1], SUPERBLOCK):
        part = slice(start, start + SUPERBLOCK)
        target = w[..., part].clone(memory_format=torch.contiguous_format)
        if start:
            target.baddbmm_(error[..., :start], factor.u[:, :start, part])
        backend.superblock(state, w, target, error, factor, start, effort)
    return state
