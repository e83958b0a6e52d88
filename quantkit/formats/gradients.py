"""What a backward pass leaves of one layer, in a safetensors file: how much each output of its matrices matters.

H_O = Σ mean(x²) g gᵀ over tokens, with g the gradient of the loss at a matrix's output and x its input (YAQA, arXiv
2505.22988, sketch B's weighting). Of routed experts, whose H_O would be terabytes in R1, the rows √mean(x²) · g stand
instead: H_O = GᵀG. Those of down are the gradients of the layer's output, each times a number, so these are stored once
and not for each of a token's experts. They are gradients at the residual stream after the layer, too; those after
attention stand beside them.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.sealed import about, reading, writing
from quantkit.progress import say

INNER, DOWN = "ffn_gate_up_exps", "ffn_down_exps"  # keys of `experts`; the first: of gate and up stacked, gate first
MIDDLE, BEFORE, TOKENS = "stream.middle", "stream.before", "tokens"  # the latter two: in the file of layer 0
USED = ("rows.", "counts.", "index.", "scale.", "outputs.")
ENDS = 1 << 20  # bytes of a file that its digest sees at either end


@dataclass(frozen=True)
class ExpertRows:
    """Gradient rows of one stack of routed experts; `of` gives those of an expert.

    rows [m, n_out] (any float type), those of an expert together, in the order of experts; counts int64 [n_expert].
    With index, int32 [m], and scale, float32 [m], row i is scale[i] · rows[index[i]].
    """

    rows: torch.Tensor
    counts: torch.Tensor
    index: torch.Tensor | None = None
    scale: torch.Tensor | None = None

    def of(self, expert: int) -> torch.Tensor:
        """[m of this expert, n_out]; float32 where rows are scaled."""
        first = int(self.counts[:expert].sum())
        mine = slice(first, first + int(self.counts[expert]))
        if self.index is None or self.scale is None:
            return self.rows[mine]
        return self.rows[self.index[mine].long()] * self.scale[mine, None]


@dataclass(frozen=True)
class LayerGradients:
    """experts: INNER and DOWN -> their rows. outputs: role of another matrix -> H_O, float32 [n_out, n_out]."""

    experts: Mapping[str, ExpertRows]
    outputs: Mapping[str, torch.Tensor]

    def save(self, path: Path) -> None:
        """Written whole or not at all."""
        tensors = {f"outputs.{role}": t for role, t in self.outputs.items()}
        for key, of in self.experts.items():
            parts = {"rows": of.rows, "counts": of.counts, "index": of.index, "scale": of.scale}
            tensors |= {f"{part}.{key}": t for part, t in parts.items() if t is not None}
        with writing(path, {name: (t.dtype, tuple(t.shape)) for name, t in tensors.items()}) as file:
            for name, tensor in tensors.items():
                file.write(name, tensor)

    @classmethod
    def load(cls, path: Path) -> "LayerGradients":
        """QuantkitError, naming the file, for anything that was not written here."""
        tensors = _load(path)
        keys = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
        try:
            experts = {key: _rows(tensors, key) for key in keys}
        except KeyError as error:
            raise QuantkitError(f"{path}: not a file of gradients (no {error}); run the pass again") from None
        prefix = "outputs."
        outputs = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return cls(experts, outputs)


def _load(path: Path) -> dict[str, torch.Tensor]:
    """What encoders want."""
    with _reading(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(USED)}


def _rows(tensors: Mapping[str, torch.Tensor], key: str) -> ExpertRows:
    index, scale = tensors.get(f"index.{key}"), tensors.get(f"scale.{key}")
    return ExpertRows(tensors[f"rows.{key}"], tensors[f"counts.{key}"], index, scale)


def path_of(folder: Path, layer: int) -> Path:
    """The file of a layer."""
    return folder / f"gradients-{layer:03}.safetensors"


def after(moe: bool) -> str:
    """Name of the gradients at the residual stream after a layer: in a MoE layer they are those of down, too."""
    return f"rows.{DOWN}" if moe else "stream.after"


@dataclass(frozen=True)
class StreamGradients:
    """Gradients at the residual stream, of every label that was drawn: of the sum of -log p(label) over all positions
    with respect to each token's state.

    middle: after attention; after: after the layer; before: before it, of layer 0 only. [n_sample, n_tokens, d].
    """

    middle: torch.Tensor
    after: torch.Tensor
    before: torch.Tensor | None

    @classmethod
    def load(cls, path: Path) -> "StreamGradients":
        """QuantkitError, naming the file, if it is none that this version's backward pass wrote."""
        with _reading(path) as file:
            n_sample, names = int(file.metadata()["samples"]), set(file.keys())
            last = after(f"rows.{DOWN}" in names)
            middle, after_it, *before = (
                file.get_tensor(name).unflatten(0, (n_sample, -1)) for name in (MIDDLE, last, BEFORE) if name in names
            )
            return cls(middle, after_it, before[0] if before else None)


def tokens_in(folder: Path) -> torch.Tensor:
    """The text that the gradients in this folder are of, int64 [n_chunk, t]."""
    with _reading(path_of(folder, 0)) as file:
        return file.get_tensor(TOKENS).view(-1, int(file.metadata()["chunk"]))


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with reading(path) as file:
            yield file
    except QuantkitError as error:
        raise QuantkitError(f"{error}; run the backward pass (`calibrate --gradients`) again") from None


def job_in(path: Path) -> str | None:
    """Identity of the pass that wrote a file; None if the file is not there, or is damaged, which is said."""
    if not path.exists():
        return None
    try:
        return about(path).get("job")
    except QuantkitError as error:
        say(f"{error}; it is made again")
        return None


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
