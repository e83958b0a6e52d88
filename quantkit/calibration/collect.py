"""The loop over the layers, and what it measures by default: sums of squared inputs of every weight.

The statistics are those of llama-imatrix (in_sum2 and counts per weight, per expert for routed ones), so that either
tool can use the other's file. `attn_kv_b` is measured besides `attn_k_b` and `attn_v_b`: one file serves both layouts.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate

import numpy as np
import torch

from quantkit import ranks
from quantkit.calibration.coverage import check_finite
from quantkit.calibration.state import PassState
from quantkit.progress import Advance, say
from quantkit.runtime.experts.streamed import Turns
from quantkit.runtime.products import fast_products
from quantkit.runtime.room import Room
from quantkit.runtime.stream import Source, stream
from quantkit.runtime.watch import ExpertVisit, Watcher
from quantkit.tensors import ROUTED_ROLES, Importance, split_name

ATTENTION_SHARE, MOST_INSIDE = 0.05, 0.98  # of a layer's progress: its attention; all before it is finished
TURNS = 32  # of the ranks in a layer, unless an encoder works on more experts at once


def turns_of(n_expert: int) -> Turns:
    """Of ranks that measure a layer together."""
    return Turns(max(1, n_expert // TURNS), ahead=1, shared=True)


class Accumulator(Watcher):
    """in_sum2 of one layer, summed in float64 on the device where the inputs are.

    Each rank sees its own experts; `finish` puts those of all together, and refuses what is not finite.
    """

    def __init__(self, layer: int, n_expert: int):
        self.layer, self.n_expert = layer, n_expert
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, torch.Tensor] = {}
        self.tell: Callable[[int, int], None] | None = None  # of tokens through the attention, and of experts
        self.tokens = 0

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds x [n, n_in], or [n, n_head, n_in] for weights with a matrix per head (which share one count)."""
        squares = x.float().square().sum(0, dtype=torch.float64)
        squares = squares.view(-1, x.shape[-1])
        if role in self.sums:
            self.sums[role] += squares
            self.counts[role] += x.shape[0]
        else:
            self.sums[role] = squares
            self.counts[role] = torch.full((1,), float(x.shape[0]), dtype=torch.float64)
        if self.tell and role in ("attn_output", "attn_output_b"):
            self.tokens += x.shape[0]
            self.tell(self.tokens, 0)

    def observe_expert(self, visit: ExpertVisit) -> None:
        """Adds what the expert saw; gate and up read the same rows."""
        for role, x in (("ffn_gate_exps", visit.x), ("ffn_down_exps", visit.hidden)):
            if role not in self.sums:
                self.sums[role] = torch.zeros(self.n_expert, x.shape[1], dtype=torch.float64, device=x.device)
                self.counts[role] = torch.zeros(self.n_expert, dtype=torch.float64)
            self.sums[role][visit.expert] += x.float().square().sum(0, dtype=torch.float64)
            self.counts[role][visit.expert] += x.shape[0]
        if self.tell:
            self.tell(self.tokens, visit.expert)

    def finish(self) -> dict[str, Importance]:
        """By GGUF name. QuantkitError names a sum that is not finite."""
        if "ffn_gate_exps" in self.sums:
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
    mine = {name: list(entry.in_sum2.shape) for name, entry in entries.items() if split_name(name)[0] in ROUTED_ROLES}
    shapes: dict[str, list[int]] = {}
    for found in ranks.gather(mine):
        shapes |= found
    for name, (n, n_in) in sorted(shapes.items()):
        own = entries.get(name) or Importance(np.zeros((n, n_in), np.float32), np.zeros(n, np.float32))
        entries[name] = Importance(ranks.total(own.in_sum2), ranks.total(own.counts))
    return dict(sorted(entries.items()))


class Steps:
    """Turns "so many layers are done" into progress in bytes, so that a layer counts by its bytes; and so do the tokens
    and experts that its watcher is shown, so that a long layer moves. n_tokens: of the pass."""

    def __init__(self, advance: Advance, source: Source, n_tokens: int):
        self.advance, self.config, self.n_tokens = advance, source.config, n_tokens
        self.ends = [0, *accumulate(source.layer_bytes())]
        self.done, self.computing = 0.0, False

    @staticmethod
    def total(source: Source) -> float:
        """Bytes of all layers."""
        return sum(source.layer_bytes())

    def __call__(self, layers: int) -> None:
        """So many layers are done: by an earlier run, if none was watched yet."""
        at = f"layer {layers} of {self.config.n_layer}"
        self.advance(self.ends[layers] - self.done, at, not self.computing)
        self.done = self.ends[layers]

    def watching(self, make: Callable[[int], Accumulator]) -> Callable[[int], Accumulator]:
        """The same makers of watchers; what a watcher sees of its layer is told here."""

        def watch(layer: int) -> Accumulator:
            watcher, self.computing = make(layer), True
            watcher.tell = partial(self._inside, layer)
            return watcher

        return watch

    def _inside(self, layer: int, n_tokens: int, experts: int) -> None:
        """So many tokens are through the layer's attention, so many experts are done."""
        attention = ATTENTION_SHARE if self.config.is_moe(layer) else MOST_INSIDE
        share = attention * n_tokens / self.n_tokens + (MOST_INSIDE - attention) * experts / self.config.n_expert
        done = self.ends[layer] + share * (self.ends[layer + 1] - self.ends[layer])
        if done > self.done:
            self.advance(done - self.done, f"in layer {layer + 1} of {self.config.n_layer}")
            self.done = done


def collect(
    source: Source,
    tokens: torch.Tensor,
    state: PassState | None = None,
    *,
    room: Room | None = None,
    turns: Turns | None = None,
    watch: Callable[[int], Accumulator] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Importance]:
    """Importance of every weight for tokens int64 [n_chunk, t].

    state: saved after each layer; a pass that was stopped goes on where it was. room: where hidden states live. turns:
    of the ranks, which share the experts, while each computes all the rest. watch: makes the watcher of a layer
    (default: an `Accumulator`); what it owes besides importance must be safe on disk when its `finish` returns, or be
    found missing by a later run.
    progress: called after each layer with the number of layers finished, once at the start if some were before.
    """
    n_expert = source.config.n_expert
    watch, turns = watch or (lambda layer: Accumulator(layer, n_expert)), turns or turns_of(n_expert)
    # Also: nobody resumes before rank 0 has removed a state.
    ranks.same(state and state.job, "text, checkpoint or device")
    hidden, start = state.resume() if state else (None, 0)
    imatrix = state.entries(start) if state else {}
    if start:
        say(f"an earlier run went through {start} of {source.config.n_layer} layers; going on with the next")
    if progress and start:
        progress(start)
    for step in stream(source, tokens, hidden=hidden, start=start, room=room, turns=turns):
        watcher = watch(step.layer)
        with fast_products():
            step.compute(watcher)
            entries = watcher.finish()
        imatrix |= entries
        if state:
            state.save(step.layer, step.hidden, entries)
        if progress:
            progress(step.layer + 1)
    return imatrix
