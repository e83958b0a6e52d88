"""quantkit: dynamic low-bit GGUF files of DeepSeek-R1 and its family, from the FP8 checkpoint.

The command line as functions is in `quantkit.job.api` (docs/api.md); the names below are loaded when they are first
used, for torch takes a second.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from quantkit.errors import QuantkitError
    from quantkit.job.api import Made, Model, make, plan, verify
    from quantkit.planning.plan import Plan

_PLACES = {
    "QuantkitError": "quantkit.errors",
    "Plan": "quantkit.planning.plan",
    **dict.fromkeys(("Made", "Model", "make", "plan", "verify"), "quantkit.job.api"),
}

__all__ = ["Made", "Model", "Plan", "QuantkitError", "make", "plan", "verify"]


def __getattr__(name: str) -> object:
    if name in _PLACES:
        return getattr(import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'quantkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
