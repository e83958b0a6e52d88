"""What recovery can be told, and what it takes in memory and on disk."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantkit import machine
from quantkit.codecs.format import SUPERBLOCK
from quantkit.errors import QuantkitError
from quantkit.job.recovery.tuned import Moves, Tensors, moving, scaled
from quantkit.job.recovery.values import Update
from quantkit.models.config import ModelConfig
from quantkit.progress import say
from quantkit.runtime.memory import HIDDEN_BYTES, Limits, Memory, room_for
from quantkit.runtime.room import Place, Room
from quantkit.runtime.stream import Source
from quantkit.sizes import gb
from quantkit.tensors import TensorSpec

RATE, RATE_TOKENS = 3e-3, 100_000
"""Of Adam from so many tokens on; below, as the root of them: at this rate a short text is learnt by heart before other
text gains (docs/results/encoders.md)."""


@dataclass(frozen=True)
class RecoverOptions:
    """moves: as `tuned.Moves`. steps, of so many tokens, at a rate that falls from lr (in standard deviations of a
    matrix, and of the logarithm of a norm or scale) as a cosine; None: as suits the text. betas: of Adam. every: steps
    between measurements. memory, hidden: as in `Calibration`."""

    moves: Moves = "experts"
    steps: int = 30
    tokens: int = 16384
    lr: float | None = None
    betas: tuple[float, float] = (0.9, 0.95)
    every: int = 5
    memory: int | None = None
    hidden: Place | None = None

    def on(self, n_tokens: int, steps: int) -> "RecoverOptions":
        """With so many steps, on a text of so many tokens to train on."""
        lr = RATE * min(1, math.sqrt(n_tokens / RATE_TOKENS)) if self.lr is None else self.lr
        return replace(self, lr=lr, steps=steps, every=max(1, self.every * steps // self.steps))

    def update(self, step: int) -> Update:
        """Of a step, counted from 0, once the text is known (`on`)."""
        return Update(step + 1, (self.lr or 0) * 0.5 * (1 + math.cos(math.pi * step / self.steps)), self.betas)

    def limits(self, folder: Path) -> Limits:
        """Of its passes, whose files may lie in the folder."""
        return Limits(self.memory, self.hidden, folder)


@dataclass(frozen=True)
class Sizes:
    """n_values: weights and scales that move; n_experts: scales of routed experts among them; most: in one layer;
    n_squares: mean squares of rows, a layer's twice; held: floats in memory for what moves of a layer; n_step: tokens
    of a step; dtype: of the values on disk; hidden: of hidden states in a step."""

    config: ModelConfig
    n_values: int
    n_experts: int
    most: int
    n_squares: int
    held: int
    n_step: int
    dtype: torch.dtype
    hidden: torch.dtype

    @classmethod
    def of(cls, c: ModelConfig, tensors: Tensors, how: RecoverOptions) -> "Sizes":
        """Of a file, or plan, with these tensors. float32 wherever it is small."""
        specs = moving(c, tensors, how.moves)
        scales = scaled(specs, tensors)

        def of_layers(count: Callable[[TensorSpec], int]) -> list[int]:
            return [sum(map(count, some)) for some in specs.values()]

        def values(spec: TensorSpec) -> int:
            return spec.n_weights // (SUPERBLOCK if spec.name in scales else 1)

        counts, squares = of_layers(values), of_layers(lambda spec: spec.n_rows)
        held = of_layers(lambda spec: values(spec) if spec.is_routed else spec.n_weights)
        n_experts = sum(of_layers(lambda spec: values(spec) if spec.is_routed else 0))
        spilled = (c.n_layer + 1) * how.tokens * c.d
        dtype, hidden = (torch.float32 if 4 * n <= HIDDEN_BYTES else torch.bfloat16 for n in (sum(counts), spilled))
        n_squares = sum(squares) + max(squares)
        return cls(c, sum(counts), n_experts, max(counts), n_squares, max(held), how.tokens, dtype, hidden)

    def disk(self, n_tokens: int) -> tuple[int, int]:
        """Bytes of the values (delta, momentum and its squares, best delta; a layer's next), and of hidden states: a
        step's, and those of the original and of encoding for so many tokens."""
        c, values = self.config, self.dtype.itemsize * (3 * self.n_values + 2 * self.most) + 4 * self.n_squares
        step = self.n_step * c.d * ((c.n_layer + 1) * self.hidden.itemsize + 2 * 4)
        large = torch.bfloat16 if 4 * n_tokens * c.d > HIDDEN_BYTES else torch.float32
        return values, step + 3 * n_tokens * c.d * large.itemsize

    def room(self, source: Source, shape: tuple[int, int], limits: Limits, derived: Memory) -> Room:
        """For a step on [n_chunk, t] tokens; QuantkitError if they do not fit. derived: what a backward pass needs.
        Besides, for each weight that moves in a layer: its gradient, float32, that of a tile, its value, and the next
        layer's; and of an expert's matrix that by its weights, if its scales move."""
        one = 2 * 4 * self.config.d * self.config.n_ff_exp if self.n_experts else 0
        more = derived + Memory((4 + 3 * source.dtype.itemsize) * self.held + one, 0, 0)
        place = room_for(source, shape[0] * shape[1], limits, more).place
        return Room(place, source.device, limits.folder, self.hidden)

    def check_disk(self, n_tokens: int, file_bytes: int, folder: Path) -> None:
        """Says what it takes there, beside what lies there already; QuantkitError if there is no room."""
        values, hidden = self.disk(n_tokens)
        say(
            f"recovery moves {self.n_values:,} weights and scales: {gb(values)} of state and {gb(hidden)} of hidden "
            f"states in {folder} until the end, and twice the file ({gb(file_bytes)})"
        )
        need, free = self.needs(n_tokens, file_bytes, folder), machine.free_disk(folder)
        if need > free:
            raise QuantkitError(f"{folder}: recovery needs {need:,} bytes more, {free:,} are free; leave --recover out")

    def needs(self, n_tokens: int, file_bytes: int, folder: Path) -> int:
        """Bytes of the disk beside what lies in the folder."""
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        return sum(self.disk(n_tokens)) + 2 * file_bytes - there


def as_disk_allows(
    how: RecoverOptions, config: ModelConfig, tensors: Tensors, text: tuple[int, int], folder: Path
) -> Moves:
    """What moves: not the scales of experts if the disk of the folder has no room for them. Says whether they do and
    what that takes. text: tokens, and bytes of the file."""
    sizes = Sizes.of(config, tensors, how)
    if not sizes.n_experts:
        return how.moves
    each = sizes.dtype.itemsize
    about, state = f"{sizes.n_experts:,} scales of routed experts", gb(3 * each * sizes.n_experts)
    if sizes.needs(*text, folder) > machine.free_disk(folder):
        say(f"recovery: {about} stay as they are: {folder} has no room for their state ({state})")
        return "matrices"
    moved = gb(6 * each * sizes.n_experts)  # values are read three times and written, momenta read and written
    say(f"recovery: {about} move too: {state} of state, {moved} to read and write a step, a third more work in experts")
    return how.moves
