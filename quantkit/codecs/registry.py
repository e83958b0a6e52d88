"""One address for every ggml type: its codec, and the compiled twins of its decoder.

To add a type: a row in `types.py`, a `Codec` in its kind's file, and if it is to be fast a function in
`triton_decode.py` or `numba_decode.py`.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch

from quantkit.codecs import iq1, iq2, iq3, kquants, plain
from quantkit.codecs.format import Codec, Format

CODECS = {codec.name: codec for kind in (iq1, iq2, iq3, kquants, plain) for codec in kind.CODECS}
"""By name; a file may hold types that are not here, which ggml decodes."""

FORMATS: dict[str, Format] = {name: codec.format for name, codec in CODECS.items() if codec.format is not None}
"""Of the types that our own encoder makes."""


def codec(name: str) -> Codec:
    """Everything that is known of a type; KeyError for one that only ggml knows."""
    return CODECS[name]


def in_groups(name: str) -> bool:
    """Whether torch and Triton decode the type: blocks that are groups of 8 weights."""
    return name in CODECS and CODECS[name].unpack is not None


@cache
def numba_twin(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """(blocks uint8 [n, bytes], float32 out, bfloat16 bits out), one of the outputs None: the decoder that numba
    compiles, where it is faster than ggml's for this output. Loaded on first use (numba takes half a second); None
    without numba."""
    if name not in CODECS or dtype not in CODECS[name].compiled:
        return None
    try:
        from quantkit.codecs import numba_decode
    except ModuleNotFoundError:
        return None
    return partial(numba_decode.decode, name)


def triton_twin(name: str) -> Any:
    """The jitted function that decodes a group of 8 weights in registers, for a type that is `in_groups`."""
    from quantkit.codecs import triton_decode

    return triton_decode.DECODERS[name]
