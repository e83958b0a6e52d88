"""What `compare` says of files by their headers alone: types and bytes. Loads no torch, which would take longer."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.codecs.foreign import FOREIGN
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models.config import layouts_of
from quantkit.models.other_layouts import apart, as_ours
from quantkit.planning.plan import PlannedTensor
from quantkit.planning.table import classes
from quantkit.tensors import split_name

EMBEDDING = "token_embd.weight"


@dataclass(frozen=True)
class Opened:
    """One of the files. tensors: as they are stored, but gate and up of experts apart. notes: what is read otherwise
    than it is stored."""

    path: Path
    file: GGUFFile
    tensors: tuple[PlannedTensor, ...]
    notes: tuple[str, ...]

    @classmethod
    def of(cls, path: Path) -> "Opened":
        """From headers. QuantkitError if the file is broken, or no model."""
        file = GGUFFile.open(path)
        _check_model(file)
        tensors = tuple(
            PlannedTensor(t.name, t.shape, *split_name(t.name), t.qtype, t.row_bytes, t.n_bytes, t.offset, None, "")
            for t in apart(file.tensors).values()
        )
        try:
            notes = as_ours(file).notes
        except QuantkitError:  # of a family that is not known here, or with numbers that no model has
            notes = ()
        return cls(path, file, tensors, notes)

    def facts(self) -> dict[str, Any]:
        """Of the headers, for people and programs."""
        types: dict[str, dict[str, int]] = {}
        for tensor in self.tensors:
            of = types.setdefault(tensor.qtype, {"tensors": 0, "bytes": 0})
            of["tensors"], of["bytes"] = of["tensors"] + 1, of["bytes"] + tensor.n_bytes
        return {
            "file": self.path.name,
            "path": str(self.path),
            "files": len(self.file.files),
            "architecture": self.file.metadata.get("general.architecture"),
            **self.file.seen(apart(self.file.tensors)).sizes(),
            "data_bytes": sum(tensor.n_bytes for tensor in self.tensors),
            "mla": " and ".join(sorted(layouts_of(self.file.tensors))) or None,
            "notes": list(self.notes),
            "not_computed": None,
            "types": dict(sorted(types.items(), key=lambda item: -item[1]["bytes"])),
            "foreign_types": {name: FOREIGN[name].program for name in types if name in FOREIGN},
            "classes": classes(self.tensors),
            "scores": None,
        }


def _check_model(file: GGUFFile) -> None:
    """QuantkitError for a GGUF of another kind, which older ones do not say."""
    file.check_model()
    if EMBEDDING not in file.tensors:
        raise QuantkitError(f"{file.path}: is no model that generates text: it has no tensor {EMBEDDING!r}")


def opened(paths: Sequence[Path]) -> list[Opened]:
    """All of them, by their headers. QuantkitError for one that is broken, or named twice."""
    found = [Opened.of(path) for path in paths]
    every = [one.file.files[0].resolve() for one in found]
    if twice := [one.path for one, first in zip(found, every, strict=True) if every.count(first) > 1]:
        raise QuantkitError(f"{twice[0]} is named twice")
    return found


def tables(files: Sequence[Opened]) -> dict[str, Any]:
    """What compare.json holds of headers alone: `files`, in the order given."""
    return {"quantkit": __version__, "files": [one.facts() for one in files], "differences": []}
