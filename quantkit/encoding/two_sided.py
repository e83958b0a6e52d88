"""Two-sided encoding: not only a row's inputs have a metric, its output does too.

The loss of the whole model moves by about ½ tr(H_O Δ H_I Δᵀ), Δ the error of a matrix, H_I of its inputs as in
`hessian`, H_O of its outputs (YAQA, arXiv 2505.22988; where it comes from: formats/gradients.py). So what holds of
columns holds of rows: `H_O = (I + U) D (I + U)ᵀ` in blocks of rows, the most important first, and the error of blocks
that are encoded moves the target of the later ones, `T_k = W_k + Σ_{j<k} U_jkᵀ (W_j − Q_j)`. Each block is encoded
under H_I as ever. Then rows are revised block by block, all others fixed, each towards its optimum.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from quantkit import machine
from quantkit.codecs.types import row_bytes
from quantkit.encoding.api import GPU_SHARE, Method, finite, pack
from quantkit.encoding.backends.recorded import Work
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Factor, Hessian, blocks, factorize, prepare, tf32
from quantkit.encoding.refit import pull, refit
from quantkit.encoding.state import EFFORTS, Effort, State
from quantkit.errors import QuantkitError

PACK_ROWS = 512  # that are packed together: it takes several times what they have
GPU_BYTES = 32  # per weight: all of a matrix's codes, values and errors
OUTPUT_BYTES = 10  # per element of H_O: damped, and its factor
MANY_ROWS = 1024
FIRST = replace(EFFORTS["normal"], tries=16)  # of a block: all pairs of most types
INPUT_BYTES = 36  # per element of H_I, likewise, and what encoders keep of it


@dataclass(frozen=True)
class TwoSided:
    """block: rows that are encoded at once; passes: over all rows again, once they are encoded. None: as many as suit
    the matrix. damping: added to H_O, in parts of its diagonal and of the diagonal's mean. own: an expert's own part in
    its H_O, the rest being its layer's mean. effort: of a block's first encoding."""

    block: int | None = None
    damping: float = 0.3
    passes: int | None = None
    own: float = 0.5
    effort: str | Effort = FIRST

    def blocks(self, n_rows: int) -> int:
        """Rows of a block; 0 if these rows do not divide into blocks.

        A GPU takes as long for 64 rows of an expert as for 16. Blocks of R1's 4,096 and 7,168 rows are small at 64 too:
        with 6 passes they leave the error of blocks of 16 with 3 (docs/results/encoders.md).
        """
        sizes = [self.block] if self.block else [64, 32, 16, 8] if n_rows > MANY_ROWS else [16, 8]
        return next((size for size in sizes if n_rows % size == 0), 0)

    def passes_over(self, n_rows: int) -> int:
        """How often all rows are revised."""
        return self.passes if self.passes is not None else 6 if self.blocks(n_rows) == 64 else 3


@dataclass(frozen=True)
class RowFactor:
    """How the rows of E matrices are gone through.

    order: int64 [E, R], the rows by importance. factor: of H_O, damped, in that order and in blocks of rows. inverse:
    [E, R/block, block, block] of the blocks on H_O's diagonal.
    """

    order: torch.Tensor
    factor: Factor
    inverse: torch.Tensor

    @property
    def block(self) -> int:
        """Rows that are encoded at once."""
        return self.inverse.shape[-1]

    @property
    def parts(self) -> list[slice]:
        """The blocks of rows, the most important first."""
        return [slice(k, k + self.block) for k in range(0, self.order.shape[1], self.block)]


def row_factor(outputs: Sequence[torch.Tensor] | torch.Tensor, how: TwoSided, device: torch.device) -> RowFactor:
    """Of H_O of each matrix, float32 [R, R]; one after the other, so that little more than the result is in memory."""
    e, r = len(outputs), outputs[0].shape[-1]
    block = how.blocks(r)
    shape = (e, r // block, block, block)
    h, u = (torch.empty(e, r, r, device=device) for _ in range(2))
    d, inverse = (torch.empty(shape, device=device) for _ in range(2))
    order = torch.empty(e, r, dtype=torch.int64, device=device)
    for i in range(e):
        damped = _damped(outputs[i].to(device).float(), how.damping)
        order[i] = damped.diagonal().argsort(stable=True, descending=True)
        one = factorize(damped[order[i]][:, order[i]][None], block)
        h[i], u[i], d[i], inverse[i] = one.h[0], one.u[0], one.d[0], torch.linalg.inv(blocks(one.h, block))[0]
    return RowFactor(order, Factor(h, u, d), inverse)


def _damped(h: torch.Tensor, damping: float) -> torch.Tensor:
    """h [R, R] with so much of its diagonal, and of that one's mean, added to the diagonal; then of mean diagonal 1."""
    diag = h.diagonal()
    mean = diag.mean().clamp_min(1e-30)
    return (h + torch.diag(damping * (mean + diag))) / ((1 + 2 * damping) * mean)


def encode_two_sided(
    method: Method,
    weights: torch.Tensor,
    inputs: Sequence[Hessian | None] | Factor,
    outputs: Sequence[torch.Tensor] | torch.Tensor,
    how: TwoSided = TwoSided(),
) -> np.ndarray:
    """Encode E matrices of one shape: weights [E, R, n] -> uint8 [E, R, row_bytes].

    inputs: a Hessian for each matrix, or a Factor, as in `api.encode_batch`. outputs: H_O of each, float32 [R, R], of
    any scale; to be shrunk already (`outputs.ExpertOutputs`). Matrices are tiled, so memory on a GPU stays bounded.
    QuantkitError if the rows do not divide into blocks.
    """
    e, r, n = weights.shape
    if not how.blocks(r):
        raise QuantkitError(f"{r} rows do not divide into blocks of {how.block or 8}")
    out = np.empty((e, r, row_bytes(method.qtype, n)), np.uint8)
    tile = _tile(method.device, (e, r, n), isinstance(inputs, Factor))
    for first in range(0, e, tile):
        part = slice(first, first + tile)
        with torch.inference_mode():
            if isinstance(inputs, Factor):
                factor = inputs.of(part).to(method.device)
            else:
                factor = prepare(inputs[part], n, method.device, full=method.effort.feedback)
            factor = replace(factor, kept={})
            rows = row_factor(outputs[part], how, method.device)
            with tf32():
                w = finite(weights[part].to(method.device))
                w = w.gather(1, rows.order[:, :, None].expand_as(w))
                state = method.finished(encode_row_blocks(method, w, factor, rows, how.passes_over(r)), part)
            packed = np.concatenate([pack(state.rows(slice(i, i + PACK_ROWS))) for i in range(0, r, PACK_ROWS)], 1)
        for i, order in enumerate(rows.order.cpu().numpy()):
            out[first + i, order] = packed[i]
    return out


def _tile(device: torch.device, shape: tuple[int, int, int], factored: bool) -> int:
    """Matrices that are encoded at once: powers of two on a GPU, as in `api`."""
    e, r, n = shape
    if device.type == "cpu":
        return 1
    each = GPU_BYTES * r * n + OUTPUT_BYTES * r * r + (0 if factored else INPUT_BYTES * n * n)
    most = max(1, int(machine.free_vram(device) * GPU_SHARE) // each)
    return e if e <= most else 1 << (most.bit_length() - 1)


def encode_row_blocks(method: Method, w: torch.Tensor, inputs: Factor, rows: RowFactor, passes: int) -> State:
    """w [E, R, n], finite, in the order of `rows` -> their State, without gamma."""
    first, again = _first(method, w[:, : rows.block], inputs), None
    whole, error = State.empty(method.fmt, w), torch.empty_like(w)  # w − q of the rows that are done
    for here in rows.parts:
        target = w[:, here]
        if here.start:
            target = torch.baddbmm(target, rows.factor.u[:, : here.start, here].mT, error[:, : here.start])
        _put(whole, here, first([target.contiguous()]))
        torch.sub(w[:, here], whole.q[:, here], out=error[:, here])
    for _ in range(passes):
        for i, here in enumerate(rows.parts):  # towards W_k + H_kk⁻¹ Σ_{j≠k} H_kj (W_j − Q_j), all others fixed
            # Σ over all j, k itself too, moves Q_k instead of W_k.
            target = whole.q[:, here] + rows.inverse[:, i] @ (rows.factor.h[:, here] @ error)
            state = [target, *(t.contiguous() for t in whole.rows(here).tensors)]
            again = again or _again(method, state, inputs)
            _put(whole, here, again(state))
            torch.sub(w[:, here], whole.q[:, here], out=error[:, here])
    return whole


def _put(whole: State, here: slice, tensors: list[torch.Tensor]) -> None:
    for t, part in zip(whole.rows(here).tensors, tensors, strict=True):
        t.copy_(part)


def _first(method: Method, like: torch.Tensor, inputs: Factor) -> Work:
    """Encodes a block of rows: [target] -> the tensors of its State."""

    def encode(taken: list[torch.Tensor]) -> list[torch.Tensor]:
        return encode_rows(method.fmt, taken[0], inputs, method.effort, method.backend).tensors

    waits = method.effort.tries is None or method.effort.block_passes  # searches by torch's operations, not by kernels
    return encode if waits else method.backend.repeated(encode, [like])


def _again(method: Method, like: list[torch.Tensor], inputs: Factor) -> Work:
    """Revises a block of rows once: [target, the tensors of its State] -> those of the new one."""
    backend = method.backend

    def revise(taken: list[torch.Tensor]) -> list[torch.Tensor]:
        target, state = taken[0], State(method.fmt, *taken[1:])
        if inputs.coupled:
            backend.descend_groups(target, inputs, state)
        if method.effort.refit:
            refit(pull(target, inputs), inputs, state, backend)
        return state.tensors

    return backend.repeated(revise, like)
