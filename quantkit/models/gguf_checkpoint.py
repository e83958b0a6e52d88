"""A GGUF file, or all its splits, as the original of a job: BF16, F16, F32, Q8_0, or whatever ggml can decode.

It is seen as the checkpoint that it was converted from: under Hugging Face's names, with a config.json that says what
its metadata say. Rows are dequantized when they are read, so nothing larger than what is asked for is in memory.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import FolderSource
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile, model_file_name
from quantkit.formats.tensor_entry import TensorEntry
from quantkit.ggml.quants import dequantize
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.other_layouts import as_ours
from quantkit.progress import say_once
from quantkit.tensors import TensorSpec

if TYPE_CHECKING:  # two seconds to load, which headers do without
    import torch

PLAIN = ("F32", "F16", "BF16")
TYPE_IN_NAME = re.compile(r"[-._](bf16|f16|f32|fp16|fp32|q8_0)$", re.IGNORECASE)


class GGUFCheckpoint(Checkpoint):
    """`Checkpoint` of a GGUF file; `of` makes it. Reads may come from many threads."""

    def __init__(self, file: GGUFFile, config: ModelConfig):
        self.file, self._of = file, _places(file, config)
        tensors = {
            name: TensorEntry("F32", shape, None, 0, _stored_bytes(file, self._of[name]))
            for name, shape in family.source_shapes(config).items()
        }
        self._numbers = config
        path = file.files[0]  # which has the metadata of all
        super().__init__(path, family.to_hf(config), tensors, FolderSource(path.parent), file.fingerprint())

    @classmethod
    def of(cls, path: Path) -> Self:
        """QuantkitError, naming file and tensor, for a family that is not known or a tensor that is missing or of
        another shape. Says in a line if the file is itself quantized."""
        seen = as_ours(GGUFFile.open(path))
        file = seen.file
        for note in seen.notes:
            say_once(f"{path.name}: {note}")
        config = replace(seen.config, tied="output.weight" not in file.tensors)
        if config.compression is not None:
            raise QuantkitError(
                f"{path}: a GGUF of {config.architecture} is no original yet: name the checkpoint's folder"
            )
        found = cls(file, config)
        coarse = sorted({t.qtype for t in file.tensors.values() if len(t.shape) > 1} - {*PLAIN})
        if coarse:
            say_once(
                f"warning: {path}: its weights are {', '.join(coarse)} already: what that lost of the original stays "
                "lost, and scores are compared with this file"
            )
        return found

    @property
    def name(self) -> str:
        """The file's, without its type."""
        return TYPE_IN_NAME.sub("", model_file_name(self.file.path)) or "model"

    def schedule(self, kept: Sequence[str], layers: Sequence[Sequence[str]]) -> None:
        """The system reads a mapped file ahead by itself."""

    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        device: "torch.device | str" = "cpu",
        dtype: "torch.dtype | None" = None,
    ) -> "torch.Tensor":
        """As `Checkpoint.read`."""
        import torch

        shape = self.entry(name).shape
        stop = shape[0] if stop is None else stop
        if not 0 <= start <= stop <= shape[0]:
            raise QuantkitError(f"{self.path}: tensor {name!r} has {shape[0]} rows, {start}:{stop} were asked for")
        self.file.check_whole()
        names, matrix = self._of[name]
        for each in names:  # which may lie in different splits
            self.file.check_unchanged(each)
        if len(names) == 2:
            values = self._kv_b(names, start, stop)
        else:
            data = self.file.data(names[0]) if matrix is None else self.file.matrix(names[0], matrix)
            values = self._values(names[0], data if len(shape) == 1 else data[start:stop])
        flat = torch.from_numpy(values)
        out = flat.view(stop - start, *shape[1:]) if len(shape) > 1 else flat.view(-1)[start:stop]
        if out.numel():
            self._check_range(name, out, start)
        return out.to(device).to(dtype or torch.float32)

    def read_raw(
        self, name: str, start: int = 0, stop: int | None = None
    ) -> "tuple[torch.Tensor, torch.Tensor | None]":
        """Rows as float32, without a scale."""
        return self.read(name, start, stop), None

    def _values(self, name: str, data: np.ndarray) -> np.ndarray:
        return dequantize(self.file.tensors[name].qtype, data, self.file.tensors[name].shape[-1])

    def _kv_b(self, names: tuple[str, ...], start: int, stop: int) -> np.ndarray:
        """Rows of kv_b_proj put together from k_b [n_head, kv_lora, qk_nope] and v_b [n_head, v_head, kv_lora], of the
        heads that they lie in."""
        c = self._numbers
        per_head = c.qk_nope + c.v_head
        first, last = start // per_head, -(-stop // per_head)
        heads = []
        for head in range(first, last):
            k_b, v_b = (self._values(name, self.file.matrix(name, head)) for name in names)
            heads.append(np.concatenate((k_b.T, v_b)))
        whole = np.concatenate(heads) if heads else np.empty((0, c.kv_lora), np.float32)
        return np.ascontiguousarray(whole[start - first * per_head : stop - first * per_head])


Place = tuple[tuple[str, ...], int | None]
"""GGUF tensors that one of the checkpoint's is made from, and which of the matrices, if it is one of a stack."""


def _places(file: GGUFFile, config: ModelConfig) -> dict[str, Place]:
    """Of every checkpoint tensor."""
    found: dict[str, Place] = {}
    for spec in family.of(config).specs(config, "combined"):
        names: tuple[str, ...] = (spec.name,)
        if spec.role == "attn_kv_b" and spec.name not in file.tensors:
            names = tuple(spec.name.replace("attn_kv_b", part) for part in ("attn_k_b", "attn_v_b"))
        for name in names:
            _check(file, name, spec, config)
        for i, source in enumerate(spec.sources):
            found[source] = (names, i if spec.assembly == "stack" else None)
    return found


def _check(file: GGUFFile, name: str, spec: TensorSpec, config: ModelConfig) -> None:
    """QuantkitError unless the file has the tensor, in its shape."""
    c = config
    split = {
        "attn_k_b": (c.n_head, c.kv_lora, c.qk_nope),
        "attn_v_b": (c.n_head, c.v_head, c.kv_lora),
    }
    shape = next((split[role] for role in split if f".{role}." in name), tuple(spec.shape))
    if name not in file.tensors:
        raise QuantkitError(f"{file.path}: no tensor {name!r}: not a whole model")
    if tuple(file.tensors[name].shape) != shape:
        raise QuantkitError(
            f"{file.path}: tensor {name!r} has shape {list(file.tensors[name].shape)}, its metadata imply {list(shape)}"
        )


def _stored_bytes(file: GGUFFile, place: Place) -> int:
    """Bytes that reading it takes."""
    names, matrix = place
    total = sum(file.tensors[name].n_bytes for name in names)
    return total if matrix is None else total // file.tensors[names[0]].shape[0]
