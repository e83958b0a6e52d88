"""What the first prompt and token would wait for, and with them whoever is answered meanwhile: done when an engine is
opened."""

import logging
import time
from typing import TYPE_CHECKING

import torch

from quantkit import machine
from quantkit.runtime.engines.gpu_layers import distinct_experts, try_out
from quantkit.runtime.engines.pieces import Pieces, attention, feed_forward
from quantkit.runtime.generate import Piece, piece_at
from quantkit.runtime.packed import MANY

if TYPE_CHECKING:
    from quantkit.runtime.engines.gpu import GpuEngine

log = logging.getLogger(__name__)

WARM_TOKENS = 1024  # of the prompt that an engine begins with
WARM_ROWS = (1, 2, 16, 32, 64)  # tokens of steps that are captured before anybody asks for them


def warm_up(engine: "GpuEngine") -> None:
    """Steps are captured, experts read from the disk, memory pinned and touched. Where memory is limited, or less than
    the file, of experts only those of a few steps are read, and one of each kind; those that only the CPU computes
    would take longer than they save."""
    begun, weights = time.perf_counter(), engine.weights
    movable = all(layer.stacks or layer.router is None for layer in engine.layers)
    fits = weights.residency is None and weights.file.n_bytes < machine.ram()
    if fits and movable:
        log.info("warming up: all experts are read once")
        n = min(WARM_TOKENS, engine.piece, engine.capacity)  # of all kinds: most experts are chosen, as by real text
        engine.prefill(0, [i * engine.config.n_vocab // n for i in range(n)], 0)
    for n in WARM_ROWS:
        for _ in range(2):  # a step is captured when it comes again
            if n <= engine.n_slots:
                engine.length[:n] = [0] * n
                engine.decode(list(range(n)), [0] * n)
            elif fits and movable and n <= engine.capacity:
                engine.prefill(0, [i * engine.config.n_vocab // n for i in range(n)], 0)
    engine.length = [0] * engine.n_slots
    for begin in (0, engine.piece, engine.capacity - piece_at(engine, engine.capacity)):
        whole_piece(engine, begin)
    dense_experts(engine)
    log.info("warmed up in %.1f s", time.perf_counter() - begun)


@torch.inference_mode()
def dense_experts(engine: "GpuEngine") -> None:
    """What a long piece does with experts that many of its tokens choose, by one expert of each kind of layer."""
    for stacks in distinct_experts(engine.layers):
        try_out(engine.upload(stacks, [0]), MANY + 1, engine.config.n_used)


@torch.inference_mode()
def whole_piece(engine: "GpuEngine", begin: int) -> None:
    """The longest piece of a prompt from a position on, through the first layer but for routed experts: libraries make
    plans for new shapes, and memory is asked of the driver, which takes longer than others should wait."""
    c, layer = engine.config, engine.layers[0]
    n = min(piece_at(engine, begin), engine.capacity - begin)
    if begin < 0 or n < 2:
        return
    pieces = Pieces([Piece(0, [0] * n, begin)], c, engine.buffers.turned)
    h = engine.embedding(pieces.tokens)
    with pieces.kernels():
        attention(h, layer, c, engine.cache[0], pieces)
    feed_forward(h, layer, engine.between, c, None, engine.dtype)
