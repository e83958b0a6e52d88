"""The encoder's two doors: weights in, packed ggml blocks out."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch

from quantkit import machine
from quantkit.codecs.format import FP16_MAX, SUPERBLOCK, Codes, Format, to_fp16
from quantkit.codecs.registry import FORMATS
from quantkit.codecs.types import row_bytes
from quantkit.encoding.backends.reference import Backend
from quantkit.encoding.feedback import encode_rows
from quantkit.encoding.hessian import Factor, Hessian, describe, prepare, tf32
from quantkit.encoding.state import EFFORTS, Effort, State
from quantkit.ggml import quants
from quantkit.runtime.products import exact_products

SUPPORTED = frozenset(FORMATS)
CPU_ROWS = 512  # rows in flight on the CPU: the working set of a superblock stays in cache
GPU_SHARE = 0.6  # of the free memory of a GPU
GPU_BYTES = 48  # per weight in flight: codes, values, targets and temporaries

Knowledge = Sequence[Hessian | None] | Factor | None
"""What is known of the inputs of E matrices: a Hessian each, or factors prepared once for matrices that share them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How matrices are encoded; gamma as in `encode_batch`."""

    qtype: str
    fmt: Format
    effort: Effort
    gamma: float | Sequence[float]
    device: torch.device
    backend: Backend

    @staticmethod
    def of(
        qtype: str,
        effort: str | Effort = "normal",
        gamma: float | Sequence[float] = 1.0,
        device: str | torch.device | None = None,
        backend: Backend | None = None,
    ) -> "Method":
        """device and backend as in `encode_batch`."""
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        effort = EFFORTS[effort] if isinstance(effort, str) else effort
        return Method(qtype, FORMATS[qtype], effort, gamma, device, backend or choose(device.type))

    def finished(self, state: State, part: slice = slice(None)) -> State:
        """With gamma, which comes last. part: which of the matrices these are."""
        gammas = [self.gamma] if isinstance(self.gamma, float | int) else self.gamma[part]
        if all(gamma == 1 for gamma in gammas):
            return state
        by = torch.tensor(gammas, device=state.d.device)[:, None, None]
        return replace(state, d=to_fp16(state.d * by), dmin=to_fp16(state.dmin * by))


@cache
def choose(device_type: str) -> Backend:
    """The fastest back end that is installed for a type of device (cpu, cuda)."""
    try:
        if device_type == "cpu":
            from quantkit.encoding.backends.numba_backend import NumbaBackend

            return NumbaBackend()
        if device_type == "cuda":
            from quantkit.encoding.backends.triton_backend import TritonBackend

            return TritonBackend()
    except ImportError as error:
        log.warning("encoding on %s in plain torch, which is much slower: %s", device_type, error)
    return Backend()


def encode(
    qtype: str,
    weight: torch.Tensor,
    hessian: Hessian | Factor | None = None,
    *,
    effort: str | Effort = "normal",
    gamma: float = 1.0,
    device: str | torch.device | None = None,
    backend: Backend | None = None,
) -> np.ndarray:
    """Encode one matrix: weight float32 [rows, n_in] -> uint8 [rows, row_bytes].

    hessian: second moments of the inputs; None: identity. gamma: factor on every superblock scale (1 is the least
    squares; a little more undoes its shrinkage). NaN counts as 0, and weights are clamped to ±65504.
    """
    known = hessian if isinstance(hessian, Factor) else [hessian]
    return encode_batch(qtype, weight[None], known, effort=effort, gamma=gamma, device=device, backend=backend)[0]


def encode_batch(
    qtype: str,
    weights: torch.Tensor,
    hessians: Knowledge = None,
    *,
    effort: str | Effort = "normal",
    gamma: float | Sequence[float] = 1.0,
    device: str | torch.device | None = None,
    backend: Backend | None = None,
) -> np.ndarray:
    """Encode E matrices of one shape: weights [E, rows, n_in] -> uint8 [E, rows, row_bytes].

    hessians: one per matrix (None: nothing is known of its inputs; IQ1_S and IQ1_M then take ggml's own bytes, unless
    at effort `fast`), or a Factor prepared once for several matrices that share their inputs (gate and up).
    gamma: as in `encode`, of all matrices or of each.
    device: None takes CUDA if there is one. backend: None takes the fastest that is installed for the device. Rows and
    matrices are tiled, so memory on the device stays bounded.
    """
    how = Method.of(qtype, effort, gamma, device, backend)
    e, rows, n_in = weights.shape
    out = np.empty((e, rows, row_bytes(qtype, n_in)), np.uint8)  # or an error that names the type
    seeing = list(range(e))
    if not isinstance(hessians, Factor):
        hessians = [None] * e if hessians is None else hessians
        blind = _without_hessian(how, hessians)
        for i in blind:
            out[i] = _by_ggml(qtype, weights[i], hessians[i])
        if blind:
            seeing = [i for i in seeing if i not in blind]
            weights, hessians = weights[seeing], [hessians[i] for i in seeing]
            if not isinstance(gamma, float | int):
                how = replace(how, gamma=[gamma[i] for i in seeing])
    for matrices, some, state in _encode_tiles(how, weights, hessians):
        out[seeing[matrices], some] = pack(state)
    return out


def nearest(qtype: str, weights: torch.Tensor, factor: Factor, effort: str = "normal") -> torch.Tensor:
    """What `encode_batch` makes of E matrices, decoded and without gamma: [E, rows, n_in] -> float32, on the device of
    the weights."""
    out = torch.empty(weights.shape, device=weights.device)
    for matrices, some, state in _encode_tiles(Method.of(qtype, effort, device=weights.device), weights, factor):
        out[matrices, some] = state.q
    return out


def _without_hessian(how: Method, hessians: Sequence[Hessian | None]) -> list[int]:
    """Matrices that ggml encodes better: at the coarsest types, independent rounding under our exact search is worse
    for the model than ggml's cautious one (SmolLM2 wholly at IQ1_S: perplexity 46,500 against 4,134)."""
    if not how.fmt.needs_hessian or not how.effort.feedback:
        return []
    return [i for i, hessian in enumerate(hessians) if describe(hessian) != "full"]


def _by_ggml(qtype: str, weight: torch.Tensor, hessian: Hessian | None) -> np.ndarray:
    importance = torch.ones(weight.shape[-1])
    if hessian is not None and hessian.diagonal is not None and describe(hessian) == "diagonal":
        importance = hessian.diagonal
    return quants.quantize(qtype, finite(weight).cpu().numpy(), importance.float().cpu().numpy())


def _encode_tiles(
    how: Method, weights: torch.Tensor, hessians: Sequence[Hessian | None] | Factor
) -> Iterator[tuple[slice, slice, State]]:
    """Encode some rows of some matrices after others: which matrices, which rows, their codes."""
    e, rows, n_in = weights.shape
    factorise = how.effort.feedback and not isinstance(hessians, Factor)
    matrices, tile = _tiles(how.device, e, rows, n_in, factorise)
    for i in range(0, e, matrices):
        part = slice(i, i + matrices)
        with torch.inference_mode():
            if isinstance(hessians, Factor):
                factor = hessians.of(part).to(how.device)
            else:
                factor = prepare(hessians[part], n_in, how.device, full=how.effort.feedback)
        for j in range(0, rows, tile):
            some = slice(j, j + tile)
            with torch.inference_mode(), tf32(), exact_products():
                w = finite(weights[part, some].to(how.device))
                state = how.finished(encode_rows(how.fmt, w, factor, how.effort, how.backend), part)
            yield part, some, state


def _tiles(device: torch.device, e: int, rows: int, n_in: int, factorise: bool) -> tuple[int, int]:
    """Matrices and rows that are encoded at once.

    On a GPU powers of two (or all), by the memory that nothing holds, torch's own reserve included: a GPU's bytes may
    depend on the tiles, so these should not depend on what ran before.
    """
    if device.type == "cpu":
        return 1, CPU_ROWS
    free = machine.free_vram(device) * GPU_SHARE
    own = 28 * n_in * n_in if factorise else 0  # H, its factor and the copies on the way
    matrices = int(free / (own + GPU_BYTES * rows * n_in))
    return _tile(e, matrices), _tile(rows, int((free - own) / (GPU_BYTES * n_in)))


def _tile(n: int, most: int) -> int:
    return n if n <= most else 1 << (max(1, most).bit_length() - 1)


def finite(w: torch.Tensor) -> torch.Tensor:
    """What is encoded of weights: NaN counts as 0, float16 must hold them."""
    return torch.nan_to_num(w.float(), nan=0.0).clamp(-FP16_MAX, FP16_MAX)


def pack(state: State) -> np.ndarray:
    """State -> uint8 [E, R, row_bytes]."""
    e, r, n = state.q.shape

    def flat(t: torch.Tensor) -> torch.Tensor:
        return t.int().reshape(e * r * (n // SUPERBLOCK), -1)

    d, dmin = (t.half().flatten() for t in (state.d, state.dmin))
    codes = Codes(d, dmin, flat(state.scale), flat(state.offset), flat(state.entry), flat(state.sign))
    packed = state.fmt.pack(codes).view(e, r, -1)
    if packed.is_cuda:  # pageable memory copies at a tenth of the bus
        pinned = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
        packed = pinned.copy_(packed)
    return packed.numpy()
