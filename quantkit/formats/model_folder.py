"""A model folder as what it is: weights, or a description without them."""

from pathlib import Path

from quantkit.formats.checkpoint import Checkpoint, Needed
from quantkit.formats.geometry import Geometry
from quantkit.formats.model_names import is_description


def open_source(path: Path | str, needed: Needed | None = None) -> Checkpoint | Geometry:
    """`tensors.json` without shards beside it is a Geometry, everything else a Checkpoint (or its QuantkitError).
    needed: as in `Checkpoint.open`."""
    folder = Path(path)
    if is_description(folder):
        return Geometry.load(folder)
    return Checkpoint.open(folder, needed=needed)
