"""The two functions that the pipeline calls: weights in, packed ggml blocks out."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import torch

from quantkit import ggml
from quantkit.encoders import iq1, iq2, iq3, kquants
from quantkit.encoders.engine import EFFORTS, Effort, State, encode_rows
from quantkit.encoders.format import SUPERBLOCK, Codes, Format
from quantkit.encoders.hessian import Factor, Hessian, prepare
from quantkit.encoders.refit import redecode
from quantkit.encoders.scales import FP16_MAX, to_fp16

SUPPORTED = frozenset("IQ1_S IQ1_M IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_XS Q2_K Q3_K Q4_K Q5_K Q6_K".split())
CPU_ROWS = 512  # rows in flight on the CPU: the working set of a superblock stays in cache
GPU_WEIGHTS = 2**27  # weights in flight on a GPU: about 40 bytes each at the peak


@cache
def formats() -> dict[str, Format]:
    return {f.qtype: f for family in (iq1, iq2, iq3, kquants) for f in family.formats()}


def encode(
    qtype: str,
    weight: torch.Tensor,
    hessian: Hessian | Factor | None = None,
    *,
    effort: str | Effort = "normal",
    gamma: float = 1.0,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Encode one matrix: weight float32 [rows, n_in] -> uint8 [rows, row_bytes].

    hessian: second moments of the inputs; None: identity. gamma: factor on every superblock scale (1 is the least
    squares; a little more undoes its shrinkage). NaN counts as 0, and weights are clamped to ±65504.
    """
    if isinstance(hessian, Factor):
        return encode_batch(qtype, weight[None], hessian, effort=effort, gamma=gamma, device=device)[0]
    return encode_batch(qtype, weight[None], [hessian], effort=effort, gamma=gamma, device=device)[0]


def encode_batch(
    qtype: str,
    weights: torch.Tensor,
    hessians: Sequence[Hessian | None] | Factor | None = None,
    *,
    effort: str | Effort = "normal",
    gamma: float = 1.0,
    device: str | torch.device | None = None,
) -> np.ndarray:
    """Encode E matrices of one shape: weights [E, rows, n_in] -> uint8 [E, rows, row_bytes].

    hessians: one per matrix, or a Factor prepared once for several matrices that share their inputs (gate and up).
    device: None takes CUDA if there is one. Rows and matrices are tiled, so memory on the device stays bounded.
    """
    fmt = formats()[qtype]
    effort = EFFORTS[effort] if isinstance(effort, str) else effort
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    e, rows, n_in = weights.shape
    ggml.row_bytes(qtype, n_in)  # an error that names the type if the row cannot take it
    out = np.empty((e, rows, n_in // SUPERBLOCK * fmt.superblock_bytes), np.uint8)
    matrices, tile = _tiles(device, e, rows, n_in)
    with torch.inference_mode():
        for i in range(0, e, matrices):
            factor = _factor(hessians, slice(i, i + matrices), n_in, device, effort, min(matrices, e - i))
            for j in range(0, rows, tile):
                w = _finite(weights[i : i + matrices, j : j + tile].to(device))
                state = encode_rows(fmt, w, factor, effort)
                out[i : i + matrices, j : j + tile] = pack(fmt, _scaled(fmt, state, gamma))
    return out


def _tiles(device: torch.device, e: int, rows: int, n_in: int) -> tuple[int, int]:
    """Matrices and rows that are encoded at once."""
    if device.type == "cpu":
        return 1, CPU_ROWS
    matrices = max(1, min(e, GPU_WEIGHTS // (rows * n_in)))
    return matrices, max(1, min(rows, GPU_WEIGHTS // n_in))


def _factor(hessians, part: slice, n_in: int, device, effort: Effort, count: int) -> Factor:
    if isinstance(hessians, Factor):
        return Factor(*(None if t is None else t.to(device) for t in vars(hessians.of(part)).values()))
    chosen = [None] * count if hessians is None else list(hessians[part])
    return prepare(chosen, n_in, device, full=effort.feedback)


def _finite(w: torch.Tensor) -> torch.Tensor:
    return torch.nan_to_num(w.float(), nan=0.0).clamp(-FP16_MAX, FP16_MAX)


def _scaled(fmt: Format, state: State, gamma: float) -> State:
    if gamma == 1.0:
        return state
    state = replace(state, d=to_fp16(state.d * gamma), dmin=to_fp16(state.dmin * gamma))
    redecode(fmt, state)
    return state


def pack(fmt: Format, state: State) -> np.ndarray:
    """State -> uint8 [E, R, row_bytes]."""
    e, r, n = state.q.shape

    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.int().reshape(e * r * (n // SUPERBLOCK), -1)

    d, dmin = (t.half().flatten() for t in (state.d, state.dmin))
    codes = Codes(d, dmin, flat(state.scale), flat(state.offset), flat(state.entry), flat(state.sign))
    return fmt.pack(codes).view(e, r, -1).cpu().numpy()
