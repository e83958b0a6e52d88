"""What the CUDA graphs of decoding read and write, always at the same place."""

import os
import time

import torch

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import use_kernels
from quantkit.runtime.rope import frequencies


MAPPED = True  # switch


class Buffers:
    """Of at most n_slots sequences; `h_host` and its like: the pinned twin on the CPU.

    h: residual stream. at: cell of the cache, position and slot of each new token. sent: what experts on the CPU need.
    got: what they answer. turns: angle per position of each rotated pair.
    """

    def __init__(self, c: ModelConfig, n_slots: int, device: torch.device):
        self.config, on_gpu = c, device.type == "cuda"

        def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=on_gpu)
            return torch.zeros(shape, dtype=dtype, device=device), host

        self.h, self.h_host = pair(n_slots, c.d)
        self.at, self.at_host = pair(3 * n_slots + 1, dtype=torch.int64)
        self.sent, self.sent_host = pair(n_slots * (c.d + 2 * c.n_used))
        self.got, self.got_host = pair(n_slots, c.d)
        self.logits, self.logits_host = pair(n_slots, c.n_vocab)
        self.turns = frequencies(c).to(device)
        self.arrived = torch.cuda.Event() if on_gpu else None
        self.mapped = MAPPED and use_kernels(device.type) and os.environ.get("CUDA_LAUNCH_BLOCKING", "0") in ("", "0")
        self.step = 0
        _, self.sent_flags = pair(c.n_layer, -(-n_slots // 16) * 16, dtype=torch.int32)
        _, self.got_flags = pair(c.n_layer, 16, dtype=torch.int32)

    def begin(self) -> None:
        """Another step."""
        self.step = (self.step + 1) & 0x7FFFFFFF
        self.at_host[-1] = self.step

    def put(self, layer: int, x: torch.Tensor, weight: torch.Tensor, ids: torch.Tensor) -> None:
        """On the GPU: what the CPU is to have."""
        n = len(x)
        if self.mapped:
            from quantkit.runtime import step_kernels

            to = self.to_send(self.sent_host, n)
            step_kernels.send(x, weight, ids, to, self.sent_flags[layer], self.at[-1:])
        else:
            for to, value in zip(self.to_send(self.sent, n), (x, weight, ids), strict=True):
                to.copy_(value)

    def take(self, layer: int, n: int) -> torch.Tensor:
        """On the GPU: what the CPU has given."""
        if self.mapped:
            from quantkit.runtime import step_kernels

            step_kernels.receive(self.got_host[:n], self.got[:n], self.got_flags[layer], self.at[-1:])
        return self.got[:n]

    def let_go(self) -> None:
        """After an error: let the GPU wait for nothing."""
        self.got_flags.fill_(self.step)

    def to_send(self, flat: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of `sent` or its twin: x float32 [n, d], weights float32 and experts int32 [n, n_used]."""
        c = self.config
        x, weight, ids = flat[: n * (c.d + 2 * c.n_used)].split([n * c.d, n * c.n_used, n * c.n_used])
        return x.view(n, -1), weight.view(n, -1), ids.view(torch.int32).view(n, -1)

    def send(self, n: int) -> None:
        """Start on the way to the CPU what n sequences need."""
        if self.mapped:
            return
        size = n * (self.config.d + 2 * self.config.n_used)
        self.sent_host[:size].copy_(self.sent[:size], non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def received(self, layer: int, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `send` sent, once it is there."""
        if self.mapped:
            flags, stream = self.sent_flags[layer, :n].numpy(), torch.cuda.current_stream()
            looks = 0
            while not (flags == self.step).all():
                time.sleep(0)  # others may run
                looks += 1
                if looks % 4096 == 0 and stream.query() and not (flags == self.step).all():
                    raise QuantkitError("the GPU ended a step before its time")
        elif self.arrived:
            self.arrived.synchronize()
        return self.to_send(self.sent_host, n)

    def answer(self, layer: int, y: torch.Tensor) -> None:
        """Start on the way back what experts gave, float32 [n, d]."""
        self.got_host[: len(y)] = y
        if self.mapped:
            self.got_flags[layer, 0] = self.step
            return
        self.got[: len(y)].copy_(self.got_host[: len(y)], non_blocking=True)
