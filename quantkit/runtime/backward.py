"""A layer's backward pass with respect to activations: what reaches its input, and its matrices' outputs on the way;
and, of tensors that are asked for (`Leaves`), with respect to themselves.

Nothing of the forward pass is kept but the layer's input; the rest is computed again. Attention, dense and shared
feed-forward are left to autograd, in tiles; routed experts are streamed one by one and derived by hand. Gradients are
float32 between layers and where they are added up; products are taken in the compute dtype. bfloat16 has the range of
float32, so no loss needs scaling.

Ranks share the routed experts as in a forward pass, and compute all the rest each: gradients are the same to the bit
for any number of them.

The gradient flows through the routing weights into the router's input, not through the selection of experts.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.experts.streamed import Routes, StreamedExperts
from quantkit.runtime.layers import (
    Feed,
    LayerWeights,
    Linear,
    Router,
    attention,
    rms_norm,
    route,
    router_scores,
    routing_weights,
)
from quantkit.runtime.room import Room
from quantkit.runtime.rope import angles
from quantkit.runtime.stream import HEAD_ELEMENTS, Source, head_logits
from quantkit.runtime.watch import Projections

ATTENTION_TOKENS = 1024  # tokens (in whole chunks) whose attention is derived together: it holds their scores
FEED_TOKENS = 2048  # per tile of dense and shared feed-forward and of the router
EXPERT_TOKENS = 4096  # per tile of a routed expert

Draw = Callable[[torch.Tensor], torch.Tensor]
"""Probabilities float32 [m, n_vocab] of the next tokens -> labels int64 [n_sample, m], tile after tile."""

Loss = Callable[[slice, torch.Tensor], torch.Tensor]
"""Which rows, and their logits float32 [m, n_vocab] -> gradient of the loss there, float32."""


@dataclass(frozen=True)
class ExpertGradients:
    """What came back to tokens int64 [m] of one expert.

    x [m, d] and hidden [m, n_ff]: inputs of gate, up and of down. weight float32 [m]: of routing; times it, the
    gradient of the layer's output is that of down's. inner float32 [n_sample, m, 2 n_ff]: gradient at the outputs of
    gate, then of up. matrices: the expert's, which are gone after the visit.
    """

    expert: int
    tokens: torch.Tensor
    weight: torch.Tensor
    x: torch.Tensor
    hidden: torch.Tensor
    inner: torch.Tensor
    matrices: Projections


class Receiver(Protocol):
    """Is told of the gradients at the outputs of a layer's matrices."""

    @property
    def roles(self) -> Collection[str]:
        """Of matrices that are not routed and that it wants to know about."""

    def matrix(self, role: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """x [m, n_in], gradient [m, n_out]: of one tile and one sample."""

    def routed(self, counts: Sequence[int]) -> None:
        """Tokens of every routed expert; before `expert`."""

    def expert(self, found: ExpertGradients) -> None:
        """One tile of an expert, all samples: experts in order, tokens in order. Ranks are told of their own only."""


class Leaves:
    """Tensors that require gradients, by name, from which the weights of a layer (or the head) were made; `gradients`
    holds the sums of theirs, float32, over all tiles so far. Routed experts cannot be among them: a `Receiver` is told
    what comes back to those."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]):
        self.names, self.tensors = tuple(tensors), tuple(tensors.values())
        self.gradients: dict[str, torch.Tensor] = {}

    def add(self, found: Sequence[torch.Tensor | None]) -> None:
        """Those of one tile, in the order of `tensors`; None for one that has no part in it."""
        for name, gradient in zip(self.names, found, strict=True):
            if gradient is not None and name in self.gradients:
                self.gradients[name] += gradient
            elif gradient is not None:
                layout = torch.contiguous_format  # a matrix's comes transposed
                self.gradients[name] = gradient.to(torch.float32, copy=True, memory_format=layout)


class Silent:
    """The receiver that wants to know nothing."""

    roles: Collection[str] = ()

    def matrix(self, role: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """As `Receiver`."""

    def routed(self, counts: Sequence[int]) -> None:
        """As `Receiver`."""

    def expert(self, found: ExpertGradients) -> None:
        """As `Receiver`."""


class _Taps:
    """Linear maps that remember what they multiplied and made, to be told of the gradient there."""

    def __init__(self, receiver: Receiver, leaves: Leaves):
        self.receiver, self.leaves = receiver, leaves
        self.seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def on(self, role: str, linear: Linear) -> Linear:
        """The same map, seen by the receiver if it wants to."""
        if role not in self.receiver.roles:
            return linear

        def tapped(x: torch.Tensor) -> torch.Tensor:
            made = linear(x)
            self.seen.append((role, x.detach(), made))
            return made

        return tapped

    def back(self, made: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], leaf: torch.Tensor) -> torch.Tensor:
        """From the gradients of what was made of it to that of the leaf. The graph stays, for other samples."""
        wanted = [leaf, *(output for *_, output in self.seen)]
        found, *others = _grad(made, wanted, gradients, self.leaves)
        for (role, x, _), gradient in zip(self.seen, others, strict=True):
            self.receiver.matrix(role, x, gradient)
        return found


class Backward:
    """A pass from the last layer to the first, of several samples of labels at once.

    hidden [n_chunk, t, d]: set it to the input of the layer before `layer`. gradient float32 [n_sample, n_chunk t, d]:
    of the layer's output before, of its input after. Arrays of all tokens are made in the room.
    """

    def __init__(self, source: Source, shape: tuple[int, int], n_sample: int, room: Room):
        n_chunk, t = shape
        d = source.config.d
        self.source, self.n_sample, self.device = source, n_sample, source.device
        self.angles = angles(source.config, torch.arange(t, device=source.device))
        self.hidden = room.empty((n_chunk, t, d), room.hidden)
        self.inputs = room.empty((n_chunk * t, d), source.dtype)
        self.gradient = room.empty((n_sample, n_chunk * t, d), torch.float32)
        self.at_inputs = room.empty((n_sample, n_chunk * t, d), torch.float32)  # of the feed-forward, normed

    @torch.enable_grad()
    def head(self, draw: Draw) -> None:
        """Gradient at the last layer's output, which `hidden` is, of the sum of -log p(label) over all positions; never
        of size tokens x vocabulary."""
        head, hidden = self.source.head(), self.hidden.flatten(0, 1)
        for rows in _tiles(len(hidden), max(1, HEAD_ELEMENTS // self.source.config.n_vocab)):
            x = _leaf(hidden[rows], self.device, torch.float32)
            logits = head_logits(self.source, head, x)
            p = logits.detach().softmax(-1)
            for s, label in enumerate(draw(p)):
                at_logits = p.clone()
                at_logits[torch.arange(len(label), device=self.device), label.to(self.device)] -= 1
                (found,) = torch.autograd.grad(logits, x, at_logits, retain_graph=True)
                self.gradient[s, rows] = found.to(self.gradient.device)

    @torch.enable_grad()
    def head_by(self, head: tuple[torch.Tensor, Linear], loss: Loss, leaves: Leaves) -> None:
        """As `head`, of the sum of another loss. head: the source's, as it was made from the leaves."""
        hidden = self.hidden.flatten(0, 1)
        for rows in _tiles(len(hidden), max(1, HEAD_ELEMENTS // self.source.config.n_vocab)):
            x = _leaf(hidden[rows], self.device, torch.float32)
            logits = head_logits(self.source, head, x)
            (found,) = _grad([logits], [x], [loss(rows, logits.detach())], leaves)
            self.gradient[0, rows] = found.to(self.gradient.device)

    @torch.enable_grad()
    def layer(self, weights: LayerWeights, receiver: Receiver, leaves: Leaves | None = None) -> None:
        """Back through one layer. leaves: what its weights were made from, if its gradients are wanted too."""
        leaves = leaves or Leaves({})
        self._find_inputs(weights)
        self.at_inputs.zero_()
        if weights.feed is not None:
            for rows in _tiles(len(self.inputs), FEED_TOKENS):
                taps = _Taps(receiver, leaves)
                self._feed(rows, weights.feed, "" if weights.router is None else "_shexp", taps)
        if weights.router is not None:
            if not isinstance(weights.experts, StreamedExperts):
                raise QuantkitError(
                    "gradients need routed experts that are dequantized: open the checkpoint, or a GGUF"
                )
            self._routed(weights.router, weights.experts, receiver, leaves)
        for rows, part in self._parts():
            self._attention(rows, part, weights, _Taps(receiver, leaves))

    def _parts(self) -> list[tuple[slice, torch.Tensor]]:
        """Whole chunks whose attention is derived together, float32 where the weights are, and their rows."""
        step, t = max(1, ATTENTION_TOKENS // self.hidden.shape[1]), self.hidden.shape[1]
        parts = enumerate(self.hidden.split(step))
        return [(slice(i * step * t, (i * step + len(part)) * t), part) for i, part in parts]

    @torch.no_grad()
    def _find_inputs(self, weights: LayerWeights) -> None:
        c = self.source.config
        for rows, part in self._parts():
            h = part.to(self.device, torch.float32)
            h = h + attention(h, weights, c, self.angles)
            self.inputs[rows] = rms_norm(h, weights.ffn_norm, c.rms_eps).flatten(0, 1).to(self.inputs)

    def _feed(self, rows: slice, feed: Feed, suffix: str, taps: _Taps) -> None:
        x = _leaf(self.inputs[rows], self.device)
        parts = ((part, getattr(feed, part)) for part in ("gate", "up", "down"))
        made = Feed(*(taps.on(f"ffn_{part}{suffix}", linear) for part, linear in parts))(x)
        for s in range(self.n_sample):
            found = taps.back([made], [self.gradient[s, rows].to(made)], x)
            self.at_inputs[s, rows] += found.to(self.at_inputs)

    @torch.no_grad()
    def _routed(self, router: Router, experts: StreamedExperts, receiver: Receiver, leaves: Leaves) -> None:
        tiles = list(_tiles(len(self.inputs), FEED_TOKENS))
        chosen = [route(self.inputs[rows].to(self.device), router, self.source.config) for rows in tiles]
        expert, weight = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        n_ranks, rank = (ranks.count(), ranks.index()) if experts.turns.shared else (1, 0)
        if n_ranks > 1:
            expert, weight = (ranks.spread(t.contiguous(), 0) for t in (expert, weight))
        routes = Routes(expert, weight, experts.n_expert)
        receiver.routed(routes.counts)
        at_weights = torch.zeros(self.n_sample, expert.numel(), device=self.device)
        ahead = read_ahead(experts.read, routes.used[rank::n_ranks], experts.turns.ahead)
        for first in range(0, len(routes.used), n_ranks):
            now = routes.used[first : first + n_ranks]
            made = self._expert(now[rank], next(ahead), routes, receiver) if rank < len(now) else iter(())
            if n_ranks > 1:  # each at the same time
                made = iter(list(made))
            for owner, e in enumerate(now):
                for slots in routes.slots[e].split(EXPERT_TOKENS):
                    shape = self.n_sample, len(slots)
                    if owner == rank:
                        at_x, at_weight = next(made)
                    else:
                        at_x = torch.empty(*shape, self.inputs.shape[1], device=self.device)
                        at_weight = torch.empty(shape, device=self.device)
                    if n_ranks > 1:
                        at_x, at_weight = (ranks.spread(t.contiguous(), owner) for t in (at_x, at_weight))
                    at_weights[:, slots] = at_weight
                    # A token comes once, and experts in order whoever computes them, so adding is in one order.
                    tokens = (slots // routes.n_used).to(self.at_inputs.device)
                    self.at_inputs.index_add_(1, tokens, at_x.to(self.at_inputs))
        for rows in tiles:
            self._router(router, expert[rows], at_weights.view(self.n_sample, *expert.shape)[:, rows], rows, leaves)

    def _expert(
        self, e: int, matrices: Projections, routes: Routes, receiver: Receiver
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Back through an expert, tile by tile of its tokens: gradients at its inputs, float32 [n_sample, m, d], and at
        its routing weights, float32 [n_sample, m]."""
        gate, up, down = matrices
        for slots in routes.slots[e].split(EXPERT_TOKENS):
            tokens, share = slots // routes.n_used, routes.weight[slots]
            x = self.inputs[tokens.to(self.inputs.device)].to(gate.device)
            a, b = x @ gate.T, x @ up.T
            hidden = F.silu(a) * b
            at_out = self.gradient[:, tokens.to(self.gradient.device)].to(gate.device)
            at_weight = (at_out * (hidden @ down.T)).sum(-1)
            at_hidden = ((at_out * share[:, None]).to(down.dtype) @ down).float()
            a, b, sigmoid = a.float(), b.float(), a.float().sigmoid()
            at_gate = at_hidden * b * (sigmoid * (1 + a * (1 - sigmoid)))  # the derivative of silu
            at_up = at_hidden * (a * sigmoid)
            receiver.expert(ExpertGradients(e, tokens, share, x, hidden, torch.cat((at_gate, at_up), -1), matrices))
            yield (at_gate.to(gate.dtype) @ gate).float() + (at_up.to(up.dtype) @ up).float(), at_weight

    @torch.enable_grad()
    def _router(
        self, router: Router, expert: torch.Tensor, at_weights: torch.Tensor, rows: slice, leaves: Leaves
    ) -> None:
        """From the routing weights of a tile [n_sample, m, n_used] to the router's input."""
        x, c = _leaf(self.inputs[rows], self.device, torch.float32), self.source.config
        weight = routing_weights(router_scores(x, router, c), expert, c)
        for s, at_weight in enumerate(at_weights):
            (found,) = _grad([weight], [x], [at_weight], leaves)
            self.at_inputs[s, rows] += found.to(self.at_inputs)

    def _attention(self, rows: slice, part: torch.Tensor, weights: LayerWeights, taps: _Taps) -> None:
        """Both residual additions and both norms with it."""
        c, h = self.source.config, _leaf(part, self.device, torch.float32)
        with sdpa_kernel(SDPBackend.MATH):  # the backward passes of the others add up in any order on a GPU
            out = h + attention(h, _tapped(weights, taps), c, self.angles)
            x = rms_norm(out, weights.ffn_norm, c.rms_eps)
            for s in range(self.n_sample):
                at = [t[s, rows].view(h.shape).to(self.device) for t in (self.gradient, self.at_inputs)]
                found = taps.back([out, x], at, h)
                self.gradient[s, rows] = found.flatten(0, 1).to(self.gradient.device)


def _tapped(weights: LayerWeights, taps: _Taps) -> LayerWeights:
    kv_a, output = taps.on("attn_kv_a_mqa", weights.kv_a), taps.on("attn_output", weights.output)
    if not isinstance(weights.q, tuple):
        return replace(weights, q=taps.on("attn_q", weights.q), kv_a=kv_a, output=output)
    q_a, norm, q_b = weights.q
    return replace(weights, q=(taps.on("attn_q_a", q_a), norm, taps.on("attn_q_b", q_b)), kv_a=kv_a, output=output)


def _grad(
    made: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], leaves: Leaves
) -> tuple[torch.Tensor, ...]:
    """Gradients of what is wanted; those of the leaves are added there. The graph stays, for other samples."""
    every = [*wanted, *leaves.tensors]
    found = torch.autograd.grad(made, every, gradients, retain_graph=True, allow_unused=True)
    leaves.add(found[len(wanted) :])
    return found[: len(wanted)]


def _leaf(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.detach().to(device, dtype or x.dtype).requires_grad_()


def _tiles(n: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
