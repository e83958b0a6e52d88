"""One layer on a GPU, its matrices as quantized bytes: attention and routed experts of a decoding step, and those of a
prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F

from quantkit.runtime.activations import Activations, Where, use_kernels
from quantkit.runtime.engines.stacks import Stacks
from quantkit.runtime.layers import Experts, Router
from quantkit.runtime.pauses import pause

if TYPE_CHECKING:  # or the chain of imports would be long
    from quantkit.runtime.engines.step import Between
    from quantkit.runtime.experts.native import Rows
    from quantkit.runtime.packed import Matrix, Packed

    Chunks = Iterator[tuple[int, Sequence[Packed]]]
    """Experts in order: the first one's number, and gate, up and down of some experts."""

    Matrices = tuple[Packed, Packed, Packed]
    """gate, up and down of experts."""

    Query = tuple[Matrix, torch.Tensor, Matrix] | Matrix
    """q_a, its norm and q_b, or one projection."""

SENT_ROWS = 128  # tokens that go to the CPU at once: 3.7 MB of R1's


class OnCpu(Experts, Protocol):
    """Routed experts on the CPU, by threads that may be asleep."""

    def wake(self) -> None:
        """There will be a call soon."""

    def exchange(self, rows: Rows) -> Callable[[int], bool] | None:
        """A step's rows, waited for and answered, as `NativeExperts.exchange`; None if it takes `__call__`."""


class Frames:
    """Experts of one layer in GPU memory. matrices: gate, up and down, [n_frames, n_out, row_bytes] each. table: int32
    [n_expert] on their device. experts: of each frame, -1 if there is none."""

    def __init__(self, stacks: Stacks, matrices: Matrices, table: torch.Tensor, experts: Sequence[int]):
        self.stacks, self.matrices, self.table, self.experts = stacks, matrices, table, list(experts)

    def elsewhere(self) -> list[int]:
        """Experts without a frame."""
        here = set(self.experts)
        return [e for e in range(len(self.table)) if e not in here]


@dataclass
class GpuLayer:
    """One layer's weights, as `LayerWeights`. In GPU memory, but for `on_cpu`; a MoE layer has either that, and perhaps
    some experts in `hot`, or `resident`: gate, up and down of all experts."""

    attn_norm: torch.Tensor
    q: Query
    kv_a: Matrix
    kv_a_norm: torch.Tensor
    k_b: Matrix
    v_b: Matrix
    output: Matrix
    ffn_norm: torch.Tensor
    feed: tuple[Matrix, Matrix, Matrix] | None
    router: Router | None = None
    resident: Matrices | None = None
    hot: Frames | None = None
    on_cpu: OnCpu | None = None
    stacks: Stacks | None = None  # experts that can be streamed


def attend(
    x: Activations, layer: GpuLayer, between: Between, cache: torch.Tensor, where: Where, n_kv: int
) -> torch.Tensor:
    """As layers.attention for one new token of each sequence: normed x [n, d] -> float32 [n, d]. cache: of the layer,
    [n_slots, rows, kv_lora + qk_rope]; its first n_kv positions are looked at."""
    n = len(x.x)
    if isinstance(layer.q, tuple):
        q_a, norm, q_b = layer.q
        low, kv = q_a(x), layer.kv_a(x)
        q = q_b(between.norm(low, norm)[1])
    else:
        q, kv = layer.q(x), layer.kv_a(x)
    nope, rotated = between.place(q, kv, layer.kv_a_norm, cache, where)
    mixed = between.attend(layer.k_b.each(nope), rotated, cache, where, n_kv)
    return layer.output(between.gated(layer.v_b.each(mixed).view(n, -1)))


def feed(x: Activations, matrices: tuple[Matrix, Matrix, Matrix], between: Between) -> torch.Tensor:
    """A dense layer or shared expert: x [n, d] -> float32 [n, d]."""
    gate, up, down = matrices
    return down(between.gated(*gate.beside(up, x)))


def chosen(x: Activations, matrices: Matrices, between: Between, ids: torch.Tensor) -> torch.Tensor:
    """Routed experts ids int32 [n, k] of those in GPU memory, for a few tokens: [n · k, d], not weighed yet. Below 0 is
    none, and gives zeros."""
    gate, up, down = matrices
    choice = gate.choice(ids)
    return down.chosen(between.gated(*gate.beside(up, x, choice)), choice)


def resident_chunks(matrices: Sequence[Packed], n: int) -> Chunks:
    """Experts that are in GPU memory, n at a time."""
    for begin in range(0, len(matrices[0]), n):
        yield begin, [matrix.part(begin, begin + n) for matrix in matrices]


class ChunkedExperts:
    """`layers.Experts` of one layer whose chunks come next: multiplied a chunk at a time.

    places: int64 [n_expert], where in the chunks an expert is; n_places, the number of them, for one that is not there:
    it is left out. None: in their order, all of them."""

    def __init__(self, chunks: Chunks, n_places: int, places: torch.Tensor | None = None):
        self.chunks, self.n_places, self.places = chunks, n_places, places

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`."""
        out = torch.zeros(x.shape, device=x.device)
        if self.places is not None:
            expert = self.places.to(x.device)[expert]
        which, order = expert.flatten().sort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        place = place.view(expert.shape)
        # Not by bincount, which waits for the GPU twice.
        ends = torch.searchsorted(which, torch.arange(self.n_places, device=x.device), right=True, out_int32=True)
        bounds: list[int] = []
        for begin, matrices in self.chunks:
            end = begin + len(matrices[0])
            if not bounds:  # waits for the GPU, unless it is all one chunk
                whole = begin == 0 and end == self.n_places and self.places is None
                bounds = [0] * end + [len(order)] if whole else [0, *ends.tolist()]
            first, last = bounds[begin], bounds[end]
            if last > first:
                stops = ends[begin:end] - first
                part = gathered(x, matrices, order[first:last], stops, expert.shape[1])
                collect(out, part, place, weight, first)
                pause(x.device)
            if end == self.n_places:
                return out
        raise AssertionError("chunks ended before the layer did")


def collect(out: torch.Tensor, part: torch.Tensor, place: torch.Tensor, shares: torch.Tensor, first: int) -> None:
    """As `step_kernels.collect`, on any device."""
    if use_kernels(out.device.type):
        from quantkit.runtime import step_kernels

        step_kernels.collect(out, part, place, shares, first)
        return
    for k in range(place.shape[1]):
        at = place[:, k] - first
        here = (at >= 0) & (at < len(part))
        out[here] += part[at[here]].float() * shares[here, k, None]


def gathered(
    x: torch.Tensor, matrices: Sequence[Packed], order: torch.Tensor, stops: torch.Tensor, k: int
) -> torch.Tensor:
    """gate, up and down of pairs in this order, int64 [m], k neighbours of which share a row of x [n, d]; those of each
    expert end at stops int32: [m, d]."""
    gate, up, down = matrices
    if gate.by_tiles(len(order)):
        return gate.experts(up, down, x, order, stops, k)
    rows = x[order // k]
    hidden = F.silu(grouped(rows, gate.dense(), stops)) * grouped(rows, up.dense(), stops)
    return grouped(hidden, down.dense(), stops)


def distinct_experts(layers: Sequence[GpuLayer]) -> list[Stacks]:
    """gate, up and down of those that can be streamed, each kind once."""
    return list({tuple(s.qtype for s in layer.stacks): layer.stacks for layer in layers if layer.stacks}.values())


def try_out(matrices: Matrices, n: int, n_used: int) -> None:
    """What a prompt does with experts, the first of which so many tokens chose: nobody needs what comes of it."""
    gate, device = matrices[0], matrices[0].data.device
    x, order = torch.zeros(n, gate.n_in, dtype=gate.dtype, device=device), torch.arange(n, device=device)
    stops = torch.full((len(gate),), n, dtype=torch.int32, device=device)
    part = gathered(x, matrices, order, stops, 1)
    nowhere, shares = torch.full((n, n_used), -1, device=device), torch.zeros(n, n_used, device=device)
    collect(torch.zeros(n, part.shape[1], device=device), part, nowhere, shares, 0)


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
        parts = []
        for rows, *routes in zip(*(value.split(SENT_ROWS) for value in (x, expert, weight)), strict=True):
            found = self.experts(rows.float().cpu(), *(value.cpu() for value in routes))
            parts.append(found.to(x.device, copy=True))
            pause(x.device, "experts on the CPU")
        return torch.cat(parts)
