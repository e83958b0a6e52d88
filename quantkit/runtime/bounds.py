"""Within which bounds the numbers lie that say how a token is drawn, however they are asked for."""

import math

from quantkit.errors import QuantkitError

BOUNDS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),  # OpenAI's API takes up to 2, llama.cpp any: at 100 nearly all tokens are as probable
    "top_p": (0, 1),
    "top_k": (0, 2**63 - 1),
    "min_p": (0, 1),
    "typical_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
}


def check(value: float, bounds: tuple[float, float], what: str) -> None:
    """QuantkitError for a number beyond its bounds, or that is none (nan). what: the value as it was given, and
    where."""
    low, high = bounds
    if math.isnan(value) or not low <= value <= high:
        raise QuantkitError(f"{what}: not a number from {low:g} to {high:g}")
