"""What recovery can be told, and what it takes in memory and on disk."""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from quantkit.errors import QuantkitError
from quantkit.job.recovery.tuned import Moves
from quantkit.job.recovery.values import ByLayer, Update
from quantkit.models.config import ModelConfig
from quantkit.progress import say
from quantkit.runtime.memory import HIDDEN_BYTES, Limits, Memory, room_for
from quantkit.runtime.room import Place, Room
from quantkit.runtime.stream import Source
from quantkit.sizes import gb


@dataclass(frozen=True)
class RecoverOptions:
    """moves: as `student.Moves`. steps, of so many tokens, at a rate that falls from lr (in standard deviations of a
    matrix, and of the logarithm of a norm) as a cosine; betas: of Adam. every: steps between measurements. memory,
    hidden: as in `Calibration`."""

    moves: Moves = "matrices"
    steps: int = 30
    tokens: int = 16384
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.95)
    every: int = 5
    memory: int | None = None
    hidden: Place | None = None

    def update(self, step: int) -> Update:
        """Of a step, counted from 0."""
        return Update(step + 1, self.lr * 0.5 * (1 + math.cos(math.pi * step / self.steps)), self.betas)

    def limits(self, folder: Path) -> Limits:
        """Of its passes, whose files may lie in the folder."""
        return Limits(self.memory, self.hidden, folder)


@dataclass(frozen=True)
class Sizes:
    """n_values: weights that move; most: in one layer; n_step: tokens of a step; dtype: of the values on disk; hidden:
    of hidden states in a step."""

    config: ModelConfig
    n_values: int
    most: int
    n_step: int
    dtype: torch.dtype
    hidden: torch.dtype

    @classmethod
    def of(cls, c: ModelConfig, specs: ByLayer, how: RecoverOptions) -> "Sizes":
        """float32 wherever it is small."""
        counts = [sum(spec.n_weights for spec in some) for some in specs.values()]
        spilled = (c.n_layer + 1) * how.tokens * c.d
        dtype, hidden = (torch.float32 if 4 * n <= HIDDEN_BYTES else torch.bfloat16 for n in (sum(counts), spilled))
        return cls(c, sum(counts), max(counts), how.tokens, dtype, hidden)

    def disk(self, n_tokens: int) -> tuple[int, int]:
        """Bytes of the values (delta, momentum, best delta; a layer's next), and of hidden states: a step's, and those
        of the original and of encoding for so many tokens."""
        c, values = self.config, self.dtype.itemsize * (3 * self.n_values + 2 * self.most)
        step = self.n_step * c.d * ((c.n_layer + 1) * self.hidden.itemsize + 2 * 4)
        large = torch.bfloat16 if 4 * n_tokens * c.d > HIDDEN_BYTES else torch.float32
        return values, step + 3 * n_tokens * c.d * large.itemsize

    def room(self, source: Source, shape: tuple[int, int], limits: Limits, derived: Memory) -> Room:
        """For a step on [n_chunk, t] tokens; QuantkitError if they do not fit. derived: what a backward pass needs.
        Besides, for each weight that moves in a layer: its gradient, float32, that of a tile, its value, and the next
        layer's."""
        more = derived + Memory((4 + 3 * source.dtype.itemsize) * self.most, 0, 0)
        place = room_for(source, shape[0] * shape[1], limits, more).place
        return Room(place, source.device, limits.folder, self.hidden)

    def check_disk(self, n_tokens: int, file_bytes: int, folder: Path) -> None:
        """Says what it takes there, beside what lies there already; QuantkitError if there is no room."""
        values, hidden = self.disk(n_tokens)
        say(
            f"recovery moves {self.n_values:,} weights: {gb(values)} of state and {gb(hidden)} of hidden states in "
            f"{folder} until the end, and twice the file ({gb(file_bytes)})"
        )
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        need, free = values + hidden + 2 * file_bytes - there, shutil.disk_usage(folder).free
        if need > free:
            raise QuantkitError(f"{folder}: recovery needs {need:,} bytes more, {free:,} are free; leave --recover out")
