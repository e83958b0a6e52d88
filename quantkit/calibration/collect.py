"""Importance: sums of squared inputs of every weight, measured while text streams through the original layers.

The statistics are those of llama-imatrix (in_sum2 and counts per weight, per expert for routed ones), so that either
tool can use the other's file. `attn_kv_b` is measured besides `attn_k_b` and `attn_v_b`: one file serves both layouts.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch

from quantkit import ranks
from quantkit.calibration.coverage import check_finite
from quantkit.calibration.state import PassState
from quantkit.runtime.experts.streamed import ExpertVisit, StreamedExperts
from quantkit.runtime.layers import Block, Observer
from quantkit.runtime.room import Room
from quantkit.runtime.stream import Source, stream
from quantkit.tensors import Importance

BLOCKS = 32  # of experts in a layer, unless an encoder works on larger ones: what ranks take turns with


class Accumulator:
    """in_sum2 of one layer, summed in float64 on the device where the inputs are.

    Each rank sees its own experts; `finish` puts those of all together, and refuses what is not finite.
    """

    def __init__(self, layer: int, n_expert: int):
        self.layer, self.n_expert = layer, n_expert
        self.block, self.ahead = max(1, n_expert // BLOCKS), 1
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}

    def observe(self, role: str, x: torch.Tensor, _: torch.Tensor) -> None:
        """x [n, n_in], or [n, n_head, n_in] for weights with a matrix per head (which share one count)."""
        squares = x.float().square().sum(0, dtype=torch.float64)
        squares = squares.view(-1, x.shape[-1])
        if role in self.sums:
            self.sums[role] += squares
            self.counts[role] += x.shape[0]
        else:
            self.sums[role] = squares
            self.counts[role] = torch.full((1,), float(x.shape[0]), dtype=torch.float64)

    def observe_expert(self, visit: ExpertVisit) -> None:
        for role, x in (("ffn_gate_exps", visit.x), ("ffn_down_exps", visit.hidden)):
            if role not in self.sums:
                self.sums[role] = torch.zeros(self.n_expert, x.shape[1], dtype=torch.float64, device=x.device)
                self.counts[role] = torch.zeros(self.n_expert, dtype=torch.float64)
            self.sums[role][visit.expert] += x.float().square().sum(0, dtype=torch.float64)
            self.counts[role][visit.expert] += x.shape[0]

    def finish(self) -> dict[str, Importance]:
        if "ffn_gate_exps" in self.sums:  # gate and up read the same rows
            for table in (self.sums, self.counts):
                table["ffn_up_exps"] = table["ffn_gate_exps"]
        entries = {
            f"blk.{self.layer}.{role}.weight": Importance(
                self.sums[role].float().cpu().numpy(), self.counts[role].float().cpu().numpy()
            )
            for role in sorted(self.sums)
        }
        entries = _of_all_ranks(entries) if ranks.count() > 1 else entries
        check_finite(entries)  # here, before a watcher encodes with them
        return entries


def _of_all_ranks(entries: dict[str, Importance]) -> dict[str, Importance]:
    """Sums of experts: a rank has zeros for those of others, so adding is exact. All else every rank has."""
    mine = {name: list(entry.in_sum2.shape) for name, entry in entries.items() if "_exps." in name}
    shapes: dict[str, list[int]] = {}
    for found in ranks.gather(mine):
        shapes |= found
    for name, (n, n_in) in sorted(shapes.items()):
        own = entries.get(name) or Importance(np.zeros((n, n_in), np.float32), np.zeros(n, np.float32))
        entries[name] = Importance(ranks.total(own.in_sum2), ranks.total(own.counts))
    return dict(sorted(entries.items()))


class Watcher(Protocol):
    """Sees one layer being computed: `Accumulator`, or an encoder that also writes the layer.

    block: experts that one rank computes, and this watcher sees, together. ahead: experts to be read while it looks at
    one; as many as it may keep waiting.
    """

    block: int
    ahead: int

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None: ...
    def observe_expert(self, visit: ExpertVisit) -> None: ...
    def finish(self) -> dict[str, Importance]:
        """The layer's importance. All that the layer owes must be safe on disk when this returns."""


def collect(
    source: Source,
    tokens: torch.Tensor,
    state: PassState | None = None,
    *,
    hidden_dtype: torch.dtype = torch.float32,
    room: Room | None = None,
    progress: Callable[[int], None] | None = None,
    watch: Callable[[int], Watcher] | None = None,
) -> dict[str, Importance]:
    """Importance of every weight for tokens int64 [n_chunk, t].

    state: saved after each layer; a pass that was stopped goes on where it was. progress: called after each layer
    with the number of layers finished, once at the start if some were finished before. watch: makes the watcher of a
    layer (default: an `Accumulator`). room: where hidden states live. Ranks share the experts, and each computes all
    the rest.
    """
    # Also: nobody resumes before rank 0 has removed a state.
    ranks.same(state and state.job, "text, checkpoint or device")
    hidden, start = state.resume() if state else (None, 0)
    imatrix: dict[str, Importance] = state.entries(start) if state else {}
    if progress and start:
        progress(start)
    current: Watcher | None = None

    def before(layer: int, block: Block) -> Observer:
        nonlocal current
        current = watch(layer) if watch else Accumulator(layer, source.config.n_expert)
        if isinstance(block.experts, StreamedExperts):
            block.experts.observe = current.observe_expert
            block.experts.shared, block.experts.block, block.experts.ahead = True, current.block, current.ahead
        return current.observe

    for layer in stream(source, tokens, before, hidden=hidden, start=start, hidden_dtype=hidden_dtype, room=room):
        assert current is not None
        entries = current.finish()
        imatrix |= entries
        if state:
            state.save(layer.index, layer.hidden, entries)
        if progress:
            progress(layer.index + 1)
    return imatrix
