"""Single routed experts in GPU memory: some of a layer's, in frames, and colder ones replaced while tokens are made.

A table on the device says which frame an expert has, or none; the CPU computes those without. Tables change only
between two steps, so both sides always agree. An exchange takes two changes: the one that leaves loses its frame; its
bytes are overwritten by a thread that gives way to those that compute; when that is done the one that comes has the
frame. So which experts are there changes nothing but who computes them.
"""

import logging
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import numpy as np
import torch

from quantkit.runtime.engines.gpu_layers import Frames
from quantkit.runtime.engines.heat import Heat
from quantkit.runtime.engines.stacks import expert_bytes

log = logging.getLogger(__name__)

BACKGROUND = 1 / 16  # bytes moved for each byte of experts that the CPU multiplies in a step
AT_ONCE = 4  # experts exchanged together, at most
PART = 1 << 20  # bytes copied at once: what a step sends over the bus waits for no more than that
NICE = 10  # of the thread that copies


class Move(NamedTuple):
    """An expert that comes to a frame."""

    layer: int
    frame: int
    expert: int


class HotExperts:
    """The frames of all layers, and what is exchanged in them. chosen, hits: experts that tokens chose in layers with
    frames, and those that were there. moved: experts that have come."""

    def __init__(self, heat: Heat, device: torch.device):
        n_layer, n_expert = heat.choices.shape
        self.heat, self.device, self.on_gpu = heat, device, device.type == "cuda"
        self.here = np.zeros((n_layer, n_expert), bool)
        self.tables_host = torch.full((n_layer, n_expert), -1, dtype=torch.int32, pin_memory=self.on_gpu)
        self.tables = self.tables_host.to(device)
        self.layers: dict[int, Frames] = {}
        self.numbers = np.zeros(0, np.int64)  # of the layers with frames
        self.seen: dict[int, np.ndarray] = {}
        self.chosen = self.hits = self.moved = 0
        self.credit = 0.0
        self.moves: list[Move] = []
        self.moving: Future | None = None
        self.held = False
        self.thread = ThreadPoolExecutor(1, "quantkit-hot", _give_way)
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.free = torch.cuda.Event() if self.on_gpu else None
        self.buffer = torch.empty(0)

    def add(self, layer: int, frames: Frames) -> None:
        """A layer of which not all experts are there."""
        self.layers[layer] = frames
        self.numbers = np.array(sorted(self.layers))
        self.here[layer, frames.experts] = True
        self.tables_host[layer, frames.experts] = torch.arange(len(frames.experts), dtype=torch.int32)
        self.tables.copy_(self.tables_host)
        size = expert_bytes(frames.stacks)
        if size * AT_ONCE > self.buffer.numel():
            self.buffer = torch.empty(size * AT_ONCE, dtype=torch.uint8, pin_memory=self.on_gpu)

    def note(self, layer: int, ids: torch.Tensor) -> None:
        """What a step chose in a layer: int32 [n, n_used] on the CPU, ~expert for those that have a frame."""
        if layer in self.layers:
            self.seen[layer] = ids.flatten().numpy().copy()

    @contextmanager
    def still(self) -> Iterator[None]:
        """Nothing is exchanged inside: for prompts, whose layers look at the frames more than once."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before

    def between_steps(self, n_tokens: int) -> None:
        """Take note of what a step of so many tokens chose; give frames to what has come; begin another exchange if
        enough was computed meanwhile."""
        if self.held or len(self.seen) != len(self.layers) or not self.layers:
            self.seen.clear()
            return
        self._count(n_tokens)
        if self.moving is not None and self.moving.done():
            self._arrived(self.moving)
        if self.moving is None and self.credit >= self.buffer.numel() / AT_ONCE:
            self._begin()

    def settle(self) -> None:
        """Wait for what is on its way."""
        if self.moving is not None:
            self._arrived(self.moving)

    def _count(self, n_tokens: int) -> None:
        seen = np.stack([self.seen[int(layer)] for layer in self.numbers])
        self.seen.clear()
        missed = (seen >= 0).sum(1)
        self.chosen += seen.size
        self.hits += seen.size - int(missed.sum())
        self.heat.add(self.numbers, np.where(seen < 0, ~seen, seen), n_tokens)
        sizes = [expert_bytes(self.layers[int(layer)].stacks) for layer in self.numbers]
        self.credit = min(self.credit + BACKGROUND * float(missed @ sizes), float(self.buffer.numel()))

    def _begin(self) -> None:
        affordable = int(self.credit * AT_ONCE / self.buffer.numel())
        swaps = self.heat.swaps(self.here, self.numbers, affordable)
        if not swaps:
            self.credit = 0.0  # not to look again at every step
            return
        for layer, leaves, comes in swaps:
            frames = self.layers[layer]
            frame = frames.experts.index(leaves)
            frames.experts[frame] = -1
            self.here[layer, leaves] = False
            self.tables_host[layer, leaves] = -1
            self.moves.append(Move(layer, frame, comes))
            self.credit -= expert_bytes(frames.stacks)
        self._publish()
        if self.free is not None:
            self.free.record()  # after every step that has read these frames
        self.moving = self.thread.submit(self._move, list(self.moves))

    def _publish(self) -> None:
        """The host's table is read before the step's end, where the caller waits for the logits."""
        self.tables.copy_(self.tables_host, non_blocking=True)

    @torch.inference_mode()  # of each thread its own, and the frames may have been made in it
    def _move(self, moves: list[Move]) -> None:
        at = 0
        with torch.cuda.stream(self.stream) if self.on_gpu else nullcontext():
            if self.stream is not None:
                assert self.free is not None
                self.stream.wait_event(self.free)
            for move in moves:
                frames = self.layers[move.layer]
                for stack, matrix in zip(frames.stacks, frames.matrices, strict=True):
                    host = self.buffer[at : at + stack.data[0].nbytes]
                    at += len(host)
                    if stack.read is None:
                        np.copyto(host.numpy(), stack.data[move.expert].reshape(-1))
                    else:
                        stack.read(move.expert, host.numpy())
                    for to, part in zip(matrix.data[move.frame].view(-1).split(PART), host.split(PART), strict=True):
                        to.copy_(part, non_blocking=True)
            if self.stream is not None:
                self.stream.synchronize()

    def _arrived(self, moving: Future) -> None:
        moves, self.moves, self.moving = self.moves, [], None
        if error := moving.exception():
            log.warning("experts in GPU memory are not exchanged any more: %s", error)
            self.credit = -np.inf
            return
        for move in moves:
            self.layers[move.layer].experts[move.frame] = move.expert
            self.here[move.layer, move.expert] = True
            self.tables_host[move.layer, move.expert] = move.frame
        self.moved += len(moves)
        self._publish()


def _give_way() -> None:
    """This thread runs where nobody computes."""
    if sys.platform == "linux":  # where it is of a thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
