"""What every model source offers before a weight is read: a config, a table of tensors, and the checks on them."""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats import fp4, int4
from quantkit.formats.fp8 import block_of, scale_shape
from quantkit.formats.tensor_entry import TensorEntry
from quantkit.formats.text_model import TextModel

SCALE_SUFFIX = "_scale_inv"  # appended to `….weight`; DeepSeek-V4 has `….scale` in its place
SCALE_DTYPES = ("F32", "BF16", "F8_E8M0")
PLAIN_DTYPES = ("BF16", "F16", "F32")
INTEGER_DTYPES = ("I64", "I32")  # of tables of ids
MAX_PROBLEMS = 5
CONFIG = "config.json"


class TensorTable(ABC):
    """A model's config and stored tensors by Hugging Face name.

    path: its folder. config: the parsed `config.json`, of the text model alone. tensors: name -> TensorEntry, scales
    included, of the text model alone and without its prefix. block: rows and columns that share a scale of an FP8
    tensor. remarks: what a person should be told of it, a line each.
    """

    def __init__(self, path: Path, config: dict[str, Any], tensors: Mapping[str, TensorEntry]) -> None:
        text = TextModel.of(config, str(path / CONFIG))
        self.path, self.config, self.prefix = path, text.config, text.prefix
        self.tensors = fp4.packed_weights(int4.packed_weights(text.own(tensors, str(path))), text.config)
        self.dotted = any(name.endswith(".scale") for name in self.tensors)
        self.remarks = text.left_aside(tensors, str(path))
        self.block = self._block()

    def _block(self) -> tuple[int, int]:
        """From the shapes of the scales, whatever config.json says, with a line if that is something else."""
        stated = _block_size(self.config, self.path)
        scaled = (
            (entry.shape, scale.shape)
            for name, entry in self.tensors.items()
            if entry.dtype == "F8_E4M3" and (scale := self.tensors.get(self.scale_name(name))) is not None
        )
        found = block_of(scaled, stated or (128, 128))
        if stated and found != stated:
            self.remarks.append(
                f"warning: {self.path / CONFIG}: weight_block_size is {list(stated)}, the scales are of blocks of "
                f"{list(found)}; read as these"
            )
        return found

    @property
    def stored(self) -> dict[str, TensorEntry]:
        """`tensors`, every byte once: an INT4 weight stands for its words."""
        return {name: entry for name, entry in self.tensors.items() if not name.endswith(int4.PACKED)}

    @property
    def name(self) -> str:
        """What files made of it are called: its folder's name, also where that was given as `.`, or the repository's
        of a snapshot in Hugging Face's cache."""
        return model_name(self.path)

    @abstractmethod
    def read(
        self,
        name: str,
        start: int = 0,
        stop: int | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Rows start:stop of a tensor, dequantised."""

    @abstractmethod
    def read_raw(self, name: str, start: int = 0, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows start:stop as stored, and the float32 scale rows covering them (None if it has no scale)."""

    def scale_name(self, name: str) -> str:
        """What the scale of a weight is called in this model, whether it is there or not."""
        if self.tensors[name].dtype == int4.DTYPE:
            return name + int4.SCALE
        return fp4.scale_of(name) if self.dotted and name + SCALE_SUFFIX not in self.tensors else name + SCALE_SUFFIX

    def entry(self, name: str) -> TensorEntry:
        """QuantkitError naming the tensor if the model has none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise QuantkitError(f"{self.path}: the model has no tensor {self.prefix + name!r}") from None

    def require(self, name: str, shape: tuple[int, ...]) -> TensorEntry:
        """The entry of a tensor that must be there, of this shape, readable, and with its scale; else QuantkitError."""
        entry = self.entry(name)
        if entry.shape != tuple(shape):
            raise QuantkitError(
                f"{self.where(name, entry)} has shape {list(entry.shape)}, the config implies {list(shape)}"
            )
        self.scale_of(name, entry)
        return entry

    def validate(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """`require` all of them; one QuantkitError with the first few problems and their number."""
        problems = list(self._problems(expected))
        if problems:
            more = f"; and {len(problems) - MAX_PROBLEMS} more" if len(problems) > MAX_PROBLEMS else ""
            raise QuantkitError("; ".join(problems[:MAX_PROBLEMS]) + more)

    def scale_of(self, name: str, entry: TensorEntry) -> TensorEntry | None:
        """The scale's entry of an FP8 tensor, None for plain numbers; QuantkitError if nobody could read it."""
        if entry.dtype in PLAIN_DTYPES or (entry.dtype in INTEGER_DTYPES and not name.endswith((".weight", ".bias"))):
            return None
        if entry.dtype == fp4.DTYPE:
            return fp4.scale_entry(name, entry, self.tensors, self.where)
        if entry.dtype == int4.DTYPE:
            return int4.scale_entry(name, entry, self.tensors, self.where)
        where = self.where(name, entry)
        if entry.dtype != "F8_E4M3":
            raise QuantkitError(f"{where}: dtype {entry.dtype} is not supported (F8_E4M3, BF16, F16, F32 are)")
        if len(entry.shape) != 2:
            raise QuantkitError(f"{where}: an F8_E4M3 tensor must have 2 dimensions, this has {list(entry.shape)}")
        scale_name = self.scale_name(name)
        scale = self.tensors.get(scale_name)
        if scale is None:
            raise QuantkitError(f"{where} is F8_E4M3 but its scale {scale_name!r} is missing")
        rows, columns = entry.shape
        need = scale_shape((rows, columns), self.block)
        if scale.shape != need or scale.dtype not in SCALE_DTYPES:
            raise QuantkitError(
                f"{self.where(scale_name, scale)} is {scale.dtype} {list(scale.shape)}; "
                f"{list(entry.shape)} in blocks of {list(self.block)} needs {' or '.join(SCALE_DTYPES)} {list(need)}"
            )
        return scale

    def where(self, name: str, entry: TensorEntry) -> str:
        """How messages name a tensor: file first."""
        return f"{self.path / entry.file if entry.file else self.path}: tensor {self.prefix + name!r}"

    def _problems(self, expected: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
        for name, shape in expected.items():
            try:
                self.require(name, shape)
            except QuantkitError as error:
                yield str(error)


def weight_of(stored: str) -> str:
    """The weight that a stored tensor is, or is a part of, whichever way scales are named."""
    if stored.endswith(".scale"):
        return stored.removesuffix("scale") + "weight"
    return int4.weight_name(stored.removesuffix(SCALE_SUFFIX))


def model_name(folder: Path) -> str:
    """A folder's name that a person would know it by; `model` where there is none."""
    folder = Path(os.path.abspath(folder))
    in_cache = re.search(r"/models--(?:[^/]*?--)?([^/]+)/snapshots/[^/]+$", folder.as_posix())
    return (in_cache[1] if in_cache else folder.name) or "model"


def _block_size(config: dict[str, Any], path: Path) -> tuple[int, int] | None:
    quantization = config.get("quantization_config") or {}
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return None
    if not (isinstance(block, list) and len(block) == 2 and all(type(b) is int and b > 0 for b in block)):
        raise QuantkitError(f"{path / CONFIG}: weight_block_size {block!r} is not two positive integers")
    return block[0], block[1]
