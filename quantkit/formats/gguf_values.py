"""Metadata values of a GGUF file, each with the exact type that its readers ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gguf.constants import GGUFValueType


@dataclass(frozen=True)
class Typed:
    """A metadata value with its exact GGUF type: llama.cpp refuses a u32 key stored as anything else."""

    value: int | float
    kind: ClassVar[GGUFValueType]


class U16(Typed):
    """An unsigned 16-bit integer: numbers of splits."""

    kind = GGUFValueType.UINT16


class U32(Typed):
    """An unsigned 32-bit integer: most counts and sizes."""

    kind = GGUFValueType.UINT32


class I32(Typed):
    """A signed 32-bit integer."""

    kind = GGUFValueType.INT32


class F32(Typed):
    """A single-precision float."""

    kind = GGUFValueType.FLOAT32


@dataclass(frozen=True)
class I32List:
    """An array of i32 (token types); a plain list of ints is stored the same way."""

    values: Sequence[int]


Scalar = str | bool | int | float
PlainValue = str | bool | int | float | Sequence[str] | Sequence[bool] | Sequence[int] | Sequence[float]
Value = PlainValue | Typed | I32List
"""A metadata value. Plain ones: bool, str, int >= 0 as u32, int < 0 as i32, float as f32, ints in a list as i32."""
