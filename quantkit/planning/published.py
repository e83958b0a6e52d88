"""Damage of single tensors that others measured on large models, for models of the same geometry: published.toml.

Measured and published by Thireus, GGUF Tool Suite and its contributors (https://github.com/Thireus/GGUF-Tool-Suite);
fitted by `scripts/research/fit_published.py`. What was measured, and how well it holds: docs/results/allocation.md.
"""

import tomllib
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from quantkit.tensors import TensorSpec

FILE = Path(__file__).with_name("published.toml")
UNIT = 1e-6  # of the numbers in the file, nats a token


@dataclass(frozen=True)
class Published:
    """What is known of one family of models.

    models, credit: which were measured, by whom. geometry: layers (without MTP), hidden size, routed experts.
    noise: of each table, standard error of a cell over the mean of its routed experts.
    damage: role -> nats a token if one tensor has Q4_K, at the layers `knots`; outside the layers one number.
    """

    name: str
    models: str
    credit: str
    geometry: tuple[int, int, int]
    noise: tuple[float, ...]
    knots: tuple[int, ...]
    damage: Mapping[str, tuple[float, ...]]

    def gain(self, role: str, layer: int | None) -> float | None:
        """Nats a token if only this tensor has Q4_K, linear between knots; None for a role that is not known."""
        row = self.damage.get(role)
        if row is None:
            return None
        if layer is None or len(row) == 1:
            return row[0]
        right = min(bisect_left(self.knots, layer), len(row) - 1)
        left = max(right - 1, 0)
        span = self.knots[right] - self.knots[left]
        share = min(1.0, (layer - self.knots[left]) / span) if span else 0.0
        return row[left] + share * (row[right] - row[left])


def recognise(specs: Iterable[TensorSpec]) -> Published | None:
    """What was published of models with these tensors; None if nothing was."""
    specs = list(specs)
    if not any(spec.role == "attn_kv_a_mqa" for spec in specs):  # DeepSeek-V4-Pro has Kimi-K2's layers and sizes
        return None
    mtp = {spec.layer for spec in specs if spec.role.startswith("nextn")}
    n_layer = len({spec.layer for spec in specs if spec.layer is not None} - mtp)
    hidden = next((spec.n_in for spec in specs if spec.role == "token_embd"), 0)
    n_expert = next((spec.n_matrices for spec in specs if spec.is_routed), 0)
    return next((known for known in load() if known.geometry == (n_layer, hidden, n_expert)), None)


@cache
def load() -> tuple[Published, ...]:
    """All families of published.toml."""
    table = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return tuple(
        Published(
            name,
            one["models"],
            one["credit"],
            (one["n_layer"], one["hidden_size"], one["n_expert"]),
            tuple(one["noise"]),
            tuple(one["knots"]),
            {role: tuple(UNIT * value for value in row) for role, row in one["damage"].items()},
        )
        for name, one in table.items()
    )
