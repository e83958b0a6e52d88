"""A model described without its weights: `config.json`, and `tensors.json` with names as brace patterns."""

import itertools
import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import NoReturn, Self

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text_file
from quantkit.formats.model_names import TENSORS
from quantkit.formats.safetensors_header import check_shape, load_object
from quantkit.formats.tensor_entry import ITEM_SIZE, TensorEntry
from quantkit.formats.tensor_table import CONFIG, TensorTable
from quantkit.progress import say_once

MAX_TENSORS = 1_000_000  # ten times R1; a pattern must not fill the memory
BRACES = re.compile(r"\{([^{}]*)\}")


class Geometry(TensorTable):
    """Names, shapes and dtypes of a model that is not here: enough to plan with, and nothing can be read.

    `tensors.json` maps a pattern to `{"shape": [...], "dtype": "F8_E4M3"}`. In a pattern `{3..60}` stands for the
    numbers 3 to 60 and `{gate,up}` for either word.
    """

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """QuantkitError if either file is missing or malformed, or two patterns give one name."""
        folder = Path(folder)
        config = load_object(read_text_file(folder / CONFIG), str(folder / CONFIG))
        path = folder / TENSORS
        found = cls(folder, config, _written_out(read_text_file(path, "index"), str(path)))
        for remark in found.remarks:
            say_once(remark)
        return found

    def read(self, name: str, *_: object, **__: object) -> NoReturn:
        """QuantkitError: there is nothing to read."""
        self._refuse()

    def read_raw(self, name: str, *_: object, **__: object) -> NoReturn:
        """QuantkitError: there is nothing to read."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise QuantkitError(f"{self.path} has no weights: a description only; point to a folder with safetensors")


@lru_cache(maxsize=4)  # a plan opens its model several times
def _written_out(text: bytes, path: str) -> Mapping[str, TensorEntry]:
    """Name -> entry of all that the patterns of a file give."""
    tensors: dict[str, TensorEntry] = {}
    for pattern, value in load_object(text, path).items():
        entry = _entry(value, f"{path}: {pattern!r}")
        for name in expand(pattern, f"{path}: {pattern!r}"):
            if name in tensors:
                raise QuantkitError(f"{path}: {pattern!r} gives {name!r}, which another pattern gives too")
            tensors[name] = entry
    return tensors


def expand(pattern: str, where: str) -> Iterator[str]:
    """All names of a brace pattern, the last brace running fastest."""
    literals = BRACES.split(pattern)  # literal, inside of braces, literal, ...
    choices = [_choices(inner, where) for inner in literals[1::2]]
    if prod(map(len, choices)) > MAX_TENSORS:
        raise QuantkitError(f"{where}: more than {MAX_TENSORS} names")
    for picked in itertools.product(*choices):
        yield literals[0] + "".join(f"{choice}{tail}" for choice, tail in zip(picked, literals[2::2], strict=True))


def _choices(inner: str, where: str) -> range | list[str]:
    numbers = re.fullmatch(r"(\d{1,7})\.\.(\d{1,7})", inner)
    if numbers:
        return range(int(numbers[1]), int(numbers[2]) + 1)
    words = inner.split(",")
    if len(words) < 2 or not all(words):
        raise QuantkitError(f"{where}: {{{inner}}} is neither {{first..last}} nor {{word,word}}")
    return words


def _entry(value: object, where: str) -> TensorEntry:
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str) or value["dtype"] not in ITEM_SIZE:
        raise QuantkitError(f'{where}: expected {{"shape": [...], "dtype": "BF16"}}')
    shape = check_shape(value.get("shape"), where)
    return TensorEntry(value["dtype"], shape, None, 0, prod(shape) * ITEM_SIZE[value["dtype"]])
