"""The two functions that the pipeline calls: weights in, packed ggml blocks out."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch

from quantkit import machine as probe
from quantkit.codecs.format import FP16_MAX, SUPERBLOCK, Codes, Format, to_fp16
from quantkit.codecs.registry import FORMATS
from quantkit.codecs.types import row_bytes
from quantkit.encoding.feedback import EFFORTS, Effort, State, encode_rows
from quantkit.encoding.hessian import Factor, Hessian, describe, prepare, tf32
from quantkit.encoding.refit import redecode
from quantkit.ggml import codec as ggml

SUPPORTED = frozenset(FORMATS)
COARSEST = frozenset({"IQ1_S", "IQ1_M"})
CPU_ROWS = 512  # rows in flight on the CPU: the working set of a superblock stays in cache
GPU_SHARE = 0.6  # of the free memory of a GPU
GPU_BYTES = 48  # per weight in flight: codes, values, targets and temporaries


def formats() -> dict[str, Format]:
    return FORMATS


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

    hessians: one per matrix (None: nothing is known of its inputs; IQ1_S and IQ1_M then take ggml's own bytes, unless
    at effort `fast`), or a Factor prepared once for several matrices that share their inputs (gate and up).
    device: None takes CUDA if there is one. Rows and matrices are tiled, so memory on the device stays bounded.
    """
    fmt = formats()[qtype]
    e, rows, n_in = weights.shape
    out = np.empty((e, rows, row_bytes(qtype, n_in)), np.uint8)  # or an error that names the type
    blind = _without_hessian(qtype, hessians, e, effort)
    for i in blind:
        h = None if hessians is None else hessians[i]
        importance = torch.ones(n_in) if describe(h) == "identity" else h.diagonal
        out[i] = ggml.quantize(qtype, _finite(weights[i]).cpu().numpy(), importance.float().cpu().numpy())
    seeing = [i for i in range(e) if i not in blind]
    if blind:
        weights, hessians = weights[seeing], hessians and [hessians[i] for i in seeing]
    for (i, j), state in _encode_tiles(fmt, weights, hessians, effort, gamma, device):
        out[seeing[i], j] = pack(fmt, state)
    return out


def _without_hessian(qtype: str, hessians, e: int, effort: str | Effort) -> list[int]:
    """Matrices that ggml encodes better: at the coarsest types, independent rounding under our exact search is worse
    for the model than ggml's cautious one (SmolLM2 wholly at IQ1_S: perplexity 46,500 against 4,134)."""
    effort = EFFORTS[effort] if isinstance(effort, str) else effort
    if qtype not in COARSEST or not effort.feedback or isinstance(hessians, Factor):
        return []
    return [i for i in range(e) if describe(None if hessians is None else hessians[i]) != "full"]


def encode_values(qtype: str, weights: torch.Tensor, hessians=None, *, effort="normal", gamma=1.0, device=None):
    """What encode_batch's bytes decode to, float32 [E, rows, n_in] where `weights` are: for experiments."""
    out = torch.empty_like(weights, dtype=torch.float32)
    for part, state in _encode_tiles(formats()[qtype], weights, hessians, effort, gamma, device):
        out[part] = state.q.to(out.device)
    return out


def _encode_tiles(fmt: Format, weights, hessians, effort, gamma, device) -> Iterator[tuple[tuple[slice, slice], State]]:
    effort = EFFORTS[effort] if isinstance(effort, str) else effort
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    e, rows, n_in = weights.shape
    matrices, tile = _tiles(device, e, rows, n_in, effort.feedback and not isinstance(hessians, Factor))
    for i in range(0, e, matrices):
        part = slice(i, i + matrices)
        with torch.inference_mode():
            factor = _factor(hessians, part, n_in, device, effort, min(matrices, e - i))
        for j in range(0, rows, tile):
            here = part, slice(j, j + tile)
            with torch.inference_mode(), tf32():
                state = encode_rows(fmt, _finite(weights[here].to(device)), factor, effort)
                state = _scaled(fmt, state, gamma)
            yield here, state


def _tiles(device: torch.device, e: int, rows: int, n_in: int, factorise: bool) -> tuple[int, int]:
    """Matrices and rows that are encoded at once.

    On a GPU powers of two (or all), by the memory that nothing holds, torch's own reserve included: a GPU's bytes may
    depend on the tiles, so these should not depend on what ran before.
    """
    if device.type == "cpu":
        return 1, CPU_ROWS
    free = probe.free_vram(device) * GPU_SHARE
    own = 28 * n_in * n_in if factorise else 0  # H, its factor and the copies on the way
    matrices = int(free / (own + GPU_BYTES * rows * n_in))
    return _tile(e, matrices), _tile(rows, int((free - own) / (GPU_BYTES * n_in)))


def _tile(n: int, most: int) -> int:
    return n if n <= most else 1 << (max(1, most).bit_length() - 1)


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
    packed = fmt.pack(codes).view(e, r, -1)
    if packed.is_cuda:  # pageable memory copies at a tenth of the bus
        pinned = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        packed = pinned.copy_(packed)
    return packed.numpy()
