"""What a backward pass keeps on disk between layers: arrays, each a sealed file that is there whole or not at all.

job             identity of the pass (sha256, hex)
inputs-NNN      hidden states before layer NNN (the last: after the last layer), [n_chunk, t, d]
gradient-NNN    gradient there, float32 [n_sample, n_chunk t, d]; only the last one is kept
"""

import shutil
from collections.abc import Mapping
from pathlib import Path

import torch

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.byte_source import read_text
from quantkit.formats.whole_file import make_folders, rename_folder, write_text
from quantkit.progress import say

ARRAY = "array"


class Spill:
    """The folder of one pass. QuantkitError if it is another one's. All ranks read it, rank 0 alone writes."""

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job
        path = folder / "job"
        if path.exists() and read_text(path, "record") != job:
            raise QuantkitError(f"{folder} is the state of another pass; remove it or use --restart")
        if ranks.index() == 0:
            make_folders(folder)
            write_text(path, job)

    def has(self, name: str) -> bool:
        """Whether it was put there and is what was put. What is damaged is said and gone, as if it had never been put:
        to be asked by one rank."""
        path = self.folder / name
        if not path.exists():
            return False
        if why := sealed.whole(path):
            say(f"{why}; it is computed again")
            path.unlink()
        return not why

    def put(self, name: str, array: torch.Tensor) -> None:
        """Durably. QuantkitError if the disk does not take it; what was there before stays."""
        self._write(name, {ARRAY: array})

    def note(self, name: str, about: Mapping[str, str]) -> None:
        """As `put`, of a few facts."""
        self._write(name, {}, about)

    def _write(self, name: str, tensors: Mapping[str, torch.Tensor], about: Mapping[str, str] | None = None) -> None:
        if ranks.index():
            return
        try:
            sealed.write(self.folder / name, tensors, about)
        except OSError as error:
            reason = f"{self.folder}: cannot save {name} ({error.strerror})"
            raise QuantkitError(f"{reason}; run again to resume") from None

    def read(self, name: str, out: torch.Tensor) -> None:
        """Into an array of its shape and dtype, wherever that lives."""
        out.copy_(self.mapped(name, out.shape, out.dtype))

    def mapped(self, name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """The array, of this shape and dtype: a mapped file, not to be written to."""
        path = self.folder / name
        with sealed.reading(path) as file:
            found: torch.Tensor = file.get_tensor(ARRAY)
        if found.dtype != dtype or found.numel() != shape.numel():
            raise QuantkitError(f"{path}: {found.dtype} {list(found.shape)}, not {list(shape)}; remove {self.folder}")
        return found.view(shape)

    def noted(self, name: str) -> dict[str, str]:
        """What `note` was given; QuantkitError if it is not there, or damaged."""
        return sealed.about(self.folder / name)

    def drop(self, name: str) -> None:
        """If it is there."""
        if ranks.index() == 0:
            (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """The folder: all of it at once to whoever looks."""
        gone = self.folder.with_name(self.folder.name + ".done")
        rename_folder(self.folder, gone)
        shutil.rmtree(gone, ignore_errors=True)
