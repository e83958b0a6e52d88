"""The kernels that an engine launches in prompts and steps of any length, compiled at once when it is opened.

Its own functions are called, without launching anything, for each kind of layer, of matrix and of expert: there is a
kernel for each type and width, for 8, 16, 32 and 64 tokens of a matrix, and for addresses and numbers that Triton knows
to be multiples of 16, or 1.
"""

import logging
import time
from collections.abc import Hashable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantkit import machine
from quantkit.runtime.engines.gpu_buffers import ROWS, SHORT, rows_of
from quantkit.runtime.engines.gpu_layers import GpuLayer, collect, gathered
from quantkit.runtime.packed import MANY, SOME, Matrix, Packed

if TYPE_CHECKING:
    from quantkit.runtime.engines.gpu import GpuEngine
    from quantkit.runtime.engines.gpu_layers import Matrices

log = logging.getLogger(__name__)

MOST_THREADS = 16  # more would wait for Python's lock
CLASSES = (8, 16, 32, 64)  # tokens of a matrix for which kernels differ, at most so many


def compile_kernels(engine: "GpuEngine") -> None:
    """All that it will launch."""
    from quantkit.runtime import launches

    log.info("compiling kernels, or loading those of last time (the first time this takes half a minute)")
    begun, n_threads = time.perf_counter(), min(MOST_THREADS, machine.cores())
    n = launches.compile_at_once(partial(launch_everything, engine), n_threads, engine.device)
    log.info("%d kernels are there after %.1f s", n, time.perf_counter() - begun)


@torch.inference_mode()
def launch_everything(engine: "GpuEngine") -> None:
    """What prompts and steps launch, where nothing is launched: it leaves nothing in the engine that counts."""
    c, kinds = engine.config, distinct_layers(engine)
    layers = [engine.layers[i] for i in kinds]
    for n in rows_of_steps(engine):
        for _ in engine._pieces(n, 1, kinds):
            pass
    engine.embedding([0])
    for n in (1, *CLASSES):
        engine._logits(torch.zeros(n, c.d, device=engine.device))
    few = () if engine.by_steps else (1, *CLASSES)
    for matrix in {shape_of(matrix): matrix for layer in layers for matrix in of_prompts(layer)}.values():
        if isinstance(matrix, Packed):
            for n in (*few, SOME + 1):
                matrix(torch.zeros(n, matrix.n_in, dtype=engine.dtype, device=engine.device))
    for layer in layers:
        layer.weights(None)  # dequantizes those of attention
        if layer.resident is not None:
            launch_experts(engine, layer.resident, 1)
    for experts in an_expert_of_each_kind(engine):
        for n in (*CLASSES, MANY + 1):
            launch_experts(engine, experts, n)


def rows_of_steps(engine: "GpuEngine") -> list[int]:
    """Of those that there may be; of more than SHORT some, whose kernels all others have too."""
    most = max(engine.n_slots, SHORT if engine.by_steps else 1)
    return sorted({rows_of(n) for n in (*ROWS, *range(2 * SHORT, most, SHORT), most) if n <= most})


def of_prompts(layer: GpuLayer) -> list[Matrix]:
    """Matrices that all tokens of a prompt are multiplied by."""
    q = layer.q[::2] if isinstance(layer.q, tuple) else (layer.q,)
    return [*q, layer.kv_a, layer.output, *(layer.feed or ())]


def shape_of(matrix: Matrix) -> Hashable:
    """What kernels depend on."""
    return (matrix.qtype, matrix.data.shape) if isinstance(matrix, Packed) else matrix.weights.shape


def distinct_layers(engine: "GpuEngine") -> list[int]:
    """The first layer of each kind, in order."""
    found: dict[Hashable, int] = {}
    for i, layer in enumerate(engine.layers):
        experts = layer.resident or (layer.hot.matrices if layer.hot else ())
        parts = of_prompts(layer), (layer.k_b, layer.v_b), experts
        there = layer.router and (layer.router.bias is None), layer.on_cpu is None, layer.hot is None
        found.setdefault((there, *(tuple(map(shape_of, part)) for part in parts)), i)
    return list(found.values())


def an_expert_of_each_kind(engine: "GpuEngine") -> Iterator["Matrices"]:
    """gate, up and down of one expert, of layers whose experts the GPU may multiply."""
    known = set[tuple[str, ...]]()
    for layer in engine.layers:
        kind = tuple(stack.qtype for stack in layer.stacks or ())
        if kind and kind not in known:
            known.add(kind)
            yield engine.upload(layer.stacks or [], [0])


def launch_experts(engine: "GpuEngine", experts: "Matrices", n: int) -> None:
    """What a prompt does with experts, the first of which so many tokens chose."""
    c, device = engine.config, engine.device
    x, order = torch.zeros(n, c.d, dtype=engine.dtype, device=device), torch.arange(n, device=device)
    stops = torch.full((len(experts[0]),), n, dtype=torch.int32, device=device)
    part = gathered(x, experts, order, stops, 1)
    nowhere = torch.full((n, c.n_used), -1, device=device)
    out = torch.zeros(n, c.d, device=device)
    collect(out, part, nowhere, torch.zeros(n, c.n_used, device=device), 0)
