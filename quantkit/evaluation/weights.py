"""Every tensor of a file decoded and, where the original is at hand, compared with it: is each weight where it belongs?

Divergence over text can miss a damaged expert that the text rarely reaches, and never says which tensor it is. Here
each matrix (an expert, a head) has its own relative error |w' - w| / |w|, judged by what its type usually costs, and
one that stands out is compared with the places its weights may have come from, so that the finding is a name.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
import torch

from quantkit import machine
from quantkit.codecs import types as qtypes
from quantkit.evaluation.structure import layout
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import fit
from quantkit.ggml.quants import dequantize
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.progress import track
from quantkit.tensors import Imatrix, TensorSpec

# Above the typical error: weights are not normal, and error feedback trades plain error for weighted error. Where a
# type's error is large, less room is left to 1, the error of a matrix that is not there at all.
SLACK, COARSE_SLACK, COARSE = 2.0, 1.6, 0.25
EXACT = 1e-3  # for types without rounding of their own (source values are BF16 or FP8 times a float32 scale)
SAMPLE_ROWS = 32  # rows by which a misplaced matrix is recognised
ALIKE = 0.5  # cosine above which two samples are the same weights; unrelated ones are near 0
MOST_WHOLE = 1 << 27  # weights of the largest matrix that is searched row by row (the vocabulary's are larger)
DESCRIBED = 4  # findings spelled out for each tensor


@dataclass(frozen=True)
class Problem:
    """A finding. matrix: expert or head, None for the whole tensor."""

    tensor: str
    matrix: int | None
    what: str

    def __str__(self) -> str:
        kind = "head" if ".attn_" in self.tensor else "expert"
        return f"{self.tensor}{'' if self.matrix is None else f' {kind} {self.matrix}'}: {self.what}"


@dataclass(frozen=True)
class TensorError:
    """error: |w' - w| / |w| of the tensor. weighted: the same with squares weighted by the importance of their input
    column (None without an imatrix). worst: the matrix with the largest error, worst_error."""

    name: str
    qtype: str
    error: float
    weighted: float | None
    worst: int
    worst_error: float


@dataclass
class _Sums:
    """Of one matrix. identity: hash of its bytes."""

    n_bad: int = 0
    square: float = 0.0
    source: float = 0.0
    difference: float = 0.0
    product: float = 0.0
    weighted: float = 0.0
    weighted_source: float = 0.0
    identity: int = 0

    @property
    def error(self) -> float:
        if self.n_bad:
            return math.inf
        return math.sqrt(self.difference / self.source) if self.source else math.inf if self.square else 0.0

    @property
    def cosine(self) -> float:
        return self.product / math.sqrt(self.square * self.source) if self.square and self.source else 0.0


def limit(qtype: str) -> float:
    """Largest relative error of a matrix that passes for an encoding of its source."""
    if qtype == qtypes.TABLE.name:
        return 0.0
    typical = qtypes.QTYPES[qtype].error if qtype in qtypes.QTYPES else 0.5
    return max(EXACT, (SLACK if typical < COARSE else COARSE_SLACK) * typical)


class WeightCheck:
    """`run` visits all tensors once; then `problems`, `errors` (with a checkpoint) and `report()`.

    Memory: a job (an expert, or a slab of 64 MB) of each side for every worker.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        checkpoint: Checkpoint | None = None,
        imatrix: Imatrix | None = None,
        device: str = "cpu",
        workers: int | None = None,
    ) -> None:
        self.file, self.config, self.checkpoint, self.imatrix = file, config, checkpoint, imatrix or {}
        self.device, self.workers = device, workers or machine.threads()
        expected = family.specs(config, layout(file))
        # Tensors of another shape, missing and extra ones are the business of the structure check.
        found = [s for s in expected if s.name in file.tensors and tuple(file.tensors[s.name].shape) == s.shape]
        self.specs = sorted(found, key=self._place)
        self.problems: list[Problem] = []
        self.errors: list[TensorError] = []

    def _place(self, spec: TensorSpec) -> tuple[int, int]:
        """In the file: read from its beginning to its end."""
        tensor = self.file.tensors[spec.name]
        return self.file.files.index(tensor.file), tensor.offset

    def run(self, visited: Callable[[TensorSpec, bool], None] = lambda spec, whole: None) -> Self:
        """Visit every tensor, in the file's order; itself again, with what was found. visited: told of each when its
        bytes have been read, and whether those of its layer all have."""
        last = {spec.layer: spec for spec in self.specs}
        total = sum(spec.n_weights for spec in self.specs) / 1e6
        with track("weights", total, "Mweights") as advance, ThreadPoolExecutor(self.workers) as pool:
            for spec in self.specs:
                jobs = list(family.slices(spec))
                sums = [_Sums() for _ in range(spec.n_matrices)]
                per_matrix = spec.n_rows // spec.n_matrices
                for (start, _), part in zip(jobs, pool.map(lambda job: self._sums(spec, *job), jobs), strict=True):  # noqa: B023
                    _add(sums[start // per_matrix], part)
                self._judge(spec, sums)
                visited(spec, last[spec.layer] is spec)
                advance(spec.n_weights / 1e6)
        return self

    def report(self) -> dict[str, Any]:
        """What certify.json holds under `weights`."""
        kinds = defaultdict(list)
        for error in self.errors:
            kinds[error.qtype].append(error.error)
        return {
            "problems": [str(problem) for problem in self.problems],
            "types": {
                qtype: {"tensors": len(found), "median_error": statistics.median(found), "limit": limit(qtype)}
                for qtype, found in kinds.items()
            },
            "tensors": [_finite(asdict(error)) for error in self.errors],
        }

    def decoded(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_in] of the file."""
        tensor = self.file.tensors[spec.name]
        data = self.file.rows(spec.name, start, stop)
        if tensor.qtype == spec.fixed == qtypes.TABLE.name:
            return torch.from_numpy(np.ascontiguousarray(data).view(np.int32).astype(np.float32)).to(self.device)
        return torch.from_numpy(dequantize(tensor.qtype, data, spec.n_in)).to(self.device)

    def original(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        """float32 [stop - start, n_in] of the checkpoint, within one matrix."""
        assert self.checkpoint is not None
        if spec.fixed == qtypes.TABLE.name:
            ids = self.checkpoint.read_ids(spec.sources[0], start, stop, self.config.n_expert)
            return ids.to(self.device, torch.float32)
        return family.read(self.checkpoint, self.config, spec, start, stop, self.device).reshape(stop - start, -1)

    def _sums(self, spec: TensorSpec, start: int, stop: int) -> _Sums:
        ours = self.decoded(spec, start, stop)
        out = _Sums(n_bad=int((~torch.isfinite(ours)).sum()), square=_square(ours))
        if self.checkpoint is None:
            out.identity = hash(self.file.rows(spec.name, start, stop).tobytes())
            return out
        theirs = self.original(spec, start, stop)
        difference = ours - theirs
        out.source, out.difference = _square(theirs), _square(difference)
        out.product = float((ours * theirs).sum(dtype=torch.float64))
        entry = self.imatrix.get(spec.name)
        if entry is not None:
            per_matrix = spec.n_rows // spec.n_matrices
            weight = fit(entry, spec.n_matrices, spec.n_in, spec.name).mean(start // per_matrix)
            column = torch.from_numpy(np.ascontiguousarray(weight)).to(self.device)
            out.weighted = float((difference.square_() * column).sum(dtype=torch.float64))
            out.weighted_source = float((theirs.square_() * column).sum(dtype=torch.float64))
        return out

    def _judge(self, spec: TensorSpec, sums: list[_Sums]) -> None:
        qtype = self.file.tensors[spec.name].qtype
        found = list(self._findings(spec, sums, limit(qtype)))
        self.problems += found[:DESCRIBED]
        if len(found) > DESCRIBED:
            self.problems.append(Problem(spec.name, None, f"and {len(found) - DESCRIBED} more of its matrices"))
        if self.checkpoint is None:
            return
        whole = _Sums()
        for part in sums:
            _add(whole, part)
        weighted = math.sqrt(whole.weighted / whole.weighted_source) if whole.weighted_source else None
        worst = max(range(len(sums)), key=lambda i: sums[i].error)
        self.errors.append(TensorError(spec.name, qtype, whole.error, weighted, worst, sums[worst].error))

    def _findings(self, spec: TensorSpec, sums: list[_Sums], most: float) -> Iterator[Problem]:
        seen: dict[int, int] = {}
        searched = 0  # where weights came from is looked up for a few matrices: it reads all others of the tensor
        for i, part in enumerate(sums):
            which = i if len(sums) > 1 else None
            if part.n_bad:
                yield Problem(spec.name, which, f"{part.n_bad:,} weights are NaN or infinite")
            elif not part.square and (self.checkpoint is None or part.source):
                if spec.role != "exp_probs_b" or self.checkpoint is not None:
                    yield Problem(spec.name, which, "all zeros")
            elif self.checkpoint is None:
                if which is not None and part.identity in seen:
                    yield Problem(spec.name, which, f"the same bytes as {seen[part.identity]}")
                seen.setdefault(part.identity, i)
            elif part.error > most:
                searched += 1
                yield Problem(spec.name, which, self._diagnosis(spec, i, part, most, searched <= DESCRIBED))

    def _diagnosis(self, spec: TensorSpec, matrix: int, part: _Sums, most: float, search: bool) -> str:
        """Where the weights of a matrix with too large an error may have come from."""
        scale = part.product / part.source if part.source else 0.0
        # An encoding with relative error e that is right but for its scale has this cosine, or more.
        if part.cosine > math.sqrt(max(0.0, 1 - most * most)) - 0.05 and abs(scale - 1) > 0.05:
            return f"scaled by {scale:.3g}"
        if search and part.cosine < ALIKE and (place := self._found_elsewhere(spec, matrix)):
            return place
        return f"relative error {part.error:.3g}, at most {most:.3g} is expected of its type (cosine {part.cosine:.2f})"

    def _found_elsewhere(self, spec: TensorSpec, matrix: int) -> str | None:
        rows = spec.n_rows // spec.n_matrices
        n = min(SAMPLE_ROWS, rows)
        ours = self.decoded(spec, matrix * rows, matrix * rows + n)
        for other in range(spec.n_matrices):
            if other != matrix and _alike(ours, self.original(spec, other * rows, other * rows + n)):
                return f"holds the weights of {other}: wrong order"
        for other_spec in self.specs:
            if other_spec.shape == spec.shape and other_spec.name != spec.name:
                if _alike(ours, self.original(other_spec, matrix * rows, matrix * rows + n)):
                    return f"holds the weights of {other_spec.name}"
        if len(spec.shape) == 1 or rows * spec.n_in > MOST_WHOLE:
            return None
        first = matrix * rows
        whole = torch.cat([self.original(spec, a, b) for a, b in family.slices(spec) if first <= a < first + rows])
        if _alike(ours, whole.T.reshape(rows, -1)[:n]):
            return "stored transposed"
        return _shifted_rows(ours, whole)


def _shifted_rows(ours: torch.Tensor, whole: torch.Tensor) -> str | None:
    """Rows of a sample that are other rows of the source: permuted or shifted."""
    unit = [torch.nn.functional.normalize(x.double(), dim=1) for x in (ours, whole)]
    best = (unit[0] @ unit[1].T).max(1)
    moved = (best.values > ALIKE) & (best.indices != torch.arange(len(ours), device=ours.device))
    if moved.sum() * 2 < len(ours):
        return None
    row = int(moved.nonzero()[0])
    return f"rows in wrong order: row {row} holds row {int(best.indices[row])}"


def _alike(a: torch.Tensor, b: torch.Tensor) -> bool:
    norm = float(a.double().norm() * b.double().norm())
    return norm > 0 and float((a * b).sum(dtype=torch.float64)) / norm > ALIKE


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _square(x: torch.Tensor) -> float:
    return float(x.square().sum(dtype=torch.float64))


def _add(total: _Sums, part: _Sums) -> None:
    for key in ("n_bad", "square", "source", "difference", "product", "weighted", "weighted_source"):
        setattr(total, key, getattr(total, key) + getattr(part, key))
    total.identity = hash((total.identity, part.identity))
