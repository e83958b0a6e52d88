"""One layer on a GPU, its matrices as quantized bytes: attention and routed experts of a decoding step, and those of a
prompt."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.staging import CHUNK, Stacks
from quantkit.runtime.layers import Experts, LayerWeights


class Heads(Protocol):
    """A matrix for each head: `packed.Packed` or `packed.Plain`."""

    def dense(self) -> torch.Tensor:
        """All of them, dequantized: [n_head, n_out, n_in]."""

    def each(self, x: torch.Tensor) -> torch.Tensor:
        """x [n, n_head, n_in], every matrix its own -> [n, n_head, n_out]."""


class Stacked(Protocol):
    """A matrix of each of several experts: `packed.Packed`."""

    def dense(self) -> torch.Tensor:
        """All of them, dequantized: [n, n_out, n_in]."""

    def chosen(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """x [n, n_in], ids int32 [n · k] of matrices, k for each row -> [n · k, n_out]."""

    def part(self, begin: int, end: int) -> "Stacked":
        """Matrices begin ... end."""


Chunks = Iterator[tuple[int, Sequence[Stacked]]]
"""Experts in order: the first one's number, and gate, up and down of CHUNK experts or fewer."""


@dataclass
class GpuLayer:
    """One layer's weights. In GPU memory, but for `on_cpu`; a MoE layer has either that or `resident`."""

    weights: LayerWeights  # k_b and v_b are filled in when a prompt needs them dequantized
    k_b: Heads
    v_b: Heads
    resident: Sequence[Stacked] | None = None
    on_cpu: Experts | None = None
    stacks: Stacks | None = None  # experts that can be streamed


class Places(NamedTuple):
    """Where one new token of each of n sequences is. cells, slots: int64 [n], of the cache. hidden: float32
    [n, 1, n_kv], 0 or -inf, added to scores. turned: complex64 [n, 1, qk_rope / 2]."""

    cells: torch.Tensor
    slots: torch.Tensor
    hidden: torch.Tensor
    turned: torch.Tensor


def attend(h: torch.Tensor, layer: GpuLayer, c: ModelConfig, cache: torch.Tensor, places: Places) -> torch.Tensor:
    """As layers.attention for one new token of each sequence: h float32 [n, d] -> [n, d]. cache: of the layer,
    [n_slots, rows, kv_lora + qk_rope]."""
    weights, n = layer.weights, len(h)
    x = F.rms_norm(h, (c.d,), weights.attn_norm, c.rms_eps)
    if isinstance(weights.q, tuple):
        q_a, norm, q_b = weights.q
        q = q_b(F.rms_norm(q_a(x), norm.shape, norm, c.rms_eps))
    else:
        q = weights.q(x)
    q = q.view(n, c.n_head, c.qk_head)
    latent, key = weights.kv_a(x).split([c.kv_lora, c.qk_rope], dim=-1)
    latent = F.rms_norm(latent, (c.kv_lora,), weights.kv_a_norm, c.rms_eps)
    pairs = torch.cat((q[..., c.qk_nope :], key[:, None]), dim=1).view(n, c.n_head + 1, -1, 2)
    rotated = torch.view_as_real(torch.view_as_complex(pairs) * places.turned).flatten(2)
    cells = cache.view(-1, cache.shape[-1])
    cells.index_copy_(0, places.cells, torch.cat((latent, rotated[:, -1]), dim=-1).to(cache.dtype))
    query = torch.cat((layer.k_b.each(q[..., : c.qk_nope].contiguous()), rotated[:, :-1]), dim=-1)
    n_kv = places.hidden.shape[-1]
    keys = cache[:, :n_kv].index_select(0, places.slots).float()
    scores = torch.baddbmm(places.hidden, query, keys.transpose(1, 2), alpha=c.softmax_scale)
    mixed = scores.softmax(-1) @ keys[..., : c.kv_lora]
    return weights.output(layer.v_b.each(mixed).reshape(n, -1))


def chosen(matrices: Sequence[Stacked], x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`layers.Experts` whose matrices are in GPU memory, for a few tokens."""
    gate, up, down = matrices
    flat = expert.flatten()
    hidden = F.silu(gate.chosen(x, flat)) * up.chosen(x, flat)
    return (down.chosen(hidden, flat).view(*expert.shape, -1) * weight[..., None]).sum(1)


def resident_chunks(matrices: Sequence[Stacked], n_expert: int) -> Chunks:
    """Experts that are in GPU memory."""
    for begin in range(0, n_expert, CHUNK):
        yield begin, [matrix.part(begin, begin + CHUNK) for matrix in matrices]


class ChunkedExperts:
    """`layers.Experts` of one layer whose chunks come next: dequantized and multiplied CHUNK experts at a time."""

    def __init__(self, chunks: Chunks, n_expert: int):
        self.chunks, self.n_expert = chunks, n_expert

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`."""
        out = torch.zeros(x.shape, device=x.device)
        order = torch.argsort(expert.flatten(), stable=True)
        tokens, share = order // expert.shape[1], weight.flatten()[order][:, None]
        ends = torch.bincount(expert.flatten(), minlength=self.n_expert).cumsum(0)
        bounds = [0, *ends.tolist()]
        for begin, (gate, up, down) in self.chunks:
            end = min(begin + CHUNK, self.n_expert)
            first, last = bounds[begin], bounds[end]
            if last > first:
                stops = (ends[begin:end] - first).int()
                rows = x[tokens[first:last]]
                hidden = F.silu(grouped(rows, gate.dense(), stops)) * grouped(rows, up.dense(), stops)
                part = grouped(hidden, down.dense(), stops).float() * share[first:last]
                for a, b in zip(bounds[begin:end], bounds[begin + 1 : end + 1], strict=True):
                    if b > a:  # an expert at a time: sums are then reproducible
                        out.index_add_(0, tokens[a:b], part[a - first : b - first])
            if end == self.n_expert:
                return out
        raise AssertionError("chunks ended before the layer did")


def grouped(x: torch.Tensor, weights: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Rows x [m, n_in], in runs that end at stops int32 [k], times their matrix of weights [k, n_out, n_in]."""
    if x.is_cuda:
        return torch._grouped_mm(x, weights.transpose(-2, -1), offs=stops)
    return torch.cat([part @ w.T for part, w in zip(x.tensor_split(stops[:-1].long().cpu()), weights, strict=True)])


class CpuExperts:
    """`layers.Experts` on the CPU for what lives on another device."""

    def __init__(self, experts: Experts):
        self.experts = experts

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`."""
        return self.experts(x.float().cpu(), expert.cpu(), weight.cpu()).to(x.device, copy=True)
