"""Calibrate and encode a layer in the same visit, with quantkit's own encoders.

Error feedback needs the second moments of every matrix's inputs. For R1 those of one layer's experts are 52 GB, so they
are never stored: while an expert's weights and tokens are at hand, its moments are formed, its three matrices encoded
and written, and everything is dropped. Attention, shared and dense matrices follow at the end of their layer, and then
what our encoders leave of it (norms, experts that no token reached, types without an encoder of ours): ggml writes that
from the importance just measured. Only embedding and head are left for after the pass.

Ranks share a layer's experts in blocks, and its other matrices, one moment each: a rank forms and factors only the
moments of what it encodes.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch

from quantkit import ranks
from quantkit.calibration.collect import Accumulator, Watcher, collect
from quantkit.calibration.coverage import shrink
from quantkit.calibration.state import PassState
from quantkit.encoding.api import SUPPORTED, encode_batch
from quantkit.encoding.ggml_encoder import GgmlEncoder
from quantkit.encoding.hessian import Hessian, blend, describe, gram, prepare, second_moment
from quantkit.encoding.jobs import encode_pending, fit_importance, layer_plan
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.models import deepseek2 as deepseek
from quantkit.planning.plan import Plan
from quantkit.runtime.experts.streamed import ExpertVisit
from quantkit.runtime.room import Room
from quantkit.runtime.sources import CheckpointSource
from quantkit.tensors import Importance, TensorSpec

SAME_INPUT = {  # roles that multiply the same rows share one moment
    "attn_kv_a_mqa": "attn_q_a",
    "attn_q": "attn_q_a",
    "ffn_up": "ffn_gate",
    "ffn_up_shexp": "ffn_gate_shexp",
}
EXPERT_ROLES = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
GAMMA = {"IQ1_S": 1.06, "IQ1_M": 1.06, "IQ2_XXS": 1.06, "IQ2_XS": 1.06, "IQ2_S": 1.06, "Q2_K": 1.03}
# Experts encoded together on a GPU: share of its memory, moments and factors and copies of them, upper limit.
GROUP_SHARE, FACTOR_COPIES, MOST_EXPERTS = 0.35, 6, 32
LEAST_GROUPS = 8  # in a layer, for as many ranks


def group_size(device: torch.device, n_in: int, n_expert: int) -> int:
    """Experts encoded together: one on a CPU. A GPU's bytes may depend on it, so it follows from the GPU's size, not
    from what is free of it, and is a power of two; all ranks take the smallest."""
    if device.type != "cuda":
        return 1
    fit = int(GROUP_SHARE * torch.cuda.get_device_properties(device).total_memory) // (FACTOR_COPIES * 4 * n_in * n_in)
    fit = max(1, min(fit, MOST_EXPERTS, n_expert // LEAST_GROUPS))
    return min(ranks.gather(1 << (fit.bit_length() - 1)))


@dataclass(frozen=True)
class EncoderOptions:
    """How our encoders work.

    effort: fast, normal or best. gamma: factor on the scales of routed experts by qtype. Least squares shrinks what a
    matrix puts out, and through gate, up and down the shrinkage multiplies; the defaults are those that gave the least
    KLD on other text (docs/encoders.md). pseudo_tokens: weight of the layer's moments in an expert's, as tokens.
    """

    effort: str = "normal"
    gamma: Mapping[str, float] = field(default_factory=lambda: dict(GAMMA))
    pseudo_tokens: float = 512.0


class Moments:
    """Running weighted second moments of one input: float32 [n_in, n_in], or [n_head, n_in, n_in]."""

    def __init__(self) -> None:
        self.matrix: torch.Tensor | None = None
        self.total = self.squares = 0.0

    def add(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """x [n, n_in] or [n, n_head, n_in], weight float32 [n]."""
        scaled = x.float() * weight.sqrt().view(-1, *[1] * (x.ndim - 1))
        product = gram(scaled)
        self.matrix = product if self.matrix is None else self.matrix.add_(product)
        self.total += float(weight.sum())
        self.squares += float(weight.double().square().sum())

    def hessians(self) -> list[Hessian]:
        """One per matrix."""
        if self.matrix is None or not self.total > 0:
            return [Hessian()]
        mean = self.matrix / self.total
        tokens = self.total**2 / self.squares
        each = mean if mean.ndim == 3 else mean[None]
        return [Hessian(matrix, matrix.diagonal().clone(), tokens) for matrix in each]


Group = list[tuple[ExpertVisit, Hessian, Hessian]]
"""Experts with the moments of their inputs: those of gate and up, and that of down."""


class LayerEncoder:
    """Watches one layer being computed and writes its tensors. used: which knowledge served how many matrices."""

    def __init__(
        self,
        layer: int,
        source: CheckpointSource,
        plan: Plan,
        specs: Mapping[str, TensorSpec],
        out: GGUFWriter,
        how: EncoderOptions,
        used: Counter[str],
    ):
        self.layer, self.source, self.out, self.how, self.used = layer, source, out, how, used
        mine = [tensor for tensor in plan.tensors if tensor.layer == layer and tensor.qtype in SUPPORTED]
        self.planned = {tensor.role: tensor for tensor in mine}
        self.specs = {tensor.role: specs[tensor.name] for tensor in mine}
        self.own = self._share()
        self.statistics = Accumulator(layer, source.config.n_expert)
        self.moments: dict[str, Moments] = {}
        self.weights: list[torch.Tensor] = []
        self.shared: Hessian | None = None
        self.waiting: Group = []
        self.group = group_size(source.device, source.config.d, source.config.n_expert)
        self.block = self.group if self.group > 1 else self.statistics.block
        self.ahead = self.group  # while a group is encoded the next one is read

    def _share(self) -> set[str]:
        """Roles, routed ones aside, that this rank encodes: those of one input together, the largest work first."""
        work: Counter[str] = Counter()
        for role, spec in self.specs.items():
            if not spec.is_routed:
                work[SAME_INPUT.get(role, role)] += spec.n_rows * spec.n_in + spec.n_in**2
        load, mine = [0] * ranks.count(), set()
        for key, amount in sorted(work.items(), key=lambda item: (-item[1], item[0])):
            rank = load.index(min(load))
            load[rank] += amount
            if rank == ranks.index():
                mine |= {role for role in self.specs if SAME_INPUT.get(role, role) == key}
        return mine

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        self.statistics.observe(role, x, weight)
        if role == "ffn_gate_inp":  # comes before the experts, with all the rows that they will share out
            self.weights.append(weight)
        if role == "ffn_gate_inp" or (role in self.own and role not in SAME_INPUT):
            self.moments.setdefault(role, Moments()).add(x, weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        self.statistics.observe_expert(visit)
        if self.shared is None:
            self.shared = self.moments["ffn_gate_inp"].hessians()[0]
            self.weight = torch.cat(self.weights)
        if self.waiting and visit.expert // self.group != self.waiting[0][0].expert // self.group:
            self.flush()
        weight = self.weight[visit.tokens] * visit.weight.float().square()
        own = blend(second_moment(visit.x, weight), self.shared, self.how.pseudo_tokens)
        self.waiting.append((visit, own, second_moment(visit.hidden, weight)))
        if (visit.expert + 1) % self.group == 0:
            self.flush()

    def flush(self) -> None:
        """Encode, write and record the experts that are waiting, unless an earlier run has done all of them.

        Only a whole group is left out: what a GPU makes of a matrix may depend on those beside it.
        """
        if not self.waiting:
            return
        if all(self._done(role, visit.expert) for role in EXPERT_ROLES for visit, _, _ in self.waiting):
            self.waiting = []
            return
        waiting, self.waiting = self.waiting, []
        self._encode_group(waiting)
        self.out.sync()

    def _encode_group(self, waiting: Group) -> None:
        """Encode and write experts together; in halves if the GPU has no room for them all."""
        try:
            self._encode_experts(waiting)
            return
        except torch.OutOfMemoryError:
            if len(waiting) == 1:
                raise
        torch.cuda.empty_cache()  # outside of the handler: its traceback holds what was being computed
        half = len(waiting) // 2
        self.group = min(self.group, half)
        self._encode_group(waiting[:half])
        self._encode_group(waiting[half:])

    def _encode_experts(self, waiting: Group) -> None:
        inner = [own for _, own, _ in waiting]
        factor = None
        for index, role in enumerate(EXPERT_ROLES):
            if role not in self.planned:
                continue
            weights = torch.stack([visit.matrices[index].float() for visit, _, _ in waiting])
            if role == "ffn_down_exps":
                data = self._encode(role, weights, [down for _, _, down in waiting])
            else:
                if factor is None:
                    full = self.how.effort != "fast"
                    factor = prepare(inner, weights.shape[-1], self.source.device, full=full)
                data = self._encode(role, weights, factor)
            rows = weights.shape[1]
            for (visit, _, _), packed in zip(waiting, data, strict=True):
                self.out.write(self.planned[role].name, visit.expert * rows, packed)

    def _done(self, role: str, expert: int) -> bool:
        """Whether the expert's rows are written, or are not ours to write."""
        if role not in self.planned:
            return True
        rows = self.specs[role].shape[1]
        return self.out.done(self.planned[role].name, expert * rows, expert * rows + rows)

    def finish(self) -> dict[str, Importance]:
        """Encode the layer's other matrices and put everything on disk; returns its importance."""
        self.flush()
        for role, tensor in self.planned.items():
            moments = self.moments.get(SAME_INPUT.get(role, role))
            if moments is None or role not in self.own:
                continue
            spec = self.specs[role]
            hessians = moments.hessians()
            if spec.n_matrices > 1:
                self._heads(role, tensor.name, spec, hessians)
            else:
                self._whole(role, tensor.name, spec, hessians[0])
        self.out.meet()  # the state must not say that a layer is done before its bytes, of all ranks, are safe
        return self.statistics.finish()

    def _heads(self, role: str, name: str, spec: TensorSpec, hessians: list[Hessian]) -> None:
        """One small matrix per head, encoded together: one after the other they would leave a GPU idle."""
        if self.out.done(name, 0, spec.n_rows):
            return
        per_head = spec.n_rows // spec.n_matrices
        weights = [self._read(spec, first, first + per_head) for first in range(0, spec.n_rows, per_head)]
        packed = self._encode(role, torch.stack(weights), hessians)
        self.out.write(name, 0, packed.reshape(spec.n_rows, -1))
        self.out.sync()

    def _whole(self, role: str, name: str, spec: TensorSpec, hessian: Hessian) -> None:
        """One matrix under one factor, on a CPU a slice of rows at a time.

        A GPU waits for launches, as many for a slice as for all rows; encode_batch cuts what does not fit its memory.
        """
        if self.out.done(name, 0, spec.n_rows):
            return
        full = self.how.effort != "fast"
        factor = prepare([hessian], spec.n_in, self.source.device, full=full)
        whole = self.source.device.type == "cuda"
        for start, stop in [(0, spec.n_rows)] if whole else deepseek.slices(spec):
            self.out.write(name, start, self._encode(role, self._read(spec, start, stop)[None], factor)[0])
        self.out.sync()
        self.used[describe(hessian)] += 1

    def _read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return deepseek.read(self.source.checkpoint, self.source.config, spec, start, stop, str(self.source.device))

    def _encode(self, role: str, weights: torch.Tensor, knowledge) -> np.ndarray:
        qtype = self.planned[role].qtype
        routed = self.specs[role].is_routed
        gamma = self.how.gamma.get(qtype, 1.0) if routed else 1.0
        if isinstance(knowledge, list):
            self.used.update(describe(hessian) for hessian in knowledge)
        elif weights.shape[0] > 1 or self.specs[role].is_routed:
            self.used["full"] += weights.shape[0]
        return encode_batch(qtype, weights, knowledge, effort=self.how.effort, gamma=gamma, device=self.source.device)


class WithRest:
    """A watcher that also lets ggml write what the inner one leaves of its layer, before the layer's weights are gone.

    So each layer is read while it is at hand, once, and a checkpoint that is downloaded is downloaded once.
    """

    def __init__(
        self,
        inner: Watcher,
        layer: int,
        checkpoint: Checkpoint,
        plan: Plan,
        out: GGUFWriter,
        min_expert_tokens: int,
        workers: int | None,
    ):
        self.inner, self.checkpoint, self.out = inner, checkpoint, out
        self.plan = layer_plan(plan, layer)
        self.min_expert_tokens, self.workers = min_expert_tokens, workers
        self.observe, self.observe_expert = inner.observe, inner.observe_expert
        self.block, self.ahead = inner.block, inner.ahead

    def finish(self) -> dict[str, Importance]:
        entries = self.inner.finish()
        fitted = fit_importance(self.plan, shrink(entries, self.min_expert_tokens))
        encode_pending(self.checkpoint, self.plan, fitted, self.out, GgmlEncoder(), self.workers)
        return entries


def run(
    source: CheckpointSource,
    plan: Plan,
    tokens: torch.Tensor,
    out: GGUFWriter,
    how: EncoderOptions | None,
    state: PassState,
    *,
    min_expert_tokens: int | None = None,
    workers: int | None = None,
    hidden_dtype: torch.dtype = torch.float32,
    room: Room | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[dict[str, Importance], Counter[str]]:
    """One pass over the layers: importance of all, and the rows of every matrix that our encoders can write.

    how: None for none of them. min_expert_tokens: ggml writes the rest of each layer too, with experts of
    fewer tokens filled up; None leaves it unwritten. Resumes at the layer where an earlier run stopped: its hidden
    states are computed anew, and what that run did not finish of it is encoded.
    """
    specs = {spec.name: spec for spec in deepseek.specs(source.config, plan.mla)}
    used: Counter[str] = Counter()

    def watch(layer: int) -> Watcher:
        inner: Watcher = (
            LayerEncoder(layer, source, plan, specs, out, how, used)
            if how
            else Accumulator(layer, source.config.n_expert)
        )
        if min_expert_tokens is None:
            return inner
        return WithRest(inner, layer, source.checkpoint, plan, out, min_expert_tokens, workers)

    imatrix = collect(source, tokens, state, hidden_dtype=hidden_dtype, room=room, progress=progress, watch=watch)
    return imatrix, sum(map(Counter, ranks.gather(used)), Counter())
