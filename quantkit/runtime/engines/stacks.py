"""Nouns of moving routed experts: their stacks in the file, and some of them on their way."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


@dataclass(frozen=True)
class Stack:
    """One of the three matrices of all experts of a layer: data uint8 [n_expert, n_out, row_bytes].

    read: None if `data` is mapped. Where memory is limited `data` has only the right shape, and this fills uint8
    [n_out * row_bytes] with an expert's bytes, from any thread.
    """

    qtype: str
    data: np.ndarray
    n_in: int
    read: Callable[[int, np.ndarray], None] | None = None


Stacks = list[Stack]
"""gate, up and down of a layer."""


def expert_bytes(stacks: Stacks) -> int:
    """Of one expert's three matrices."""
    return sum(stack.data[0].nbytes for stack in stacks)


class Wanted(NamedTuple):
    """Experts of a layer that are to be moved, in this order. first: what is told of the first of them, which counts
    on."""

    stacks: Stacks
    experts: Sequence[int]
    first: int = 0


class Part(NamedTuple):
    """Matrices of some experts of a stack on the device: data uint8 [n, n_out, row_bytes]."""

    qtype: str
    data: torch.Tensor
    n_in: int


def runs(experts: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbours together: (first, how many)."""
    found: list[tuple[int, int]] = []
    for e in experts:
        if found and e == sum(found[-1]):
            found[-1] = found[-1][0], found[-1][1] + 1
        else:
            found.append((e, 1))
    return found
