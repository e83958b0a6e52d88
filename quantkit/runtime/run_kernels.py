"""Triton: what products by tensor cores have in common: activations as float16, pairs of a token and a matrix put in
order, and what of them a program multiplies."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from quantkit.runtime.activations import Halves
from quantkit.runtime.launches import jit_kernel

TOKENS = (8, 16, 32, 64)  # of a program
SPREAD = 1.3  # times the mean: what most of the matrices have, or they would be decoded twice
KINDS = 64  # matrices that a table is made for at least, or each number of them would have a kernel of its own
LIFT = tl.constexpr(64.0)  # of weights: float16 has its full precision from 6e-5 on only


class Runs(NamedTuple):
    """Pairs of a token and a matrix, those of one matrix together. order: int32 [pairs], sorted by matrix; None: they
    are. table: int32 [blocks, 3], None for one matrix: a matrix (-1: none, zeros), the first of its pairs in that
    order, and how many, at most `tokens`; zeros beyond the last. share: neighbouring pairs that share a row of
    activations. scattered: results are in the pairs' own order, not in this one."""

    order: torch.Tensor | None
    table: torch.Tensor | None
    pairs: int
    tokens: int
    share: int
    scattered: bool


class Sizes(NamedTuple):
    """Constants: powers of two from the pairs and the matrices (one more, for none) on."""

    width: Any
    kinds: Any


@jit_kernel
def _halves(gate, up, out, scales, n, width: tl.constexpr):
    """Row program_id(0) of gate, or silu(gate) · up, as float16 of at most 1, and what it is to be multiplied by."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, width)
    inside = at < n
    v = tl.load(gate + row * n + at, mask=inside, other=0.0).to(tl.float32)
    if up is not None:
        v = v / (1 + tl.exp(-v)) * tl.load(up + row * n + at, mask=inside, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(v), axis=0), 1e-30)
    tl.store(out + row * n + at, (v / largest).to(tl.float16), mask=inside)
    tl.store(scales + row, largest)


@jit_kernel(do_not_specialize=["n_matrices", "blocks", "tokens"])
def _order(ids, order, table, n_matrices, blocks, tokens, sizes):
    """`Runs` of ids: programs from 1 on place a pair each, the first one writes the table."""
    n = tl.num_programs(0) - 1
    at = tl.arange(0, sizes.width)
    matrix = tl.load(ids + at, mask=at < n, other=-1)
    matrix = tl.where(at < n, tl.where(matrix < 0, n_matrices, matrix), sizes.kinds)
    me = tl.program_id(0) - 1
    if me >= 0:
        mine = tl.load(ids + me)
        mine = tl.where(mine < 0, n_matrices, mine)
        place = tl.sum(((matrix < mine) | ((matrix == mine) & (at < me))).to(tl.int32), axis=0)
        tl.store(order + place, me)
    else:
        kind = tl.arange(0, sizes.kinds)
        counts = tl.zeros([sizes.kinds], tl.int32)
        for begin in range(0, n, 16):
            some = begin + tl.arange(0, 16)
            one = tl.load(ids + some, mask=some < n, other=0)
            one = tl.where(some < n, tl.where(one < 0, n_matrices, one), sizes.kinds)
            counts += tl.sum((one[:, None] == kind[None, :]).to(tl.int32), axis=0)
        _table(counts, table, n_matrices, blocks, tokens, sizes)


@jit_kernel(do_not_specialize=["n_matrices", "blocks", "tokens"])
def _of_ends(ends, table, n_matrices, blocks, tokens, sizes):
    """The table of runs that end at `ends`, one of each matrix."""
    kind = tl.arange(0, sizes.kinds)
    end = tl.load(ends + kind, mask=kind < n_matrices, other=0)
    begin = tl.load(ends + kind - 1, mask=(kind > 0) & (kind < n_matrices), other=0)
    _table(tl.where(kind < n_matrices, end - begin, 0), table, n_matrices, blocks, tokens, sizes)


@triton.jit
def _table(counts, table, n_matrices, blocks, tokens, sizes):
    kind = tl.arange(0, sizes.kinds)
    first = tl.cumsum(counts, axis=0) - counts
    parts = (counts + tokens - 1) // tokens
    to = tl.cumsum(parts, axis=0) - parts
    matrix = tl.where(kind < n_matrices, kind, -1)
    for i in range(tl.max(parts, axis=0)):
        there = i < parts
        entry = table + 3 * (to + i)
        tl.store(entry, matrix, mask=there)
        tl.store(entry + 1, first + i * tokens, mask=there)
        tl.store(entry + 2, tl.minimum(counts - i * tokens, tokens), mask=there)
    used = tl.sum(parts, axis=0)
    for begin in range(0, blocks, sizes.kinds):
        entry = begin + kind
        for field in tl.static_range(3):
            tl.store(table + 3 * entry + field, 0, mask=(entry >= used) & (entry < blocks))


@triton.jit
def side_of(w, second, out, pairs, splits):
    """By program_id(2) of out [2 (with second), splits, pairs, n_out]: which part of the columns is a program's, the
    bytes of w's matrices or of second's, and where its outputs begin."""
    mine = tl.program_id(2) % splits
    data = w.data
    if second is not None:
        if tl.program_id(2) >= splits:
            data = second
    return mine, data, out + tl.program_id(2).to(tl.int64) * pairs * w.n_out


@triton.jit
def block_of(w, data, table, pairs, end, tokens: tl.constexpr):
    """Of a program for block program_id(1): where its matrix begins in `data`, the first of its pairs in order and how
    many, and where its columns end: at `end`; at 0 if there is nothing to multiply."""
    block = tl.program_id(1)
    if table is None:
        first, count = block * tokens, tl.minimum(tokens, pairs - block * tokens)
    else:
        matrix, first = tl.load(table + 3 * block), tl.load(table + 3 * block + 1)
        count = tl.load(table + 3 * block + 2)
        data += tl.maximum(matrix, 0).to(tl.int64) * w.matrix_bytes
        end = tl.where((matrix < 0) | (count == 0), 0, end)
    return data, first, count, end


def halves(gate: torch.Tensor, up: torch.Tensor | None = None) -> Halves:
    """gate, or silu(gate) · up: [n, n_in], of any kind of float."""
    gate, up = gate.contiguous(), None if up is None else up.contiguous()
    n, n_in = gate.shape
    found = Halves(torch.empty(n, n_in, dtype=torch.float16, device=gate.device), torch.empty(n, device=gate.device))
    width = triton.next_power_of_2(n_in)
    _halves[(n,)](gate, up, *found, n_in, width, num_warps=min(16, max(1, width // 512)))
    return found


def tokens_of(pairs: int, n_matrices: int) -> int:
    """Of a program: for so many pairs."""
    mean = pairs / n_matrices * (1 if n_matrices == 1 else SPREAD)
    return next((n for n in TOKENS if n >= mean), TOKENS[-1])


def pairs_of(x: Halves) -> Runs:
    """Of one matrix, that all rows of x are multiplied by."""
    return Runs(None, None, len(x.x), tokens_of(len(x.x), 1), 1, False)


def split(n: int, programs: int, busy: int) -> tuple[int, int]:
    """Steps of a program, and programs that share the n steps of a sum, so that about `busy` of them are at work."""
    steps = triton.cdiv(n, min(n, triton.cdiv(busy, programs)))
    return steps, triton.cdiv(n, steps)


def summed(out: torch.Tensor) -> torch.Tensor:
    """Sums in parts, [1 or 2, splits, pairs, n_out] -> [pairs, n_out], or both [2, pairs, n_out]."""
    found = out[:, 0] if out.shape[1] == 1 else out.sum(1)
    return found[0] if len(found) == 1 else found


def _blocks(pairs: int, n_matrices: int, tokens: int) -> int:
    """Of a table at most."""
    return min(pairs, n_matrices + pairs // tokens)


def _sizes(pairs: int, n_matrices: int) -> Sizes:
    powers = (triton.next_power_of_2(n) for n in (pairs, max(KINDS, n_matrices + 2)))
    return Sizes(*map(tl.constexpr, powers))


def runs(ids: torch.Tensor, n_matrices: int) -> Runs:
    """Of a few pairs, each with a row of its own: ids int32 [pairs] of matrices, below 0 none. Nothing waits for the
    GPU."""
    pairs = len(ids)
    tokens = tokens_of(pairs, n_matrices)
    blocks = _blocks(pairs, n_matrices + 1, tokens)
    order = torch.empty(pairs, dtype=torch.int32, device=ids.device)
    table = torch.empty(blocks, 3, dtype=torch.int32, device=ids.device)
    sizes = _sizes(pairs, n_matrices)
    _order[(1 + pairs,)](ids, order, table, n_matrices, blocks, tokens, sizes, num_warps=4)
    return Runs(order, table, pairs, tokens, 1, True)


def every(n_matrices: int, n: int, device: torch.device) -> Runs:
    """Of pairs of n rows with all matrices in order, n · n_matrices in all, each with a row of its own."""
    pairs = n * n_matrices
    tokens = tokens_of(pairs, n_matrices)
    order = torch.arange(pairs, device=device).view(n, n_matrices).T.flatten()
    matrix, begin = torch.arange(n_matrices, device=device)[:, None], torch.arange(0, n, tokens, device=device)
    table = torch.stack(torch.broadcast_tensors(matrix, matrix * n + begin, (n - begin).clamp(max=tokens)), dim=-1)
    return Runs(order.int(), table.flatten(0, 1).int(), pairs, tokens, 1, True)


def sorted_runs(order: torch.Tensor, ends: torch.Tensor, share: int) -> Runs:
    """Of pairs in this order, int32, of which those of each matrix end at ends int32 [n_matrices]."""
    pairs, n_matrices = len(order), len(ends)
    tokens = tokens_of(pairs, n_matrices)
    blocks = _blocks(pairs, n_matrices, tokens)
    table = torch.empty(blocks, 3, dtype=torch.int32, device=ends.device)
    _of_ends[(1,)](ends, table, n_matrices, blocks, tokens, _sizes(1, n_matrices), num_warps=4)
    return Runs(order, table, pairs, tokens, share, False)
