"""The text model inside of a checkpoint that also sees: its config.json is `text_config`, its names have a prefix.

Kimi-K2.5 and K2.6 put all that K2 is under `language_model.`, beside `vision_tower.` and `mm_projector.`. The rest of
quantkit knows the text model alone, by the names that it would have by itself.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from quantkit.errors import QuantkitError

KEY, PREFIX = "text_config", "language_model."
OF_BOTH = ("architectures", "quantization_config", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys outside of `text_config` that are of the text model too; of `architectures` only the outer one is read."""


@dataclass(frozen=True)
class TextModel:
    """config: of the text model. prefix: what the checkpoint's names have before the text model's; often nothing."""

    config: dict[str, Any]
    prefix: str = ""

    @classmethod
    def of(cls, config: dict[str, Any], where: str) -> Self:
        """where: the name of config.json. QuantkitError if `text_config` is no table."""
        inner = config.get(KEY)
        if inner is None:
            return cls(config)
        if not isinstance(inner, dict):
            raise QuantkitError(f"{where}: {KEY} is not a table")
        outer = {key: config[key] for key in OF_BOTH if config.get(key) is not None}
        architectures = {"architectures": config.get("architectures")}
        said = {key: value for key, value in inner.items() if value is not None or key not in outer}
        return cls({**outer, **said, **architectures}, PREFIX)

    def name(self, stored: str) -> str | None:
        """The text model's name of a stored tensor; None if it is not of the text model."""
        return stored.removeprefix(self.prefix) if stored.startswith(self.prefix) else None

    def own(self, tensors: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The text model's tensors by its names."""
        if not self.prefix:
            return dict(tensors)
        found = {name: value for stored, value in tensors.items() if (name := self.name(stored)) is not None}
        if not found:
            raise QuantkitError(f"{where}: no tensor is under {self.prefix!r}, where {KEY} has its weights")
        return found

    def left_aside(self, names: Iterable[str], where: str) -> list[str]:
        """A line on the stored names that are not of the text model, if there are any."""
        others = [stored for stored in names if self.name(stored) is None] if self.prefix else []
        return [f"{where}: left aside, not of the text model: {_counted(others)}"] if others else []


def _counted(names: Iterable[str]) -> str:
    parts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part}.* ({n} tensors)" for part, n in sorted(parts.items()))
