"""Where the arrays with a row per token live during a streaming pass: beside the weights, in RAM, or on disk."""

import tempfile
from math import prod
from pathlib import Path
from typing import Literal

import torch

Place = Literal["device", "ram", "disk"]


class Room:
    """Makes the arrays. On disk they are mapped files in a temporary folder of `folder`: the system keeps as many of
    their pages in memory as it can spare, and nothing is left of them when the room is dropped.

    hidden: dtype of the hidden states; bfloat16 saves memory in large jobs.
    """

    def __init__(
        self,
        place: Place = "device",
        device: torch.device | str = "cpu",
        folder: Path | None = None,
        hidden: torch.dtype = torch.float32,
    ):
        self.hidden, self.place, self.device = hidden, place, torch.device(device if place == "device" else "cpu")
        self._parent = folder
        self._folder: tempfile.TemporaryDirectory[str] | None = None  # made with the first array
        self._made = 0

    def another(self) -> "Room":
        """Of the same kind: this one may go, and its files with it."""
        return Room(self.place, self.device, self._parent, self.hidden)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A new array; what is in it is undefined."""
        if self.place != "disk":
            return torch.empty(shape, dtype=dtype, device=self.device)
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="quantkit-", dir=self._parent)
        self._made += 1
        path = Path(self._folder.name) / str(self._made)
        return torch.from_file(str(path), shared=True, size=prod(shape), dtype=dtype).view(shape)
