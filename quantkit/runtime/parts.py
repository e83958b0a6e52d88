"""Triton: parts of the rows of quantized matrices, decoded in registers."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Matrices(NamedTuple):
    """Quantized matrices [n_matrices, n_out, n_in] as the kernels take them; Any is a number or a constant.

    table: the codebook. decode: the type's function of triton_decode, or if `wide` of triton_wide, as near ... offset
    are. size, groups: bytes of a block, and its groups of 8 weights. even: every row begins at a multiple of 4 bytes.
    """

    data: torch.Tensor
    table: torch.Tensor
    n_out: int
    row_bytes: int
    matrix_bytes: int
    n_in: Any
    decode: Any
    size: Any
    groups: Any
    wide: Any
    even: Any
    near: Any
    far: Any
    alike: Any
    offset: Any


@triton.jit
def group_of(w, row, g):
    """Group g of the rows that begin at `row` -> eight int8 in two words, scale, offset: in the shape of both."""
    return w.decode(row + (g // w.groups) * w.size, g % w.groups, w.table)


@triton.jit
def first_of(w, chunk):
    """The group that a chunk begins with."""
    if w.near == 4:
        return 16 * (chunk // 4) + chunk % 4
    elif w.far == 4:
        return 8 * (chunk // 2) + 2 * (chunk % 2)
    else:
        return 4 * chunk


@triton.jit
def part_of(w, row, at, last):
    """What a thread decodes of a row: group or chunk `at`."""
    at = tl.minimum(at, last - 1)
    if w.wide:
        per_block = w.groups // 4
        o = (at // per_block) * w.size
        if not w.even:
            o += (row.to(tl.int64) & 2).to(tl.int32)
            row = (row.to(tl.int64) & -4).to(row.dtype)
        return w.decode(row, o, at % per_block, w.table)
    else:
        return group_of(w, row, at)
