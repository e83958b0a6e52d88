"""What recovery has moved so far, and its momentum: files on disk, a pair for each layer, replaced whole.

delta-NNN   by how much each tensor of layer NNN moved: a matrix in its standard deviations, a norm or the scales of a
            coarse matrix in their logarithms
moment-NNN  Adam's momentum, and its mean squares: of a matrix only the rows' and the columns', whose product stands for
            them (Adafactor, arXiv 1804.04235)
best-NNN    the deltas at the step that did best so far: hard links
*.next      what a step makes of them, until the layer below knows its gradient

The last NNN stands for the output norm and the output matrix. A tensor that never moved has no file.
"""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit import ranks
from quantkit.codecs.format import SUPERBLOCK
from quantkit.formats import sealed
from quantkit.formats.sealed import Writer, writing
from quantkit.formats.whole_file import rename
from quantkit.tensors import TensorSpec

TILE = 16 << 20  # weights that are updated at once
ROWS, COLUMNS = ".rows", ".columns"  # after a tensor's name, beside its momentum: mean squares

ByLayer = Mapping[int, Sequence[TensorSpec]]
"""Tensors that move, by layer; those outside the layers under the number of layers."""


@dataclass(frozen=True)
class Update:
    """number: of the step, from 1. rate: in units of what moves. betas: of the momentum, and of the mean squares."""

    number: int
    rate: float
    betas: tuple[float, float]


class Values:
    """dtype: of the files: float32 while all of it is small, else bfloat16 (deltas stay below a tenth of a standard
    deviation, so their rounding is below that of any type the weights are stored in). scales: tensors that have a delta
    for each superblock."""

    def __init__(self, folder: Path, specs: ByLayer, dtype: torch.dtype, scales: Collection[str] = ()):
        self.folder, self.specs, self.dtype, self.scales = folder, specs, dtype, scales
        self.layer_of = {spec.name: layer for layer, some in specs.items() for spec in some}
        self.prefix = "delta"

    def delta(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor | None:
        """Rows of a tensor, [stop - start, n_in], or n_in / 256, on the CPU; None if it has not moved."""
        return _rows(self._path(self.prefix, self.layer_of[spec.name]), spec.name, start, stop)

    def update(self, layer: int, gradients: Mapping[str, torch.Tensor], how: Update) -> None:
        """A step of Adam (arXiv 1412.6980), its mean squares factored, into the files of the next step. gradients: name
        -> float32, with respect to the delta but for a positive factor. Ranks share the tensors."""
        specs = self.specs.get(layer, ())
        if not specs:
            return
        shapes = {spec.name: (self.dtype, (spec.n_rows, self._columns(spec))) for spec in specs}
        squares = {spec.name + ROWS: (torch.float32, (spec.n_rows, 1)) for spec in specs}
        squares |= {spec.name + COLUMNS: (torch.float32, (1, self._columns(spec))) for spec in specs}
        paths = [self._path(kind, layer) for kind in ("delta", "moment")]
        with writing(_next(paths[0]), shapes) as deltas, writing(_next(paths[1]), shapes | squares) as moments:
            for spec in specs[ranks.index() :: ranks.count()]:
                self._update(spec, gradients[spec.name], paths, (deltas, moments), how)

    def _update(
        self,
        spec: TensorSpec,
        gradient: torch.Tensor,
        paths: list[Path],
        out: tuple[Writer, Writer],
        how: Update,
    ) -> None:
        flat, step = gradient.reshape(spec.n_rows, -1), max(1, TILE // self._columns(spec))
        squares = self._squares(spec, flat, step, paths[1], how)
        for name, t in zip((ROWS, COLUMNS), squares, strict=True):
            out[1].write(spec.name + name, t)
        unbiased, rest = (1 - beta**how.number for beta in how.betas)
        by_row = squares[0] / (squares[0].mean().clamp_min(1e-38) * rest)
        for start in range(0, spec.n_rows, step):
            g = flat[start : start + step]
            old = [_rows(path, spec.name, start, start + len(g)) for path in paths]
            delta, m = (torch.zeros_like(g) if t is None else t.to(g.device, torch.float32) for t in old)
            m.lerp_(g, 1 - how.betas[0])
            scale = (by_row[start : start + step] * squares[1]).sqrt_().add_(1e-30)
            delta -= (how.rate / unbiased) * m / scale
            out[0].write(spec.name, delta, start)
            out[1].write(spec.name, m, start)

    def _squares(
        self, spec: TensorSpec, flat: torch.Tensor, step: int, path: Path, how: Update
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Running means of the squared gradient [n_rows, n], this one included: of rows [n_rows, 1], columns [1, n]."""
        rows, columns = flat.new_empty(len(flat), 1), flat.new_zeros(1, flat.shape[1])
        for start in range(0, len(flat), step):
            part = flat[start : start + step].square()
            rows[start : start + step] = part.mean(1, keepdim=True)
            columns += part.sum(0, keepdim=True) / len(flat)
        for name, t in ((ROWS, rows), (COLUMNS, columns)):
            old = _rows(path, spec.name + name, 0, len(t))
            t.lerp_(torch.zeros_like(t) if old is None else old.to(t.device), how.betas[1])
        return rows, columns

    def _columns(self, spec: TensorSpec) -> int:
        return spec.n_in // SUPERBLOCK if spec.name in self.scales else spec.n_in

    def commit(self, layer: int) -> None:
        """What `update` made of a layer takes its place. May be done again."""
        for kind in ("delta", "moment"):
            path = self._path(kind, layer)
            if _next(path).exists():
                rename(_next(path), path)

    def settle(self, done: int) -> None:
        """After a stop: layers from `done` up were finished, the others are still to be derived."""
        for layer in self.specs:
            if layer >= done:
                self.commit(layer)
        for path in self.folder.glob("*.next"):
            path.unlink()

    def keep(self) -> None:
        """The deltas as they are now are the best."""
        for layer in self.specs:
            now, best = self._path("delta", layer), self._path("best", layer)
            if not now.exists():
                best.unlink(missing_ok=True)
                continue
            part = _next(best)
            part.unlink(missing_ok=True)
            try:
                os.link(now, part)
            except OSError:  # a file system without links
                shutil.copyfile(now, part)
            rename(part, best)

    def best(self) -> "Values":
        """Those that were kept last, to read from."""
        found = Values(self.folder, self.specs, self.dtype, self.scales)
        found.prefix = "best"
        return found

    def _path(self, kind: str, layer: int) -> Path:
        return self.folder / f"{kind}-{layer:03}"


def _next(path: Path) -> Path:
    return path.with_name(path.name + ".next")


def _rows(path: Path, name: str, start: int, stop: int) -> torch.Tensor | None:
    if not path.exists():
        return None
    with sealed.reading(path) as file:
        rows: torch.Tensor = file.get_slice(name)[start:stop]
        return rows
