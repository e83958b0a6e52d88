"""A model folder as what it is: weights, or a description without them."""

from pathlib import Path

from quantkit.formats.checkpoint import Checkpoint, Needed
from quantkit.formats.geometry import TENSORS, Geometry


def open_source(path: Path | str, needed: Needed | None = None) -> Checkpoint | Geometry:
    """`tensors.json` without shards beside it is a Geometry, everything else a Checkpoint (or its QuantkitError).
    needed: as in `Checkpoint.open`."""
    folder = Path(path)
    if (folder / TENSORS).is_file() and not any(folder.glob("*.safetensors")):
        return Geometry.load(folder)
    return Checkpoint.open(folder, needed=needed)
