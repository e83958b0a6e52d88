"""Second moments of a matrix's inputs, and the factor that error feedback needs.

`H = E[x xᵀ]` over calibration tokens measures a row's output error: (w − q) H (w − q)ᵀ. The feedback follows
LDLQ (QuIP, arXiv 2307.13304, equivalent to GPTQ, arXiv 2210.17323) in blocks of 8 columns:
`H = (I + U) D (I + U)ᵀ` with U strictly block-upper and D block-diagonal, so that the error of columns that are
already encoded moves the target of the later ones: `T = W + (W − Q) U`, and the loss is the sum over groups of
`(T_g − Q_g) D_g (T_g − Q_g)ᵀ`.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import torch

from quantkit.codecs.format import GROUP
from quantkit.runtime.products import rounded_up

GRAM_ROWS = 512  # rows whose products are summed together on a CPU

T = TypeVar("T")


@dataclass(frozen=True)
class Hessian:
    """What calibration knows about the inputs of one matrix.

    matrix: float32 [n_in, n_in] mean of x xᵀ, or None.
    diagonal: float32 [n_in] mean of x², used where `matrix` is None.
    tokens: effective number of tokens behind the mean, (Σw)²/Σw²; chooses the damping.
    """

    matrix: torch.Tensor | None = None
    diagonal: torch.Tensor | None = None
    tokens: float = 0.0


@dataclass(frozen=True)
class Factor:
    """Block-UDU factors of the damped Hessians of E matrices, float32.

    h: [E, n, n] damped; [E, 0, 0] if only a diagonal is known (then nothing couples columns, and feedback vanishes).
    u: [E, n, n] strictly block-upper in blocks of 8; empty as h. d: [E, n/8, 8, 8] the blocks of D. What else follows
    from h is kept: encoders ask for it once for every few rows. kept: where back ends keep what they derive, if rows
    come a few at a time and not all at once.
    """

    h: torch.Tensor
    u: torch.Tensor
    d: torch.Tensor
    kept: dict[Hashable, Any] | None = field(default=None, compare=False)

    @property
    def coupled(self) -> bool:
        """Whether an error in one column moves the targets of others."""
        return self.h.shape[-1] > 0

    @property
    def weights(self) -> torch.Tensor:
        """The diagonal of D, [E, n]."""
        return self.d.diagonal(dim1=-2, dim2=-1).flatten(1)

    @cached_property
    def metrics(self) -> torch.Tensor:
        """The blocks on the diagonal of h, [E, n/8, 8, 8]."""
        return blocks(self.h)

    @cached_property
    def inverses(self) -> torch.Tensor:
        """Those of `metrics`."""
        return torch.linalg.inv(self.metrics)

    @cached_property
    def coarse(self) -> torch.Tensor:
        """h in bfloat16."""
        return self.h.bfloat16()

    def derived(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` derives from it, once if it is to be kept."""
        if self.kept is None:
            return make()
        if key not in self.kept:
            self.kept[key] = make()
        return self.kept[key]

    def of(self, part: slice) -> "Factor":
        """Those of some of the matrices."""
        return Factor(self.h[part], self.u[part], self.d[part])

    def to(self, device: torch.device) -> "Factor":
        """The same on a device."""
        return Factor(self.h.to(device), self.u.to(device), self.d.to(device))


def second_moment(x: torch.Tensor, weight: torch.Tensor | None = None) -> Hessian:
    """x [n, d], weight [n] or None (all alike) -> the weighted mean of x xᵀ, float32 (on a GPU of TF32 products).

    Weights to use: 1 / mean(resid²) of the residual stream after the block, so that tokens count alike in the logits,
    times the squared routing weight for the experts of a mixture.
    """
    if len(x) == 0:
        return Hessian()
    x = x.float()
    weight = torch.ones(len(x), device=x.device) if weight is None else weight.float()
    total = float(weight.sum())
    if not total > 0:
        return Hessian()
    xw = x * (weight / total).sqrt()[:, None]
    matrix = gram(xw)
    return Hessian(matrix, matrix.diagonal().clone(), total**2 / float(weight.double().square().sum()))


@contextmanager
def tf32() -> Iterator[None]:
    """Let a GPU's products round what they multiply to 10 bits: of errors with U and H, targets move by 0.1 % of an
    error; of inputs with themselves, they are mostly bfloat16 times a weight."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def gram(x: torch.Tensor) -> torch.Tensor:
    """xᵀ x of float32 [n, d], or of every head of [n, n_head, d] -> [d, d] or [n_head, d, d].

    On a CPU a few rows at a time: MKL shares long sums out to its threads, so the last bits of small matrices would
    depend on how many there are.
    """
    if x.device.type != "cpu":
        with tf32():
            return x.T @ x if x.ndim == 2 else torch.einsum("nhi,nhj->hij", x, x)
    heads = x.transpose(0, 1) if x.ndim == 3 else rounded_up(x)[None]
    out = x.new_zeros(heads.shape[0], x.shape[-1], x.shape[-1])
    for part in heads.split(GRAM_ROWS, dim=1):
        out.baddbmm_(part.mT, part)
    return out if x.ndim == 3 else out[0]


def blend(own: Hessian, shared: Hessian, pseudo_tokens: float) -> Hessian:
    """Shrink an expert's moments to its layer's: the layer's count as `pseudo_tokens` tokens."""
    if own.matrix is None or shared.matrix is None:
        return shared if own.matrix is None else own
    share = pseudo_tokens / (own.tokens + pseudo_tokens)
    matrix = torch.lerp(own.matrix, shared.matrix, share)
    return Hessian(matrix, matrix.diagonal().clone(), own.tokens + min(pseudo_tokens, shared.tokens))


def damping(n_in: int, tokens: float) -> float:
    """λ of `damp` for a mean over so many tokens: what makes H invertible, and what makes it true of other text.

    The second part falls from 1.6, where there are few tokens for each of the n_in dimensions (R1's experts see 0.6 of
    131,072), towards 0; fitted on starved experts (docs/results/encoders.md).
    """
    share = max(tokens, 1.0) / n_in
    return min(max(0.1 / share, 0.01), 1.6) + 1.6 / (1 + (share / 3) ** 1.5)


def unshrinking(gamma: float, n_in: int, tokens: float) -> float:
    """A type's gamma for a matrix whose H was damped: rounding under a rounder metric shrinks more.

    gamma: what undoes the shrinkage without damping. Fitted with `damping`.
    """
    return 1 + (gamma - 1) * (0.93 + 0.9 * damping(n_in, tokens) ** 0.5)


def damp(matrix: torch.Tensor, tokens: float) -> torch.Tensor:
    """matrix [n, n], a mean over so many tokens, plus `λ mean(diag) I + 0.1 diag(H)`, λ by `damping`.

    Few tokens leave directions unseen; the added diagonal keeps feedback from moving error into them.
    """
    rate = damping(len(matrix), tokens)
    diag = matrix.diagonal().clamp_min(0)
    return matrix + torch.diag(rate * diag.mean() + 0.1 * diag)


def blocked_cholesky(a: torch.Tensor, size: int = 256) -> torch.Tensor | None:
    """Lower factors of [E, n, n] by panels, in float32: the work is in batched products. None if one is not definite.

    A GPU solver factors one matrix of 7168² at a time, mostly waiting; 256 experts a layer would take half a minute.
    """
    a, n = a.clone(), a.shape[-1]
    for k in range(0, n, size):
        here, rest = slice(k, k + size), slice(k + size, n)
        diag, info = torch.linalg.cholesky_ex(a[:, here, here])
        if bool((info != 0).any()):
            return None
        a[:, here, here] = diag
        if k + size < n:
            eye = torch.eye(diag.shape[-1], device=a.device).expand_as(diag)
            inverse = torch.linalg.solve_triangular(diag, eye, upper=False)
            panel = a[:, rest, here] @ inverse.mT
            a[:, rest, here] = panel
            a[:, here, rest] = 0
            a[:, rest, rest] -= panel @ panel.mT
    return a


def _flipped_cholesky(h: torch.Tensor) -> torch.Tensor | None:
    """Upper triangular R with R Rᵀ = H, from the Cholesky factor of the reversed matrix; None if not definite."""
    flipped = h.flip(-1, -2)
    if h.is_cuda and h.shape[-1] > 256:
        lower = blocked_cholesky(flipped)
        return None if lower is None else lower.flip(-1, -2)
    lower, info = torch.linalg.cholesky_ex(flipped)
    return None if bool((info != 0).any()) else lower.flip(-1, -2)


def _upper_root(h: torch.Tensor) -> torch.Tensor:
    """R of every matrix in [E, n, n]; damping is doubled until the factorisation succeeds."""
    root, extra = _flipped_cholesky(h), 1e-3
    while root is None:
        mean = h.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)
        root = _flipped_cholesky(h + torch.diag_embed((extra * mean)[:, None].expand(h.shape[:-1])))
        extra *= 2
    return root


def blocks(h: torch.Tensor, size: int = GROUP) -> torch.Tensor:
    """Diagonal blocks of [E, n, n] -> [E, n/size, size, size]."""
    e, n, _ = h.shape
    return h.view(e, n // size, size, n // size, size).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()


def factorize(h: torch.Tensor, size: int = GROUP) -> Factor:
    """h [E, n, n], damped -> Factor, in blocks of `size`. FP64 on the CPU, FP32 on a GPU (where FP64 Cholesky would
    dominate the run)."""
    precise = h.double() if h.device.type == "cpu" else h
    root = _upper_root(precise)
    diag = blocks(root, size)  # upper triangular
    e, n, _ = h.shape
    inverse = torch.linalg.inv(diag)
    # (I + U) = R R_bd⁻¹, block column by block column.
    unit = torch.einsum("enga,egab->engb", root.view(e, n, n // size, size), inverse).reshape(e, n, n)
    unit.view(e, n // size, size, n // size, size).diagonal(dim1=1, dim2=3).zero_()
    return Factor(h.float(), unit.float(), (diag @ diag.mT).float())


def diagonal_factor(weights: torch.Tensor) -> Factor:
    """weights [E, n] >= 0 (an imatrix, or ones) -> a Factor without coupling."""
    e, n = weights.shape
    nothing = weights.new_empty(e, 0, 0, dtype=torch.float32)
    return Factor(nothing, nothing, torch.diag_embed(weights.float().view(e, n // GROUP, GROUP)))


def _usable(t: torch.Tensor) -> bool:
    return bool(torch.isfinite(t).all()) and float(t.diagonal().sum() if t.ndim == 2 else t.sum()) > 0


def _matrix(hessian: Hessian | None) -> torch.Tensor | None:
    """The full matrix, if there is one to go by."""
    return None if hessian is None or hessian.matrix is None or not _usable(hessian.matrix) else hessian.matrix


def _diagonal(hessian: Hessian | None) -> torch.Tensor | None:
    """The diagonal, if there is one to go by."""
    return None if hessian is None or hessian.diagonal is None or not _usable(hessian.diagonal) else hessian.diagonal


def describe(hessian: Hessian | None) -> str:
    """Which knowledge an encoding will use: 'full', 'diagonal' or 'identity'."""
    if _matrix(hessian) is not None:
        return "full"
    return "identity" if _diagonal(hessian) is None else "diagonal"


def prepare(hessians: Sequence[Hessian | None], n_in: int, device: torch.device, full: bool = True) -> Factor:
    """One Factor for E matrices that are encoded together.

    Where some of them have no full matrix, the diagonal (or the identity) stands in, as a diagonal matrix.
    full=False: only the diagonals are used (`--effort fast`).
    """
    matrices = [_matrix(h) for h in hessians]
    if not full or all(m is None for m in matrices):
        rows = [_weights(m, h, n_in) for m, h in zip(matrices, hessians, strict=True)]
        return diagonal_factor(torch.stack([r.to(device) for r in rows]))
    damped = []
    for m, h in zip(matrices, hessians, strict=True):
        whole = torch.diag(_weights(m, h, n_in)) if m is None or h is None else damp(m, h.tokens)
        damped.append(_normalised(whole.to(device)))
    return factorize(torch.stack(damped))


def _normalised(h: torch.Tensor) -> torch.Tensor:
    """Mean diagonal 1: scores of all experts then live in the same float range."""
    return (h / h.diagonal().mean().clamp_min(1e-30)).float()


def _weights(matrix: torch.Tensor | None, hessian: Hessian | None, n_in: int) -> torch.Tensor:
    """A weight for each column: of the matrix, else of the diagonal, else ones; float32 [n_in]."""
    diag = _diagonal(hessian) if matrix is None else matrix.diagonal()
    if diag is None:
        return torch.ones(n_in)
    diag = diag.float().clamp_min(0)
    # A column that calibration never saw still needs some weight, or its codes would be arbitrary.
    return diag / diag.mean() + 0.01
