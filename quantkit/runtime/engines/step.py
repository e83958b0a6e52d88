"""What a decoding step does between its products with matrices: by torch, or by Triton's kernels on a GPU."""

import logging
from typing import Protocol

import torch
import torch.nn.functional as F

from quantkit.models.config import ModelConfig
from quantkit.runtime.activations import FEW, Activations, Where, use_kernels
from quantkit.runtime.layers import Router, route

log = logging.getLogger(__name__)

Added = tuple[torch.Tensor | None, torch.Tensor | None]
"""To the residual stream, float32 [n, d]."""

Chosen = tuple[torch.Tensor, torch.Tensor]
"""Outputs of experts float32 [n · k, d], and their shares [n, k]."""


class Between(Protocol):
    """The operations; c and eps are the model's."""

    def gated(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> Activations:
        """silu(gate) · up, or gate alone without up: float32 [n, n_in]."""

    def norm(
        self, h: torch.Tensor, weight: torch.Tensor, added: Added = (None, None), chosen: Chosen | None = None
    ) -> tuple[torch.Tensor, Activations]:
        """h float32 [n, d] + what is added, and its RMS norm."""

    def place(
        self, q: torch.Tensor, kv: torch.Tensor, kv_norm: torch.Tensor, cache: torch.Tensor, where: Where
    ) -> tuple[Activations, torch.Tensor]:
        """Write the new tokens' cells of a layer's cache [n_slots, rows, kv_lora + qk_rope], from kv [n, kv_lora +
        qk_rope]. Their queries [n, n_head · qk_head] apart: [n · n_head, qk_nope], and the rest rotated, float32 [n,
        n_head, qk_rope]."""

    def attend(
        self, query: torch.Tensor, rotated: torch.Tensor, cache: torch.Tensor, where: Where, n_kv: int
    ) -> Activations:
        """Attention over at most the first n_kv positions; query float32 [n, n_head, kv_lora] -> [n · n_head,
        kv_lora]."""

    def route(
        self, x: torch.Tensor, router: Router, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As layers.route: experts int32 and their weights [n, n_used]. table: int32 [n_expert], of each expert its
        frame, or -1; then also the frames, int32 [n, n_used], and experts that have one are given as ~expert (< 0)."""


class ByTorch:
    """`Between`, on any device."""

    def __init__(self, c: ModelConfig):
        self.c = c

    def gated(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> Activations:
        """As `Between`."""
        return Activations(gate if up is None else F.silu(gate) * up)

    def norm(
        self, h: torch.Tensor, weight: torch.Tensor, added: Added = (None, None), chosen: Chosen | None = None
    ) -> tuple[torch.Tensor, Activations]:
        """As `Between`."""
        for part in added:
            h = h if part is None else h + part
        if chosen:
            y, shares = chosen
            h = h + (y.view(*shares.shape, -1) * shares[..., None]).sum(1)
        return h, Activations(F.rms_norm(h, weight.shape, weight, self.c.rms_eps))

    def place(
        self, q: torch.Tensor, kv: torch.Tensor, kv_norm: torch.Tensor, cache: torch.Tensor, where: Where
    ) -> tuple[Activations, torch.Tensor]:
        """As `Between`."""
        c, n = self.c, len(q)
        q = q.view(n, c.n_head, c.qk_head)
        latent, key = kv.split([c.kv_lora, c.qk_rope], dim=-1)
        latent = F.rms_norm(latent, (c.kv_lora,), kv_norm, c.rms_eps)
        pairs = torch.cat((q[..., c.qk_nope :], key[:, None]), dim=1).view(n, c.n_head + 1, -1, 2)
        turned = torch.view_as_complex(where.turned[where.positions].view(n, 1, -1, 2))
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * turned).flatten(2)
        cells = cache.view(-1, cache.shape[-1])
        cells.index_copy_(0, where.cells, torch.cat((latent, rotated[:, -1]), dim=-1).to(cache.dtype))
        return Activations(q[..., : c.qk_nope].reshape(n * c.n_head, -1)), rotated[:, :-1]

    def attend(
        self, query: torch.Tensor, rotated: torch.Tensor, cache: torch.Tensor, where: Where, n_kv: int
    ) -> Activations:
        """As `Between`."""
        c, columns = self.c, torch.arange(n_kv, device=query.device)
        hidden = torch.zeros(len(query), n_kv, device=query.device)
        hidden = hidden.masked_fill_(columns > where.positions[:, None], float("-inf"))[:, None]
        keys = cache[:, :n_kv].index_select(0, where.slots).float()
        query = torch.cat((query, rotated), dim=-1)
        scores = torch.baddbmm(hidden, query, keys.transpose(1, 2), alpha=c.softmax_scale)
        return Activations((scores.softmax(-1) @ keys[..., : c.kv_lora]).flatten(0, 1))

    def route(
        self, x: torch.Tensor, router: Router, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `Between`."""
        expert, weight = route(x, router, self.c)
        ids = expert.int()
        if table is None:
            return ids, weight, None
        frames = table[expert]
        return torch.where(frames < 0, ids, ~ids), weight, frames


class ByKernels:
    """`Between`, by Triton."""

    def __init__(self, c: ModelConfig):
        from quantkit.runtime import route_kernels, run_kernels, step_kernels

        self.c, self.router, self.step, self.runs = c, route_kernels, step_kernels, run_kernels

    def gated(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> Activations:
        """As `Between`."""
        return self.step.gated(gate, up)

    def norm(
        self, h: torch.Tensor, weight: torch.Tensor, added: Added = (None, None), chosen: Chosen | None = None
    ) -> tuple[torch.Tensor, Activations]:
        """As `Between`."""
        h, x = self.step.norm(h, added, chosen, weight, self.c.rms_eps)
        return h, x if len(h) <= FEW else x._replace(halves=self.runs.halves(x.x))

    def place(
        self, q: torch.Tensor, kv: torch.Tensor, kv_norm: torch.Tensor, cache: torch.Tensor, where: Where
    ) -> tuple[Activations, torch.Tensor]:
        """As `Between`."""
        return self.step.place(q, kv, kv_norm, cache, where, self.c)

    def attend(
        self, query: torch.Tensor, rotated: torch.Tensor, cache: torch.Tensor, where: Where, n_kv: int
    ) -> Activations:
        """As `Between`."""
        return self.step.attend(query, rotated, cache, where, n_kv, self.c)

    def route(
        self, x: torch.Tensor, router: Router, table: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """As `Between`."""
        return self.router.route(self.router.scores(x, router.weight), router.bias, table, self.c)


def between_of(c: ModelConfig, device: torch.device) -> Between:
    """Those that suit the device and the model's widths; a line if a GPU has to do without kernels."""
    slower = "no Triton: a decoding step is computed by torch, its products too, slower; pip install triton"
    if use_kernels(device.type):
        from quantkit.runtime import step_kernels

        if step_kernels.able(c):
            return ByKernels(c)
        slower = "no kernels for this model's widths: a decoding step is computed by torch between products, slower"
    if device.type == "cuda":
        log.warning(slower)
    return ByTorch(c)
