"""What a backward pass keeps on disk between layers: raw arrays, each a file that is there whole or not at all.

job             identity of the pass (sha256, hex)
inputs-NNN      hidden states before layer NNN (the last: after the last layer), [n_chunk, t, d]
gradient-NNN    gradient there, float32 [n_sample, n_chunk t, d]; only the last one is kept
"""

import shutil
from pathlib import Path

import torch

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text
from quantkit.formats.whole_file import replacing, write_text

WRITE_BYTES = 64 << 20


class Spill:
    """The folder of one pass. QuantkitError if it is another one's. All ranks read it, rank 0 alone writes."""

    def __init__(self, folder: Path, job: str):
        self.folder, self.job = folder, job
        path = folder / "job"
        if path.exists() and read_text(path, "record") != job:
            raise QuantkitError(f"{folder} is the state of another pass; remove it or use --restart")
        if ranks.index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_text(path, job)

    def has(self, name: str) -> bool:
        """Whether it was put there."""
        return (self.folder / name).exists()

    def put(self, name: str, array: torch.Tensor) -> None:
        """Durably. QuantkitError if the disk does not take it; what was there before stays."""
        if ranks.index():
            return
        rows = array.reshape(-1, array.shape[-1])
        step = max(1, WRITE_BYTES // rows[:1].nbytes)
        try:
            with replacing(self.folder / name) as file:
                for part in rows.split(step):
                    file.write(memoryview(part.cpu().contiguous().view(torch.uint8).numpy()))
        except OSError as error:
            reason = f"{self.folder}: cannot save {name} ({error.strerror})"
            raise QuantkitError(f"{reason}; run again to resume") from None

    def read(self, name: str, out: torch.Tensor) -> None:
        """Into an array of its shape and dtype, wherever that lives."""
        path = self.folder / name
        if path.stat().st_size != out.nbytes:
            raise QuantkitError(f"{path}: {path.stat().st_size} bytes, not {out.nbytes}; remove {self.folder}")
        out.copy_(torch.from_file(str(path), shared=False, size=out.numel(), dtype=out.dtype).view(out.shape))

    def drop(self, name: str) -> None:
        """If it is there."""
        if ranks.index() == 0:
            (self.folder / name).unlink(missing_ok=True)

    def remove(self) -> None:
        """The folder: all of it at once to whoever looks."""
        gone = self.folder.rename(self.folder.with_name(self.folder.name + ".done"))
        shutil.rmtree(gone, ignore_errors=True)
