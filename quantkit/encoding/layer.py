"""Calibrate and encode a layer in the same visit, with quantkit's own encoders.

Error feedback needs the second moments of every matrix's inputs. For R1 those of one layer's experts are 52 GB, so they
are never stored: while an expert's weights and tokens are at hand, its moments are formed, its three matrices encoded
and written, and everything is dropped. Attention, shared and dense matrices follow at the end of their layer, and then
what our encoders leave of it (norms, experts that no token reached, types without an encoder of ours): ggml writes that
from the importance just measured. Only embedding and head are left for after the pass.

Ranks take turns with a layer's experts, and share its other matrices, one moment each: a rank forms and factors only
the moments of what it encodes.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import torch

from quantkit import ranks
from quantkit.calibration.collect import Accumulator, turns_of
from quantkit.calibration.coverage import shrink
from quantkit.codecs.types import QTYPES
from quantkit.encoding.api import SUPPORTED, Method, encode_batch
from quantkit.encoding.behind import Behind
from quantkit.encoding.hessian import Factor, Hessian, blend, describe, prepare, second_moment, unshrinking
from quantkit.encoding.jobs import GgmlEncoder, encode_pending, fit_importance, layer_plan, prepare_types
from quantkit.encoding.moments import FACTOR_COPIES, GROUP_SHARE, SAME_INPUT, Moments
from quantkit.encoding.outputs import LayerOutputs
from quantkit.encoding.two_sided import TwoSided, encode_two_sided
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.formats.gradients import DOWN, INNER
from quantkit.models import family
from quantkit.planning.plan import Plan
from quantkit.progress import Advance
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.watch import ExpertVisit, Projections, Watcher
from quantkit.tensors import ROUTED_ROLES, Imatrix, Importance, TensorSpec

GAMMA = {name: qtype.gamma for name, qtype in QTYPES.items() if qtype.gamma != 1}
MOST_EXPERTS = 32  # encoded together on a GPU
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

    effort: fast, normal or best. gamma: factor on the scales of routed experts by qtype, before `unshrinking`. Least
    squares shrinks what a matrix puts out, and through gate, up and down the shrinkage multiplies; the defaults are
    those that gave the least KLD on other text (docs/results/encoders.md). pseudo_tokens: weight of the layer's moments
    in an expert's, as tokens for each dimension. gradients: folder of a backward pass (formats/gradients.py); matrices
    that it knows the outputs of are then encoded as `two_sided` says.
    """

    effort: str = "normal"
    gamma: Mapping[str, float] = field(default_factory=lambda: dict(GAMMA))
    pseudo_tokens: float = 1.0
    gradients: Path | None = None
    two_sided: TwoSided = field(default_factory=TwoSided)


LAYERS_BEHIND = 4  # that wait for ggml: each is small, and a pass need not wait for tables

Group = list[tuple[int, Projections, Hessian, Hessian]]
"""Experts with their matrices and the moments of their inputs: those of gate and up, and that of down."""


@dataclass(frozen=True)
class LayerOptions:
    """What encodes a layer: our encoders (None: none of them), then ggml what is left.

    min_expert_tokens: for ggml, experts of fewer tokens are filled up; None leaves its part unwritten.
    """

    ours: EncoderOptions | None
    min_expert_tokens: int | None = None


class FileEncoder:
    """A file that is written in one pass over the layers: `watch` makes the watcher of each, for `collect`.

    turns: of the ranks. used: which knowledge served how many matrices, on this rank.

    Where ggml encodes all, it does so behind the pass: its tables of IQ1_S take one core ten seconds. As a context it
    ends with all layers encoded, after an error with the slices under way.
    """

    def __init__(self, source: CheckpointSource, plan: Plan, out: GGUFWriter, how: LayerOptions):
        self.source, self.plan, self.out, self.how = source, plan, out, how
        self.specs = {spec.name: spec for spec in family.specs(source.config, plan.mla)}
        self.used: Counter[str] = Counter()
        self.group = group_size(source.device, source.config.d, source.config.n_expert) if how.ours else 1
        turns = turns_of(source.config.n_expert)
        # While a group is encoded the next one is read.
        self.turns = replace(turns, size=self.group, ahead=self.group) if self.group > 1 else turns
        self._behind = None
        # What is downloaded is not kept for long: a layer that is read later might have to be fetched again.
        if not how.ours and ranks.count() == 1 and not source.checkpoint.origin:
            self._behind = Behind(LAYERS_BEHIND, partial(prepare_types, plan))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._behind:
            self._behind.close(kind is not None)

    def leave_to_ggml(self, layer: int, entries: Imatrix) -> None:
        """What is not written of a layer: now, or soon. A pass that is stopped before encodes it at its end."""
        rest = layer_plan(self.plan, layer)
        fitted = fit_importance(rest, shrink(entries, self.how.min_expert_tokens or 0))

        def encode(advance: Advance | None = None) -> None:
            encode_pending(self.source.checkpoint, rest, fitted, self.out, GgmlEncoder(), advance=advance)

        if self._behind:
            self._behind.add(encode)
        else:
            encode()

    def watch(self, layer: int) -> "LayerWriter":
        """For the time of one layer."""
        return LayerWriter(layer, self)

    def used_by_all(self) -> Counter[str]:
        """`used` of all ranks together."""
        return sum(map(Counter, ranks.gather(self.used)), Counter())


class LayerWriter(Accumulator):
    """Sees one layer being computed and writes its tensors: ours while it is computed and after, then ggml's part.

    So each layer is read while it is at hand, once, and a checkpoint that is downloaded is downloaded once.
    """

    def __init__(self, layer: int, file: FileEncoder):
        super().__init__(layer, file.source.config.n_expert)
        self.file = file
        self.ours = LayerEncoder(layer, file, file.how.ours) if file.how.ours else None

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """For the importance, and for our encoders' moments."""
        super().observe(role, x, weight)
        if self.ours:
            self.ours.observe(role, x, weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        """For the importance; then our encoders take the expert itself."""
        super().observe_expert(visit)
        if self.ours:
            self.ours.observe_expert(visit)

    def finish(self) -> dict[str, Importance]:
        """Write what is left of the layer, or have it written; its importance."""
        if self.ours:
            self.ours.finish()
        entries = super().finish()
        if self.file.how.min_expert_tokens is not None:
            self.file.leave_to_ggml(self.layer, entries)
        return entries


class LayerEncoder(Watcher):
    """Our encoders at work on one layer while it is computed."""

    def __init__(self, layer: int, file: FileEncoder, how: EncoderOptions):
        self.layer, self.source, self.out, self.how, self.used = layer, file.source, file.out, how, file.used
        mine = [t for t in file.plan.tensors if t.layer == layer and t.qtype in SUPPORTED]
        self.planned = {tensor.role: tensor for tensor in mine}
        self.specs = {tensor.role: file.specs[tensor.name] for tensor in mine}
        self.own = self._share()
        self.outputs = LayerOutputs(how.gradients, layer, how.two_sided.own, self.source.device)
        self.moments: dict[str, Moments] = {}
        self.weights: list[torch.Tensor] = []
        self.weight: torch.Tensor | None = None
        self.shared: Hessian | None = None
        self.waiting: Group = []
        self.group = file.group  # becomes less where the GPU has no room for so many

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
        """Adds to the moments that this rank needs."""
        if role == "ffn_gate_inp":  # comes before the experts, with all the rows that they will share out
            self.weights.append(weight)
        if role == "ffn_gate_inp" or (role in self.own and role not in SAME_INPUT):
            self.moments.setdefault(role, Moments()).add(x, weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        """Encodes and writes the expert, or lets it wait for the rest of its group."""
        if self.weight is None:
            self.weight = torch.cat(self.weights)
        weight = self.weight[visit.tokens] * visit.weight.float().square()
        own, down = second_moment(visit.x, weight), second_moment(visit.hidden, weight)
        self.take(visit.expert, visit.matrices, own, down)

    def take(self, expert: int, matrices: Projections, own: Hessian, down: Hessian) -> None:
        """As `observe_expert`, of an expert whose moments are known: own, of gate's and up's inputs, is blended with
        its layer's."""
        if self.shared is None:
            self.shared = self.moments["ffn_gate_inp"].hessians()[0]
        if self.waiting and expert // self.group != self.waiting[0][0] // self.group:
            self.flush()
        own = blend(own, self.shared, self.how.pseudo_tokens * matrices[0].shape[1])
        self.waiting.append((expert, matrices, own, down))
        if (expert + 1) % self.group == 0:
            self.flush()

    def flush(self) -> None:
        """Encode, write and record the experts that are waiting, unless an earlier run has done all of them.

        Only a whole group is left out: what a GPU makes of a matrix may depend on those beside it.
        """
        if not self.waiting:
            return
        if all(self._done(role, expert) for role in ROUTED_ROLES for expert, *_ in self.waiting):
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
        inner = [own for _, _, own, _ in waiting]
        factor = None
        for roles in self._stacks():
            each = [ROUTED_ROLES.index(role) for role in roles]
            weights = torch.stack([torch.cat([matrices[i].float() for i in each]) for _, matrices, _, _ in waiting])
            outputs = self._outputs(roles, [expert for expert, *_ in waiting])
            if roles == ROUTED_ROLES[-1:]:
                known = [down for *_, down in waiting]
                data = self._encode(roles, weights, known, outputs, self._gammas(roles, known))
            else:
                if factor is None:
                    full = self.how.effort != "fast"
                    factor = prepare(inner, weights.shape[-1], self.source.device, full=full)
                data = self._encode(roles, weights, factor, outputs, self._gammas(roles, inner))
            for role, part in zip(roles, np.split(data, len(roles), axis=1), strict=True):
                for (expert, *_), packed in zip(waiting, part, strict=True):
                    self.out.write(self.planned[role].name, expert * len(packed), packed)

    def _stacks(self) -> list[tuple[str, ...]]:
        """Routed roles that are encoded as one matrix: gate on up, if what they put out is known and of one type."""
        gate, up, down = ROUTED_ROLES
        types = {role: tensor.qtype for role, tensor in self.planned.items() if role in ROUTED_ROLES}
        if types.keys() >= {gate, up} and types[gate] == types[up] and self._knows(gate):
            return [(gate, up), *([(down,)] if down in types else [])]
        return [(role,) for role in ROUTED_ROLES if role in types]

    def _knows(self, role: str) -> bool:
        """Whether a backward pass tells of what this routed role puts out, in blocks of rows."""
        spec = self.specs[role]
        key, rows = (DOWN, spec.shape[1]) if role == ROUTED_ROLES[-1] else (INNER, 2 * spec.shape[1])
        known = self.outputs.knows(key, self.source.config.n_expert, rows)
        return known and self.how.two_sided.blocks(spec.shape[1]) > 0

    def _outputs(self, roles: tuple[str, ...], experts: list[int]) -> list[torch.Tensor] | None:
        """H_O of the experts' matrices, stacked as the roles are."""
        if not self._knows(roles[0]):
            return None
        key = DOWN if roles == ROUTED_ROLES[-1:] else INNER
        found = [self.outputs.expert(key, expert) for expert in experts]
        if roles in (ROUTED_ROLES[:1], ROUTED_ROLES[1:2]):
            rows = self.specs[roles[0]].shape[1]
            part = slice(0, rows) if roles == ROUTED_ROLES[:1] else slice(rows, 2 * rows)
            return [h[part, part] for h in found]
        return found

    def _done(self, role: str, expert: int) -> bool:
        """Whether the expert's rows are written, or are not ours to write."""
        if role not in self.planned:
            return True
        rows = self.specs[role].shape[1]
        return self.out.done(self.planned[role].name, expert * rows, expert * rows + rows)

    def finish(self) -> None:
        """Encode the layer's other matrices and put everything on disk."""
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

    def _heads(self, role: str, name: str, spec: TensorSpec, hessians: list[Hessian]) -> None:
        """One small matrix per head, encoded together: one after the other they would leave a GPU idle."""
        if self.out.done(name, 0, spec.n_rows):
            return
        per_head = spec.n_rows // spec.n_matrices
        weights = [self._read(spec, first, first + per_head) for first in range(0, spec.n_rows, per_head)]
        packed = self._encode((role,), torch.stack(weights), hessians)
        self.out.write(name, 0, packed.reshape(spec.n_rows, -1))
        self.out.sync()

    def _whole(self, role: str, name: str, spec: TensorSpec, hessian: Hessian) -> None:
        """One matrix under one factor, on a CPU a slice of rows at a time, unless its rows are coupled.

        A GPU waits for launches, as many for a slice as for all rows; encode_batch cuts what does not fit its memory.
        """
        if self.out.done(name, 0, spec.n_rows):
            return
        full = self.how.effort != "fast"
        factor = prepare([hessian], spec.n_in, self.source.device, full=full)
        h = self.outputs.matrix(role, spec.n_rows) if self.how.two_sided.blocks(spec.n_rows) else None
        outputs = None if h is None or not factor.coupled else [h]
        whole = self.source.device.type == "cuda" or outputs is not None
        for start, stop in [(0, spec.n_rows)] if whole else family.slices(spec):
            self.out.write(name, start, self._encode((role,), self._read(spec, start, stop)[None], factor, outputs)[0])
        self.out.sync()
        if outputs is None:
            self.used[describe(hessian)] += 1

    def _read(self, spec: TensorSpec, start: int, stop: int) -> torch.Tensor:
        return family.read(self.source.checkpoint, self.source.config, spec, start, stop, str(self.source.device))

    def _gammas(self, roles: tuple[str, ...], known: list[Hessian]) -> list[float]:
        """One for each expert, by the tokens that its damping went by."""
        spec = self.specs[roles[0]]
        gamma = self.how.gamma.get(self.planned[roles[0]].qtype, 1.0)
        damped = [self.how.effort != "fast" and describe(hessian) == "full" for hessian in known]
        return [
            unshrinking(gamma, spec.n_in, h.tokens) if full else gamma for full, h in zip(damped, known, strict=True)
        ]

    def _encode(
        self,
        roles: tuple[str, ...],
        weights: torch.Tensor,
        knowledge: list[Hessian] | Factor,
        outputs: list[torch.Tensor] | None = None,
        gamma: float | list[float] = 1.0,
    ) -> np.ndarray:
        """Matrices of one role, or of several stacked; two-sided if all is known that it takes."""
        qtype = self.planned[roles[0]].qtype
        method = Method.of(qtype, self.how.effort, gamma, self.source.device)
        if outputs is not None and method.effort.feedback and _complete(knowledge):
            two_sided = Method.of(qtype, self.how.two_sided.effort, gamma, self.source.device)
            data = encode_two_sided(two_sided, weights, knowledge, outputs, self.how.two_sided)
            self.used["two-sided"] += len(weights) * len(roles)
            return data
        if isinstance(knowledge, list):
            self.used.update(describe(hessian) for hessian in knowledge)
        elif weights.shape[0] > 1 or self.specs[roles[0]].is_routed:
            self.used["full"] += weights.shape[0] * len(roles)
        return encode_batch(qtype, weights, knowledge, effort=self.how.effort, gamma=gamma, device=self.source.device)


def _complete(knowledge: list[Hessian] | Factor) -> bool:
    """Whether the inputs of all matrices are known, and not by their diagonals alone."""
    if isinstance(knowledge, Factor):
        return knowledge.coupled
    return all(describe(hessian) == "full" for hessian in knowledge)
