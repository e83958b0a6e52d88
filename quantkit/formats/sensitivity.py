"""sensitivity.json: how much each tensor's type costs at the output, as `quantkit sensitivity` measured it."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text

Tier = Literal["full", "cheap", "gradients"]


@dataclass(frozen=True)
class Entry:
    """Divergence at the output (nats a token, with its standard error) if only this tensor has this type."""

    tensor: str
    role: str
    layer: int | None
    qtype: str
    n_bytes: int
    kld: float
    kld_error: float


def _checked(entry: Entry) -> Entry:
    """TypeError unless every field is what its annotation says, and the figures are finite."""
    texts, numbers = (entry.tensor, entry.role, entry.qtype), (entry.kld, entry.kld_error)
    whole = (entry.n_bytes, 0 if entry.layer is None else entry.layer)
    fine = all(isinstance(t, str) for t in texts) and all(type(n) is int and 0 <= n < 1 << 62 for n in whole)
    if not (fine and all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers)):
        raise TypeError(f"entry {entry.tensor!r:.80}")
    return entry


@dataclass(frozen=True)
class Sensitivity:
    """What `quantkit sensitivity` measured of a model, over so many tokens a fork."""

    model: str
    tier: Tier
    tokens: int
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        """One entry a line."""
        head = {"quantkit_sensitivity": 1, "model": self.model, "tier": self.tier, "tokens": self.tokens}
        lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in self.entries)
        return json.dumps(head)[:-1] + ', "entries": [\n' + lines + "\n]}\n"

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        """QuantkitError if it is not such a file."""
        try:
            table = json.loads(read_text(path, "record"))
            entries = tuple(_checked(Entry(**row)) for row in table["entries"])
            if (type(table["model"]), type(table["tokens"])) != (str, int) or table["tier"] not in get_args(Tier):
                raise TypeError("model, tier or tokens")
            return cls(table["model"], table["tier"], table["tokens"], entries)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise QuantkitError(f"{path}: not a sensitivity file: {error}") from None
