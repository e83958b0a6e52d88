"""How a CPU multiplies float32 matrices while it calibrates.

torch gives float32 to MKL, which on AMD's CPUs takes AVX2 where they have AVX-512: half the speed. oneDNN takes the
widest vectors of any, and where there are tiles for it (AMX) rounds what it multiplies to bfloat16, as a GPU's pass
does, and sums in float32. Its sums do not depend on the number of threads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends import mkldnn

FAST = "bf16"
_mkldnn: Any = mkldnn  # its attributes are made when it is loaded
_matmul = _mkldnn.matmul


@contextmanager
def fast_products() -> Iterator[None]:
    """Products of float32 by oneDNN, where the CPU has AVX-512; no change elsewhere."""
    with _precision(FAST):
        yield


@contextmanager
def exact_products() -> Iterator[None]:
    """Within `fast_products`: nothing is rounded to bfloat16, for sums that decide about codes."""
    with _precision("none" if torch.cpu._is_amx_tile_supported() else _matmul.fp32_precision):
        yield


def rounded_up(rows: torch.Tensor) -> torch.Tensor:
    """rows [n, d], and within `fast_products` rows of zeros beneath, an eighth at most: oneDNN keeps a megabyte for
    each shape that it has met, and every expert has a number of tokens of its own."""
    if rows.device.type != "cpu" or _matmul.fp32_precision != FAST:
        return rows
    step = 1 << max(3, len(rows).bit_length() - 4)
    return F.pad(rows, (0, 0, 0, -len(rows) % step))


@contextmanager
def _precision(name: str) -> Iterator[None]:
    before, _matmul.fp32_precision = _matmul.fp32_precision, name
    try:
        yield
    finally:
        _matmul.fp32_precision = before
