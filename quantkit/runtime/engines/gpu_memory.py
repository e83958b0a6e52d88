"""What lies in GPU memory: how much is needed in any case, and the routed experts of how many layers fit beside."""

import logging
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.models.config import ModelConfig
from quantkit.runtime.engines import heat
from quantkit.runtime.engines.staging import CHUNK
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.forms import SCORE_ELEMENTS
from quantkit.sizes import gb

log = logging.getLogger(__name__)

PIECES = (4096, 2048, 1024, 512, 256)  # tokens of a prompt computed at once: the first for which there is memory
CHUNKS = (32, 16, 8)  # experts in GPU memory, of a prompt: the first for which there is memory
SPARE = 768 << 20  # bytes of GPU memory left for the driver, cuBLAS and what cannot be foreseen

GpuLayers = int | float | Literal["auto"]
"""int: layers whose routed experts stay in GPU memory; float: the hottest experts, so much of all their bytes; auto: as
many of the hottest as fit."""


def workspace(c: ModelConfig, n: int) -> int:
    """Upper estimate of the bytes that a piece of n tokens needs besides weights and cache."""
    ffn = 6 * max(c.n_ff, c.n_ff_exp * c.n_used // 4)
    tokens = n * (16 * c.d + 2 * c.n_head * (4 * c.qk_head + 4 * c.v_head) + ffn)
    matrices = 2 * max(c.d * c.n_head * c.v_head, c.d * c.n_ff, 3 * CHUNK * c.d * c.n_ff_exp)
    return tokens + matrices + 8 * SCORE_ELEMENTS


def fixed_bytes(tensors: Mapping[str, GGUFTensor], c: ModelConfig, n_tokens: int) -> dict[str, int]:
    """GPU memory that does not depend on --gpu-layers: the weights but for routed experts and the embedding (which stay
    in the mapped file), and the cache of n_tokens in all."""
    elsewhere = {name for layer in range(c.n_layer) for name in expert_names(layer)}
    if "output.weight" in tensors:
        elsewhere.add("token_embd.weight")
    weights = sum(tensor.n_bytes for name, tensor in tensors.items() if name not in elsewhere)
    return {"weights": weights, "cache": 2 * n_tokens * c.n_layer * (c.kv_lora + c.qk_rope)}


def largest_chunk(c: ModelConfig, free: int) -> int:
    """Experts in GPU memory that a prompt dequantizes at once, if so many bytes are free: more of them cost fewer
    launches of kernels."""
    return next((n for n in CHUNKS if chunk_bytes(c, n) <= free), CHUNK)


def chunk_bytes(c: ModelConfig, n: int) -> int:
    """Of n experts, dequantized."""
    return n * 6 * c.d * c.n_ff_exp


def largest_piece(c: ModelConfig, free: int) -> int:
    """Tokens of a prompt at once, if so many bytes are free."""
    return next((n for n in PIECES if workspace(c, n) + SPARE <= free), PIECES[-1])


class Able(NamedTuple):
    """Layers whose experts the GPU can multiply. sizes: int64 [n], bytes of one expert of each; n_expert: experts of
    one. room: bytes free for them; None: there is no GPU. visits: seconds that the CPU needs in each for as many as a
    token chooses."""

    sizes: np.ndarray
    n_expert: int
    room: int | None
    visits: np.ndarray


def kept_experts(wanted: GpuLayers, able: Able, shares: np.ndarray | None) -> np.ndarray:
    """Which experts are kept in GPU memory, bool [n, n_expert]. shares: of a layer's choices, each expert's, float64
    [n, n_expert]; None: unknown.

    QuantkitError if more are wanted than fit.
    """
    total, n = int(able.sizes.sum()) * able.n_expert, len(able.sizes)
    if isinstance(wanted, int):
        here = np.zeros((n, able.n_expert), bool)
        here[: resident_layers(wanted, (able.sizes * able.n_expert).tolist(), able.room)] = True
        return here
    room = None if able.room is None else max(0, able.room)
    if wanted == "auto":
        room = room or 0
    else:
        if room is not None and wanted * total > room:
            raise QuantkitError(
                f"--gpu-layers {wanted:.0%}: {gb(int(wanted * total))} of experts, but {gb(room)} of GPU memory are "
                f"free: at most {room / total:.0%}"
            )
        room = round(wanted * total)
    return heat.best(shares, able.sizes, able.n_expert, room, able.visits)


def resident_layers(wanted: int, sizes: Sequence[int], room: int | None) -> int:
    """The experts of how many of the first layers are kept. sizes: bytes of each layer's. room: as of `Able`.

    QuantkitError if more layers are wanted than fit.
    """
    fits = next((n for n in range(len(sizes), 0, -1) if sum(sizes[:n]) <= (room or 0)), 0)
    if wanted > len(sizes):
        log.warning("--gpu-layers %d: only %d layers have experts that the GPU can hold", wanted, len(sizes))
        wanted = len(sizes)
    if room is not None and wanted > fits:
        raise QuantkitError(
            f"--gpu-layers {wanted}: {gb(sum(sizes[:wanted]))} of experts, but "
            f"{gb(max(0, room))} of GPU memory are free: at most {fits}"
        )
    return wanted
