"""What the CUDA graphs of decoding read and write, always at the same place, and how a step passes from GPU to CPU and
back in the middle of one graph."""

import os
import select
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import use_kernels
from quantkit.runtime.experts.native import Rows
from quantkit.runtime.rope import frequencies

if TYPE_CHECKING:
    from quantkit.runtime.engines.gpu_layers import OnCpu

LINE = 16  # int32 in a line of the CPU's cache: flags of different layers lie in lines of their own
LOOKS = 4096  # at a flag, between two looks whether the GPU is still at work
ALIGN = 256  # bytes at which rows of the embedding begin

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a step: the first that its tokens fit in, or there would be a
# graph for each number of users
SHORT = ROWS[-1]  # tokens of prompts that can be a step

Sent = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x float32 [n, d], weights float32 and experts int32 [n, n_used]."""


def rows_of(n: int) -> int:
    """Rows of a step for n tokens: those that are too many repeat the last."""
    return next((rows for rows in ROWS if rows >= n), n)


class Buffers:
    """Of a step of at most n_rows tokens; `start_host` and its like: the pinned twin on the CPU, of which `at_there`
    and `tokens_there` are views. The CPU may write there while no step is at work.

    start: what a step begins with: `at`, cell of the cache, position and slot of each new token, last the step's
    number; from byte `before` on `tokens`, their rows of the embedding, uint8 [n_rows, row_bytes]. sent: what experts
    on the CPU need. got: what they answer. turned: cos and sin of each rotated pair at every position.

    mapped: kernels of the GPU write `sent_host` and read `got_host` themselves, and each side tells the other by a flag
    in the host's memory, which gets the number of the step. Without (no kernels; launches that wait): copies and events
    between several graphs.
    """

    def __init__(self, c: ModelConfig, n_rows: int, rows: int, row_bytes: int, device: torch.device):
        """rows: positions of the cache. row_bytes: of a token, as `Embedding` sends it."""
        self.config, self.on_gpu = c, device.type == "cuda"

        def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=self.on_gpu)
            return torch.zeros(shape, dtype=dtype, device=device), host

        n_at = 8 * (3 * n_rows + 1)
        self.before = -(-n_at // ALIGN) * ALIGN
        self.start, self.start_host = pair(self.before + n_rows * row_bytes, dtype=torch.uint8)
        self.at, self.tokens = self.start[:n_at].view(torch.int64), self.start[self.before :].view(n_rows, row_bytes)
        flat = self.start_host.numpy()
        self.at_there, self.tokens_there = flat[:n_at].view(np.int64), flat[self.before :].reshape(n_rows, row_bytes)
        self.sent, self.sent_host = pair(n_rows * (c.d + 2 * c.n_used))
        self.got, self.got_host = pair(n_rows, c.d)
        self.logits_host = torch.zeros(n_rows, c.n_vocab, pin_memory=self.on_gpu)
        angle = torch.arange(rows, device=device)[:, None].float() * frequencies(c).to(device)
        self.turned = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
        self.arrived = torch.cuda.Event() if self.on_gpu else None
        self.mapped = use_kernels(device.type) and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") in ("", "0")
        self.sent_flags = torch.zeros(c.n_layer, -(-n_rows // LINE) * LINE, dtype=torch.int32, pin_memory=self.on_gpu)
        self.got_flags = torch.zeros(c.n_layer, LINE, dtype=torch.int32, pin_memory=self.on_gpu)
        self.kept = torch.zeros(n_rows, c.n_used, dtype=torch.int32)  # experts that a layer's rows were answered by
        # The same memory, with less ado.
        self.seen, self.told, self.given = (t.numpy() for t in (self.sent_flags, self.got_flags, self.got_host))
        self.step = self.n = self.m = 0
        self.parts: dict[int, Sent] = {}  # of `sent_host`, for so many rows
        self.exchanges: dict[tuple[int, int, OnCpu], Callable[[int], bool] | None] = {}

    def kinds(self, n_slots: int, prompts: bool) -> list[int]:
        """Rows of the steps that there may be of so many sequences, and of short prompts too. Of more than SHORT some,
        which need the same kernels as those between them."""
        most = max(n_slots, SHORT if prompts else 1)
        return sorted({rows_of(n) for n in (*ROWS, *range(2 * SHORT, most, SHORT), most) if n <= most})

    def begin(self, n: int, m: int, where: tuple[Sequence[int], Sequence[int], Sequence[int]]) -> None:
        """Say where n tokens are, whose rows are in `tokens_there`: cells, positions, slots. The step has m rows: those
        that are too many repeat the last, and so write the same to the same cell."""
        self.n, self.m, self.step = n, m, (self.step + 1) & 0x7FFFFFFF
        self.tokens_there[n:m] = self.tokens_there[n - 1]
        for begin, part in zip(range(0, 3 * m, m), where, strict=True):
            self.at_there[begin : begin + n] = part
            self.at_there[begin + n : begin + m] = part[-1]
        self.at_there[-1] = self.step

    def fetch(self, m: int) -> torch.Tensor:
        """On the GPU: what `begin` was told. Rows of m tokens, uint8 [m, row_bytes]."""
        size = self.before + m * self.tokens.shape[1]
        self.start[:size].copy_(self.start_host[:size], non_blocking=True)
        return self.tokens[:m]

    def finish(self, logits: torch.Tensor) -> None:
        """On the GPU: the step's end, [m, n_vocab]."""
        self.logits_host[: len(logits)].copy_(logits, non_blocking=True)

    def logits(self) -> torch.Tensor:
        """Of the step that was launched, float32 [n, n_vocab], once they are there; valid until the next one."""
        self._rest()
        return self.logits_host[: self.n]

    def _rest(self) -> None:
        """Wait until the GPU has done all that it was given."""
        if self.on_gpu:
            torch.cuda.current_stream().synchronize()

    def _parts(self, flat: torch.Tensor, m: int) -> Sent:
        """Views of `sent` or its twin."""
        c = self.config
        x, weight, ids = flat[: m * (c.d + 2 * c.n_used)].split([m * c.d, m * c.n_used, m * c.n_used])
        return x.view(m, -1), weight.view(m, -1), ids.view(torch.int32).view(m, -1)

    def put(self, layer: int, x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> None:
        """On the GPU, before `send`: what experts on the CPU are to have."""
        if self.mapped:
            from quantkit.runtime import hand_over_kernels

            to = self._parts(self.sent_host, len(x))
            hand_over_kernels.send((x, weight, ids), to, self.sent_flags[layer], self.at[-1:])
        else:
            for part, value in zip(self._parts(self.sent, len(x)), (x, weight, ids), strict=True):
                part.copy_(value)

    def send(self) -> None:
        """What was put is on its way to the CPU."""
        if not self.mapped:
            size = self.m * (self.config.d + 2 * self.config.n_used)
            self.sent_host[:size].copy_(self.sent[:size], non_blocking=True)
            if self.arrived:
                self.arrived.record()

    def answer(self, layer: int, experts: "OnCpu") -> torch.Tensor:
        """Give the GPU what experts make of the rows that it sends. Whose experts they were: int32 [n, n_used], valid
        until the next layer's."""
        if exchange := self._exchange(layer, experts):
            while not exchange(self.step):
                self._look(layer)
            return self.kept[: self.n]
        experts.wake()
        x, weight, ids = self._received(layer)
        self.kept[: self.n] = ids
        self._give(layer, experts(x, ids, weight))
        return self.kept[: self.n]

    def _exchange(self, layer: int, experts: "OnCpu") -> Callable[[int], bool] | None:
        """Both ways by compiled code, where there is some."""
        if not self.mapped:
            return None
        key = layer, self.n, experts  # m follows from n
        if key not in self.exchanges:
            x, weight, ids = self._parts(self.sent_host, self.m)
            back = (self.got_host, self.kept, self.sent_flags[layer], self.got_flags[layer])
            self.exchanges[key] = experts.exchange(Rows(self.n, self.m, x, ids, weight, *back))
        return self.exchanges[key]

    def _received(self, layer: int) -> Sent:
        """What was sent of n sequences, once it is there."""
        if self.mapped:
            self._wait(layer)
        elif self.arrived:
            self.arrived.synchronize()
        if self.n not in self.parts:
            x, weight, ids = self._parts(self.sent_host, self.m)
            self.parts[self.n] = x[: self.n], weight[: self.n], ids[: self.n]
        return self.parts[self.n]

    def _wait(self, layer: int) -> None:
        looks = 0
        while self._missing(layer):
            select.select((), (), (), 0)  # threads that need the interpreter go on; time.sleep(0) takes 50 us
            looks += 1
            if looks % LOOKS == 0:
                self._look(layer)

    def _missing(self, layer: int) -> bool:
        return bool((self.seen[layer, : self.m] != self.step).any())

    def _look(self, layer: int) -> None:
        """Whether the GPU is still at work. CUDA's errors are raised here too."""
        if self.on_gpu and torch.cuda.current_stream().query() and self._missing(layer):
            raise QuantkitError("the GPU has ended a step that waits for the CPU")

    def _give(self, layer: int, y: torch.Tensor) -> None:
        """What experts made of n rows, float32 [n, d]."""
        n, m = self.n, self.m
        self.given[:n] = y.numpy()
        if m > n:
            self.given[n:m] = self.given[n - 1]
        if self.mapped:
            self.told[layer, 0] = self.step
        else:
            self.got[:m].copy_(self.got_host[:m], non_blocking=True)

    def take(self, layer: int, m: int) -> torch.Tensor:
        """On the GPU, after `answer`, or waiting for it: float32 [m, d]."""
        if self.mapped:
            from quantkit.runtime import hand_over_kernels

            hand_over_kernels.receive(self.got_host[:m], self.got[:m], self.got_flags[layer], self.at[-1:])
        return self.got[:m]

    def let_go(self) -> None:
        """After an error on the CPU: the GPU does not wait for the rest of the step, and has ended what was launched
        of it when this returns."""
        self.told[:] = self.step
        self._rest()
