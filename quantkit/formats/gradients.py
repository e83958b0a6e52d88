"""What a backward pass leaves of one layer, in a safetensors file: how much each output of its matrices matters.

H_O = Σ mean(x²) g gᵀ over tokens, with g the gradient of the loss at a matrix's output and x its input (YAQA, arXiv
2505.22988, sketch B's weighting). Of routed experts, whose H_O would be a terabyte in R1, the rows √mean(x²) · g stand
instead: H_O = GᵀG.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from quantkit.errors import QuantkitError
from quantkit.formats.whole_file import write_whole

INNER, DOWN = "ffn_gate_up_exps", "ffn_down_exps"  # keys of `rows`; the first: of gate and up stacked, gate first
ENDS = 1 << 20  # bytes of a file that its digest sees at either end


@dataclass(frozen=True)
class ExpertRows:
    """Gradient rows of one stack of routed experts: rows [m, n_out] (any float type), those of an expert together, in
    the order of experts; counts int64 [n_expert]."""

    rows: torch.Tensor
    counts: torch.Tensor

    def of(self, expert: int) -> torch.Tensor:
        """[m of this expert, n_out]."""
        first = int(self.counts[:expert].sum())
        return self.rows[first : first + int(self.counts[expert])]


@dataclass(frozen=True)
class LayerGradients:
    """experts: INNER and DOWN -> their rows. outputs: role of another matrix -> H_O, float32 [n_out, n_out]."""

    experts: Mapping[str, ExpertRows]
    outputs: Mapping[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        tensors = {f"outputs.{role}": t.contiguous() for role, t in self.outputs.items()}
        for key, of in self.experts.items():
            tensors |= {f"rows.{key}": of.rows.contiguous(), f"counts.{key}": of.counts}
        write_whole(path, save(tensors))

    @classmethod
    def load(cls, path: Path) -> "LayerGradients":
        """QuantkitError, naming the file, for anything that `save` has not written."""
        try:
            tensors = load_file(path)
            keys = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
            experts = {key: ExpertRows(tensors[f"rows.{key}"], tensors[f"counts.{key}"]) for key in keys}
        except Exception as error:  # the Rust library raises its own
            raise QuantkitError(f"{path}: not a file of gradients ({error}); run the pass again") from None
        prefix = "outputs."
        outputs = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return cls(experts, outputs)


def path_of(folder: Path, layer: int) -> Path:
    """The file of a layer."""
    return folder / f"gradients-{layer:03}.safetensors"


def digest(folder: Path) -> str:
    """Hex SHA-256 of the files' names, sizes and both ends: a cheap identity. QuantkitError if there is none."""
    paths = sorted(folder.glob("gradients-*.safetensors"))
    if not paths:
        raise QuantkitError(f"{folder} holds no gradients (gradients-000.safetensors and so on)")
    found = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        found.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            found.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            found.update(file.read())
    return found.hexdigest()
