"""The kernels that an engine launches in prompts and steps of any length, compiled at once when it is opened.

Its own functions are called, without launching anything, for each kind of layer, of matrix and of expert: there is a
kernel for each type and width, for 8, 16, 32 and 64 tokens of a matrix, and for addresses and numbers that Triton knows
to be multiples of 16, or 1.
"""

import logging
import time
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING

import torch

from quantkit import machine
from quantkit.errors import QuantkitError
from quantkit.runtime.engines.gpu_layers import GpuLayer, distinct_experts, try_out
from quantkit.runtime.packed import MANY, SOME, Matrix, Packed

if TYPE_CHECKING:
    from quantkit.runtime.engines.gpu import GpuEngine

log = logging.getLogger(__name__)

MOST_THREADS = 16  # more would wait for Python's lock
CLASSES = (8, 16, 32, 64)  # tokens of a matrix for which kernels differ, at most so many


def compile_kernels(engine: "GpuEngine") -> None:
    """All that it will launch. QuantkitError if they cannot be compiled here."""
    from quantkit.runtime import launches

    log.info("compiling kernels, or loading those of last time (the first time half a minute by 16 cores)")
    begun, n_threads = time.perf_counter(), min(MOST_THREADS, machine.cores())
    try:
        n = launches.compile_at_once(partial(launch_everything, engine), n_threads, engine.device)
    except torch.OutOfMemoryError:
        raise
    except launches.REFUSED as error:
        raise QuantkitError(
            f"Triton cannot compile kernels here: {error}; it needs a C compiler and Python's headers "
            "(docs/install.md); without Triton (pip uninstall triton) torch computes, slower"
        ) from error
    log.info("%d kernels are there after %.1f s", n, time.perf_counter() - begun)


@torch.inference_mode()
def launch_everything(engine: "GpuEngine") -> None:
    """What prompts and steps launch, where nothing is launched: it leaves nothing in the engine that counts."""
    c, kinds = engine.config, distinct_layers(engine)
    layers = [engine.layers[i] for i in kinds]
    for n in engine.buffers.kinds(engine.n_slots, engine.by_steps):
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
        for heads in (layer.k_b, layer.v_b):
            heads.dense()
        if layer.router is not None:  # steps look for frames too
            engine.between.route(torch.zeros(1, c.d, device=engine.device), layer.router)
        if layer.resident is not None:
            try_out(layer.resident, 1, c.n_used)
    for stacks in distinct_experts(engine.layers):
        expert = engine.upload(stacks, [0])
        for n in (*CLASSES, MANY + 1):
            try_out(expert, n, c.n_used)


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
