"""One address for every ggml type: its codec, and the compiled twins of its decoder.

To add a type: a row in `types.py`, a `Codec` in its kind's file, and if it is to be fast a function in
`triton_decode.py` or `numba_decode.py`.
"""

import logging
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType
from typing import Any

import numpy as np
import torch

from quantkit.codecs import iq1, iq2, iq3, kquants, plain
from quantkit.codecs.codec import Codec
from quantkit.codecs.format import SUPERBLOCK, Format, scaled

log = logging.getLogger(__name__)

CODECS = {codec.name: codec for kind in (iq1, iq2, iq3, kquants, plain) for codec in kind.CODECS}
"""By name; a file may hold types that are not here, which ggml decodes."""

FORMATS: dict[str, Format] = {name: codec.format for name, codec in CODECS.items() if codec.format is not None}
"""Of the types that our own encoder makes: those with superblocks."""


def codec(name: str) -> Codec:
    """Everything that is known of a type; KeyError for one that only ggml knows."""
    return CODECS[name]


def in_groups(name: str) -> bool:
    """Whether torch and Triton decode the type: blocks that are groups of 8 weights."""
    return name in CODECS and CODECS[name].unpack is not None


def rescale(name: str, data: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """data uint8 [..., row_bytes] of a type in FORMATS with all scales of each superblock times factor float32
    [..., n_in / 256].

    Scales are rounded to float16 and kept in its range. Returns new bytes: everything else in them stays as it is.
    """
    if name not in FORMATS:
        raise KeyError(name)
    found, by = CODECS[name], factor.reshape(-1)
    blocks = data.reshape(-1, found.block.itemsize).copy().view(found.block)[:, 0]
    if len(by) != len(blocks):
        raise ValueError(f"{len(by)} factors for {len(blocks)} superblocks of {SUPERBLOCK} weights")
    if found.rescale is not None:
        found.rescale(blocks, by)
    else:
        for field in {"d", "dmin"}.intersection(found.block.names or ()):
            blocks[field] = scaled(blocks[field], by)
    return blocks.view(np.uint8).reshape(data.shape)


def numba_twin(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """(blocks uint8 [n, bytes], float32 out, bfloat16 bits out), one of the outputs None: the decoder that numba
    compiles, where it is faster than ggml's for this output. None, once said, without numba."""
    if name not in CODECS or dtype not in CODECS[name].compiled:
        return None
    compiled = _numba_decode()
    return None if compiled is None else partial(compiled.decode, name)


@cache
def _numba_decode() -> ModuleType | None:
    """Loaded on first use: numba takes half a second."""
    try:
        from quantkit.codecs import numba_decode
    except ImportError as error:
        log.warning("weights are decoded by ggml, which takes longer: %s", error)
        return None
    return numba_decode


def triton_twin(name: str) -> Any:
    """The jitted function that decodes a group of 8 weights in registers, for a type that is `in_groups`."""
    from quantkit.codecs import triton_decode

    return triton_decode.DECODERS[name]
