"""What a backward pass tells of the outputs of a layer's matrices, as the encoder wants it: H_O for each."""

import math
from pathlib import Path

import torch

from quantkit.encoding.hessian import gram
from quantkit.errors import QuantkitError
from quantkit.formats.gradients import ExpertRows, LayerGradients, path_of


class ExpertOutputs:
    """H_O of the routed experts of one stack, mean diagonal 1: in part an expert's own, else the mean of its layer's,
    which is all of it where an expert has no gradients. For down the mean means something, its rows being the residual
    stream; for gate and up it mostly strengthens the diagonal."""

    def __init__(self, rows: ExpertRows, own: float, device: torch.device):
        self.rows, self.own, self.device = rows, own, device
        self.mean: torch.Tensor | None = None
        known = 0
        for expert in range(len(rows.counts)):
            h = self._of(expert)
            if h is not None:
                self.mean = h if self.mean is None else self.mean.add_(h)
                known += 1
        if self.mean is not None:
            self.mean /= known

    def _of(self, expert: int) -> torch.Tensor | None:
        """GᵀG of the expert's rows alone, mean diagonal 1; None if there are none."""
        g = self.rows.of(expert).to(self.device).float()
        energy = float(g.double().square().sum())
        if not math.isfinite(energy):
            raise QuantkitError(f"gradients of expert {expert} are not finite; run the backward pass again")
        if energy == 0:
            return None
        return gram(g * (g.shape[1] / energy) ** 0.5)

    def of(self, expert: int) -> torch.Tensor | None:
        """float32 [n_out, n_out]; None if nothing is known of the whole layer."""
        if self.mean is None:
            return None
        h = self._of(expert)
        return self.mean if h is None else torch.lerp(self.mean, h, self.own)


class LayerOutputs:
    """H_O of a layer's matrices, from the file that a backward pass left of the layer, if it did."""

    def __init__(self, folder: Path | None, layer: int, own: float, device: torch.device):
        self.path = None if folder is None else path_of(folder, layer)
        self.own, self.device = own, device
        self.gradients = LayerGradients({}, {})
        if self.path is not None and self.path.exists():
            self.gradients = LayerGradients.load(self.path)
        self.stacks: dict[str, ExpertOutputs] = {}

    def matrix(self, role: str, n_rows: int) -> torch.Tensor | None:
        """Of a matrix that is not routed, [n_rows, n_rows]; QuantkitError if it is another model's."""
        h = self.gradients.outputs.get(role)
        if h is not None:
            self._check(role, h.shape[-1], n_rows)
            h = h.to(self.device).float()
            return h if float(h.diagonal().sum()) > 0 else None
        return None

    def knows(self, key: str, n_expert: int, n_rows: int) -> bool:
        """Whether there is an H_O for the experts' stack `key` (INNER, DOWN) of so many rows; QuantkitError if it is
        another model's."""
        rows = self.gradients.experts.get(key)
        if rows is None:
            return False
        if key not in self.stacks:
            self._check(key, len(rows.counts), n_expert)
            self._check(key, rows.rows.shape[-1], n_rows)
            self.stacks[key] = ExpertOutputs(rows, self.own, self.device)
        return self.stacks[key].mean is not None

    def expert(self, key: str, expert: int) -> torch.Tensor:
        """Of one expert of a stack that `knows` has found."""
        found = self.stacks[key].of(expert)
        assert found is not None
        return found

    def _check(self, key: str, found: int, expected: int) -> None:
        if found != expected:
            raise QuantkitError(f"{self.path}: {key} has {found} where the model has {expected}: another model's")
