"""What the CUDA graphs of decoding read and write, always at the same place."""

import torch

from quantkit.models.config import ModelConfig
from quantkit.runtime.rope import frequencies


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
        self.at, self.at_host = pair(3 * n_slots, dtype=torch.int64)
        self.sent, self.sent_host = pair(n_slots * (c.d + 2 * c.n_used))
        self.got, self.got_host = pair(n_slots, c.d)
        self.logits, self.logits_host = pair(n_slots, c.n_vocab)
        self.turns = frequencies(c).to(device)
        self.arrived = torch.cuda.Event() if on_gpu else None

    def to_send(self, flat: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of `sent` or its twin: x float32 [n, d], weights float32 and experts int32 [n, n_used]."""
        c = self.config
        x, weight, ids = flat[: n * (c.d + 2 * c.n_used)].split([n * c.d, n * c.n_used, n * c.n_used])
        return x.view(n, -1), weight.view(n, -1), ids.view(torch.int32).view(n, -1)

    def send(self, n: int) -> None:
        """Start on the way to the CPU what n sequences need."""
        size = n * (self.config.d + 2 * self.config.n_used)
        self.sent_host[:size].copy_(self.sent[:size], non_blocking=True)
        if self.arrived:
            self.arrived.record()

    def received(self, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What `send` sent, once it is there."""
        if self.arrived:
            self.arrived.synchronize()
        return self.to_send(self.sent_host, n)

    def answer(self, y: torch.Tensor) -> None:
        """Start on the way back what experts gave, float32 [n, d]."""
        self.got_host[: len(y)] = y
        self.got[: len(y)].copy_(self.got_host[: len(y)], non_blocking=True)
