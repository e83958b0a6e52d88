"""What the CUDA graphs of decoding read and write, always at the same place, and how a step passes from GPU to CPU and
back in the middle of one graph."""

import os
import time

import torch

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import use_kernels
from quantkit.runtime.rope import frequencies

LINE = 16  # int32 in a line of the CPU's cache: flags of different layers lie in lines of their own
LOOKS = 4096  # at a flag, between two looks whether the GPU is still at work

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a step: the first that its tokens fit in, or there would be a
# graph for each number of users
SHORT = ROWS[-1]  # tokens of prompts that can be a step

Sent = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""x float32 [n, d], weights float32 and experts int32 [n, n_used]."""


def rows_of(n: int) -> int:
    """Rows of a step for n tokens: those that are too many repeat the last."""
    return next((rows for rows in ROWS if rows >= n), n)


class Buffers:
    """Of a step of at most n_rows tokens; `h_host` and its like: the pinned twin on the CPU.

    h: residual stream. at: cell of the cache, position and slot of each new token, last the step's number. sent: what
    experts on the CPU need. got: what they answer. turned: cos and sin of each rotated pair at every position.

    mapped: kernels of the GPU write `sent_host` and read `got_host` themselves, and each side tells the other by a flag
    in the host's memory, which gets the number of the step. Without (no kernels; launches that wait): copies and events
    between several graphs.
    """

    def __init__(self, c: ModelConfig, n_rows: int, rows: int, device: torch.device):
        """rows: positions of the cache."""
        self.config, on_gpu = c, device.type == "cuda"

        def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)
            return torch.zeros(shape, dtype=dtype, device=device), host

        self.h, self.h_host = pair(n_rows, c.d)
        self.at, self.at_host = pair(3 * n_rows + 1, dtype=torch.int64)
        self.sent, self.sent_host = pair(n_rows * (c.d + 2 * c.n_used))
        self.got, self.got_host = pair(n_rows, c.d)
        self.logits, self.logits_host = pair(n_rows, c.n_vocab)
        angle = torch.arange(rows, device=device)[:, None].float() * frequencies(c).to(device)
        self.turned = torch.stack((angle.cos(), angle.sin()), dim=-1).flatten(1)
        self.arrived = torch.cuda.Event() if on_gpu else None
        self.mapped = use_kernels(device.type) and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") in ("", "0")
        self.sent_flags = torch.zeros(c.n_layer, -(-n_rows // LINE) * LINE, dtype=torch.int32, pin_memory=on_gpu)
        self.got_flags = torch.zeros(c.n_layer, LINE, dtype=torch.int32, pin_memory=on_gpu)
        # The same memory, with less ado.
        self.seen, self.told, self.given = (t.numpy() for t in (self.sent_flags, self.got_flags, self.got_host))
        self.step = self.n = self.m = 0
        self.parts: dict[int, Sent] = {}  # of `sent_host`, for so many rows

    def begin(self, n: int, m: int, where: tuple[list[int], list[int], list[int]]) -> None:
        """Send `h_host` and where n tokens are: cells, positions, slots. The step has m rows: those
        that are too many repeat the last, and so write the same to the same cell."""
        self.n, self.m, self.step = n, m, (self.step + 1) & 0x7FFFFFFF
        self.h_host[n:m] = self.h_host[n - 1]
        self.at_host[: 3 * m] = torch.tensor([number for part in where for number in part + part[-1:] * (m - n)])
        self.at_host[-1] = self.step
        self.h[:m].copy_(self.h_host[:m], non_blocking=True)
        self.at.copy_(self.at_host, non_blocking=True)

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

    def received(self, layer: int) -> Sent:
        """What was sent of n sequences, once it is there."""
        if self.mapped:
            self._wait(layer)
        elif self.arrived:
            self.arrived.synchronize()
        if self.n not in self.parts:  # m follows from n
            x, weight, ids = self._parts(self.sent_host, self.m)
            self.parts[self.n] = x[: self.n], weight[: self.n], ids[: self.n]
        return self.parts[self.n]

    def _wait(self, layer: int) -> None:
        flags, looks = self.seen[layer, : self.m], 0
        while (flags != self.step).any():
            time.sleep(0)  # threads that need the interpreter go on
            looks += 1
            # query: raises if CUDA has an error
            if looks % LOOKS == 0 and torch.cuda.current_stream().query() and (flags != self.step).any():
                raise QuantkitError("the GPU has ended a step that waits for the CPU")

    def answer(self, layer: int, y: torch.Tensor) -> None:
        """Give the GPU what experts made of n rows, float32 [n, d]."""
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
        """After an error on the CPU: the GPU is not to wait for the rest of the step."""
        self.told[:] = self.step
