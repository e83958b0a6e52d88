"""What a backward pass leaves of one layer, in a safetensors file: how much each output of its matrices matters.

H_O = Σ mean(x²) g gᵀ over tokens, with g the gradient of the loss at a matrix's output and x its input (YAQA, arXiv
2505.22988, sketch B's weighting). Of routed experts, whose H_O would be terabytes in R1, the rows √mean(x²) · g stand
instead: H_O = GᵀG. Those of down are the gradients of the layer's output, each times a number, so these are stored once
and not for each of a token's experts. They are gradients at the residual stream after the layer, too; those after
attention stand beside them.
"""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.safetensors_header import encode_header

INNER, DOWN = "ffn_gate_up_exps", "ffn_down_exps"  # keys of `experts`; the first: of gate and up stacked, gate first
MIDDLE, BEFORE, TOKENS = "stream.middle", "stream.before", "tokens"  # the latter two: in the file of layer 0
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64", torch.int32: "I32"}
USED = ("rows.", "counts.", "index.", "scale.", "outputs.")
WRITE_BYTES = 64 << 20
ENDS = 1 << 20  # bytes of a file that its digest sees at either end

Shapes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensors of a file to be: name -> dtype, shape."""


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
        try:
            tensors = _load(path)
            keys = [name.removeprefix("rows.") for name in tensors if name.startswith("rows.")]
            experts = {key: _rows(tensors, key) for key in keys}
        except Exception as error:  # the Rust library raises its own
            raise QuantkitError(f"{path}: not a file of gradients ({error}); run the pass again") from None
        prefix = "outputs."
        outputs = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        return cls(experts, outputs)


def _load(path: Path) -> dict[str, torch.Tensor]:
    """What encoders want."""
    with safe_open(path, "pt") as file:
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
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise QuantkitError(f"{path}: no gradients of this version ({error}); run the backward pass again") from None


def job_in(path: Path) -> str | None:
    """Identity of the pass that wrote a file; None if the file is not there, or is no such file."""
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get("job")
    except (SafetensorError, OSError):
        return None


class Writer:
    """A file whose shapes are known before its data, which may come in any order and in pieces: a layer's rows are
    gigabytes in R1."""

    def __init__(self, file: BinaryIO, shapes: Shapes, offsets: Mapping[str, int]) -> None:
        self._file, self._shapes, self._offsets = file, shapes, offsets
        self.written = 0  # bytes

    def write(self, name: str, rows: torch.Tensor, first: int = 0) -> None:
        """Rows of a tensor from row `first`, in its dtype when they are written, wherever they live."""
        dtype, shape = self._shapes[name]
        row = dtype.itemsize * prod(shape[1:])
        self._file.seek(self._offsets[name] + first * row)
        for part in rows.split(max(1, WRITE_BYTES // max(1, row))):
            data = part.to(dtype).cpu().contiguous().view(-1).view(torch.uint8).numpy()
            self._file.write(memoryview(data))
            self.written += data.nbytes


@contextmanager
def writing(path: Path, shapes: Shapes, about: Mapping[str, str] | None = None) -> Iterator[Writer]:
    """A new file of these tensors in the place of `path`, if the `with` block writes all of them; ranks write one file
    together. about: its metadata. QuantkitError if the disk does not take it."""
    large_first = sorted(shapes, key=lambda name: -shapes[name][0].itemsize)  # aligned without padding
    head, offsets = encode_header({name: (DTYPES[shapes[name][0]], shapes[name][1]) for name in large_first}, about)
    size = sum(n_bytes(shape) for shape in shapes.values())
    part = path.with_name(f"{path.name}.tmp")
    try:
        if ranks.index() == 0:
            part.write_bytes(head)
        ranks.barrier()
        with open(part, "r+b") as file:
            writer = Writer(file, shapes, offsets)
            yield writer
            file.flush()
            os.fsync(file.fileno())
        if missing := size - sum(ranks.gather(writer.written)):
            raise RuntimeError(f"{path}: {missing} bytes were not written")
        if ranks.index() == 0:
            os.replace(part, path)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write ({error.strerror}); run again to resume") from None
    finally:
        if ranks.index() == 0:
            part.unlink(missing_ok=True)


def n_bytes(shape: tuple[torch.dtype, tuple[int, ...]]) -> int:
    """Of a tensor's data."""
    return shape[0].itemsize * prod(shape[1])


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
