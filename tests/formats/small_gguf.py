"""A small planned model, and the ways the tests write it."""

from math import prod
from pathlib import Path

import numpy as np
import pytest

from quantkit.formats.gguf_encode import PlainTensor
from quantkit.formats.gguf_values import F32, U16, U32, I32List
from quantkit.formats.gguf_writer import GGUFWriter

TENSORS = [
    PlainTensor("token_embd.weight", (6, 256), "Q4_K"),
    PlainTensor("blk.0.attn_norm.weight", (5,), "F32"),
    PlainTensor("blk.0.ffn_down_exps.weight", (4, 3, 256), "IQ1_S"),
    PlainTensor("blk.0.ffn_gate_exps.weight", (4, 3, 512), "Q2_K"),
    PlainTensor("output.weight", (7, 256), "Q6_K"),
]
METADATA = {
    "general.architecture": "deepseek2",
    "u16": U16(65535),
    "u32": U32(7),
    "plain": 9,
    "negative": -9,
    "f32": F32(1e-6),
    "float": 0.5,
    "yes": True,
    "empty": "",
    "tokens": ["a", "中文", "<think>"],
    "types": I32List([1, 3, 1]),
    "numbers": [1, -2],
    "floats": [0.25, 0.5],
    "flags": [True, False],
}
ID = {"checkpoint": "c1", "imatrix": "i1", "plan": "p1"}


def data_of(tensor: PlainTensor) -> np.ndarray:
    """Bytes that differ from row to row, [rows, row_bytes]."""
    seed = sum(tensor.name.encode())
    return np.random.default_rng(seed).integers(1, 256, (prod(tensor.shape[:-1]), tensor.row_bytes), np.uint8)


def slices() -> list[tuple[PlainTensor, int]]:
    return [(tensor, row) for tensor in TENSORS for row in range(prod(tensor.shape[:-1]))]


def begin(path: Path, **options) -> GGUFWriter:
    return GGUFWriter.open(path, TENSORS, METADATA, **{"fingerprint": ID, **options})


def fill(out: GGUFWriter, order=None) -> None:
    for tensor, row in slices() if order is None else order:
        out.write(tensor.name, row, data_of(tensor)[row : row + 1])


def write(path: Path, order=None, **options) -> list[Path]:
    with begin(path, **options) as out:
        fill(out, order)
    return out.files


def interrupt(path: Path, n_slices: int, **options) -> None:
    with pytest.raises(KeyboardInterrupt), begin(path, **options) as out:
        fill(out, slices()[:n_slices])
        raise KeyboardInterrupt
