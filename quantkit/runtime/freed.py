"""Memory that a pass has freed, for others."""

import ctypes
import sys
from collections.abc import Callable
from functools import cache


def return_freed() -> None:
    """What was freed goes back to the system now. glibc keeps pages between blocks that are still in use, and arrays of
    some megabytes that come and go leave many: up to half of a pass's memory."""
    if trim := _malloc_trim():
        trim(0)


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's; None where there is none."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
