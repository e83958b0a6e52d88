"""How large a file may become, as a person says it."""

from dataclasses import dataclass
from pathlib import Path

from quantkit.errors import QuantkitError


@dataclass(frozen=True)
class BudgetOptions:
    """What `plan` and `make` can be told about size; nothing: the recipe alone decides.

    size: bytes of the whole file; bpw: bits of tensor data per weight; ram, vram: bytes that the model may take on the
    machine that will run it, with a KV cache of `context` tokens. measured: a sensitivity.json, None: the prior.
    """

    size: int | None = None
    bpw: float | None = None
    ram: int | None = None
    vram: int | None = None
    context: int = 16384
    measured: Path | None = None

    @property
    def given(self) -> bool:
        """Whether there is any limit."""
        return any(limit is not None for limit in (self.size, self.bpw, self.ram, self.vram))

    def check(self) -> None:
        """QuantkitError for limits that contradict each other or leave no room."""
        limits = {"--size": self.size, "--size in bpw": self.bpw, "--ram": self.ram}
        chosen = [name for name, value in limits.items() if value is not None]
        if len(chosen) > 1:
            raise QuantkitError(f"{' and '.join(chosen)} contradict each other: give one budget")
        if self.size == 0 or (self.ram == 0 and not self.vram):
            raise QuantkitError(f"{chosen[0]} 0 leaves no room for any file")
        if self.vram is not None and self.ram is None:
            raise QuantkitError(
                "--vram needs --ram too: what the GPU cannot hold of the routed experts streams from it"
            )


NO_BUDGET = BudgetOptions()
