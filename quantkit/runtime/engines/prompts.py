"""Who computes the routed experts of a prompt: those in GPU memory the GPU, the others as measured costs say.

Long prompts move all of them over the bus, ahead of their use. In shorter ones each layer's experts are shared out when
it is known which are chosen: the CPU computes some while others, those with most tokens, are moved. Each way rounds a
little differently. Costs are measured once, when the engine is opened, so a prompt takes the same way each time.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch

from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.gpu_layers import (
    ChunkedExperts,
    CpuExperts,
    GpuLayer,
    resident_chunks,
)
from quantkit.runtime.engines.stacks import Stacks, Wanted, expert_bytes
from quantkit.runtime.engines.staging import CHUNK, SLOTS, Ring
from quantkit.runtime.layers import Experts
from quantkit.runtime.packed import AT_ONCE, Packed
from quantkit.runtime.pauses import Aside
from quantkit.runtime.sources.gguf import GGUFWeights

log = logging.getLogger(__name__)

ROWS = 16  # tokens of an expert in the longer measurement
WORTH = 0.9  # of the CPU's time alone: what moving experts beside it must save
LONGEST = 4096  # tokens up to which the line about costs looks

PackedChunks = Generator[tuple[int, list[Packed]], None, None]


class Costs(NamedTuple):
    """Seconds for each byte of an expert. visit: on the CPU, however many tokens; row: there, for each token; move:
    over the bus, all threads filling buffers; beside: over the bus while the CPU computes. slower: how many times as
    long the CPU takes meanwhile."""

    visit: float
    row: float
    move: float
    beside: float
    slower: float


def helpers(n_threads: int) -> int:
    """Threads that fill buffers while the others compute."""
    return max(1, n_threads // 8)


def measure(layer: GpuLayer, ring: Ring, c: ModelConfig) -> Costs:
    """Of a layer with `stacks`, by computing and moving some of its experts."""
    assert layer.on_cpu is not None and layer.stacks is not None
    on_cpu, stacks, n_threads = layer.on_cpu, layer.stacks, ring.workers.n
    size, some = expert_bytes(stacks), range(min(c.n_expert, 2 * SLOTS * CHUNK))
    x, ids = torch.randn(ROWS, c.d), torch.arange(c.n_used, dtype=torch.int32).repeat(ROWS, 1)
    weight = torch.ones(ROWS, c.n_used)

    def move(n: int | None) -> None:
        for _ in ring.chunks([Wanted(stacks, some)], n):
            pass
        if ring.on_gpu:
            torch.cuda.synchronize()

    one, many = (seconds(partial(on_cpu, x[:n], ids[:n], weight[:n])) / (c.n_used * size) for n in (1, ROWS))
    row = max(0.0, many - one) / (ROWS - 1)
    all_move, few_move = (seconds(partial(move, n)) / (len(some) * size) for n in (None, helpers(n_threads)))
    slower = n_threads / max(1, n_threads - helpers(n_threads))
    return Costs(max(0.0, one - row), row, all_move, few_move, slower)


def seconds(work: Callable[[], object]) -> float:
    """The shorter of two: the first may wait for the disk."""
    found = []
    for _ in range(2):
        begun = time.perf_counter()
        work()
        found.append(time.perf_counter() - begun)
    return min(found)


def shared_out(rows: np.ndarray, visits: np.ndarray, size: int, costs: Costs) -> np.ndarray:
    """Seconds if the first 0, 1, ... experts go over the bus and the CPU computes the others meanwhile. rows: tokens of
    each; visits: how probable it is that there are any; size: bytes of one -> float64 [n + 1]."""
    by_cpu = np.concatenate(([0.0], np.cumsum(size * (costs.visit * visits + costs.row * rows))))
    by_bus = np.concatenate(([0.0], np.cumsum(size * costs.beside * visits)))
    found = np.maximum(by_bus, (by_cpu[-1] - by_cpu) * costs.slower)
    found[0] = by_cpu[-1]
    return found


def n_moved(rows: np.ndarray, size: int, costs: Costs) -> int:
    """How many of the experts, of which the first have most rows, should go over the bus."""
    found = shared_out(rows, np.ones(len(rows)), size, costs)
    best = int(found.argmin())
    return best if found[best] <= WORTH * found[0] else 0


def places(n_expert: int, experts: Sequence[int]) -> torch.Tensor:
    """Of each expert where it is among these, or how many they are, int64 [n_expert]. -1 is none."""
    found = torch.full((n_expert,), len(experts))
    for place, e in enumerate(experts):
        if e >= 0:
            found[e] = place
    return found


class Prompts:
    """Of an engine's layers. chunk: experts in GPU memory dequantized at once. costs: None without experts that could
    be moved. shares: of the choices, each expert's, float64 [n_layer, n_expert]; at first all the same."""

    def __init__(
        self, layers: list[GpuLayer], weights: GGUFWeights, ring: Ring | None, on_cpu: Callable[[int, int], Experts]
    ):
        """on_cpu: (layer, threads) -> its experts on the CPU by so many threads."""
        self.layers, self.weights, self.config, self.ring, self.on_cpu = layers, weights, weights.config, ring, on_cpu
        self.dtype = torch.bfloat16 if weights.device.type == "cuda" else torch.float32
        self.chunk, self.shares = CHUNK, np.full((len(layers), self.config.n_expert), 1 / max(1, self.config.n_expert))
        self.took, begun = 0.0, time.perf_counter()
        movable = [layer for layer in layers if layer.stacks]
        self.costs = measure(movable[0], ring, self.config) if ring and movable else None
        self.took = time.perf_counter() - begun
        self.beside: dict[int, Experts] = {}
        self.thread = ThreadPoolExecutor(1)

    def say(self) -> None:
        """What was measured, and what follows."""
        if self.costs is None or not (waiting := self._waiting()):
            return
        size = expert_bytes(waiting[0][2])
        visit, row, move = (1e3 * size * cost for cost in (self.costs.visit, self.costs.row, self.costs.move))
        first = bisect_left(range(LONGEST), True, 2, key=self.moves_all)
        log.info(
            "an expert that is not in GPU memory takes the CPU %.3f ms and %.3f for each token, the bus %.3f "
            "(measured in %.0f ms): %s",
            visit,
            row,
            move,
            1e3 * self.took,
            f"prompts of {first} tokens and more move all of them"
            if first < LONGEST
            else "no prompt moves all of them",
        )

    def moves_all(self, n_tokens: int) -> bool:
        """Whether a prompt of so many tokens is expected to be done sooner with all experts moved to the GPU."""
        if self.costs is None:
            return False
        bus = split = 0.0
        for i, elsewhere, stacks in self._waiting():
            size = expert_bytes(stacks)
            bus += len(elsewhere) * size * self.costs.move
            rows = -np.sort(-n_tokens * self.config.n_used * self.shares[i, elsewhere])
            split += float(shared_out(rows, 1 - np.exp(-rows), size, self.costs).min())
        return bus < split

    def _waiting(self) -> list[tuple[int, list[int], Stacks]]:
        """Layers of which some experts are not in GPU memory but could be moved there: which."""
        every = list(range(self.config.n_expert))
        return [
            (i, every if layer.hot is None else layer.hot.elsewhere(), layer.stacks)
            for i, layer in enumerate(self.layers)
            if layer.stacks and layer.resident is None
        ]

    @contextmanager
    def experts(self, n_tokens: int) -> Iterator[Callable[[int], Experts | None]]:
        """Of each layer, asked for in order: its routed experts for a prompt of so many tokens."""
        if not self.moves_all(n_tokens):
            yield lambda i: self._of(i, n_tokens, None)
            return
        wanted = {}
        for i, elsewhere, stacks in self._waiting():
            hot = self.layers[i].hot
            wanted[i] = Wanted(stacks, elsewhere, len(hot.experts) if hot else 0)
        with closing(self.moving(wanted.values())) as moving:
            yield lambda i: self._of(i, n_tokens, (wanted[i], moving) if i in wanted else None)

    def _of(self, i: int, n_tokens: int, moved: tuple[Wanted, PackedChunks] | None) -> Experts | None:
        layer, n_expert = self.layers[i], self.config.n_expert
        if layer.router is None:
            return None
        if layer.resident is not None:
            pairs = n_tokens * self.config.n_used
            all_of_them = pairs <= AT_ONCE and layer.resident[0].by_tiles(pairs)
            n = n_expert if all_of_them else self.chunk
            return ChunkedExperts(resident_chunks(layer.resident, n), n_expert)
        if moved:
            return self.on_gpu(layer, moved[0].experts, moved[1])
        assert layer.on_cpu is not None
        return SplitExperts(self, i) if layer.stacks else CpuExperts(layer.on_cpu)

    def moving(self, wanted: Iterable[Wanted], n_threads: int | None = None) -> PackedChunks:
        """Experts on their way to the GPU, as `Ring.chunks`."""
        if self.ring is None:
            return
        with closing(self.ring.chunks(list(wanted), n_threads)) as moved:
            for begin, parts in moved:
                yield begin, [Packed(*part, self.dtype) for part in parts]

    def on_gpu(self, layer: GpuLayer, moved: Sequence[int], chunks: PackedChunks) -> ChunkedExperts:
        """Those that have a frame, and those that are moved."""
        if layer.hot is None:
            return ChunkedExperts(chunks, len(moved), places(self.config.n_expert, moved))
        experts = [*layer.hot.experts, *moved]
        every = chain(resident_chunks(layer.hot.matrices, self.chunk), chunks)
        return ChunkedExperts(every, len(experts), places(self.config.n_expert, experts))

    def beside_of(self, i: int) -> Experts:
        """A layer's experts on the CPU by the threads that do not fill buffers."""
        if i not in self.beside:
            n = self.weights.workers.n
            self.beside[i] = self.on_cpu(i, max(1, n - helpers(n)))
        return self.beside[i]

    def share(self, i: int, counts: np.ndarray) -> list[int]:
        """Which experts of a layer should go over the bus. counts: tokens of each."""
        layer = self.layers[i]
        assert self.costs is not None and layer.stacks is not None
        if self.weights.residency:  # two would make room, each by dropping what the other is about to use
            return []
        elsewhere = range(self.config.n_expert) if layer.hot is None else layer.hot.elsewhere()
        used = sorted((e for e in elsewhere if counts[e]), key=lambda e: (-counts[e], e))
        return used[: n_moved(counts[used], expert_bytes(layer.stacks), self.costs)]


class SplitExperts:
    """`layers.Experts` of layer i for a short prompt: on the GPU those that have a frame and those that are moved
    there, on the CPU meanwhile the others."""

    def __init__(self, prompts: Prompts, i: int):
        self.prompts, self.i, self.layer = prompts, i, prompts.layers[i]

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As `layers.Experts`."""
        layer, prompts, ids = self.layer, self.prompts, expert.cpu()
        assert layer.on_cpu is not None and layer.stacks is not None
        n_expert, frames = prompts.config.n_expert, layer.hot.experts if layer.hot else []
        moved = prompts.share(self.i, torch.bincount(ids.flatten(), minlength=n_expert).numpy())
        if not moved and not frames:
            return CpuExperts(layer.on_cpu)(x, ids, weight)
        there = [*frames, *moved]
        ids = torch.where(places(n_expert, there)[ids] == len(there), ids, ~ids)
        if not moved:
            out = prompts.on_gpu(layer, [], prompts.moving([]))(x, expert, weight)
            return out + CpuExperts(layer.on_cpu)(x, ids, weight)
        aside = Aside(partial(self._beside, x.float().cpu(), ids, weight.cpu()), prompts.thread)
        moving = prompts.moving([Wanted(layer.stacks, moved, len(frames))], helpers(prompts.weights.workers.n))
        with aside.resting(), closing(moving) as chunks:
            out = prompts.on_gpu(layer, moved, chunks)(x, expert, weight)
            return out + aside.result("experts on the CPU").to(x.device)

    @torch.inference_mode()  # of each thread its own
    def _beside(self, x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return self.prompts.beside_of(self.i)(x, ids, weight)
