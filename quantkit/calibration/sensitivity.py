"""How much each tensor's type costs at the output: KL divergence when only that tensor is quantized, in one pass.

Forked streams. At layer l the clean hidden states fork into one variant per (tensor, type), computed with that tensor
quantized and everything else original. All forks then travel on through the clean remaining layers as extra chunks, so
each layer is still read once for all of them, and at the end every fork's logits meet the clean ones.

The cheap tier sends only one fork per layer on, a clean state with known noise. Its KLD over the noise's relative
energy is the layer's gain, by which the relative error of each variant's layer output is multiplied.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from quantkit import machine
from quantkit.calibration.variants import DEFAULT, Candidates, divergence, entry, linear_of, replaced, replaced_feed
from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError, needs
from quantkit.formats.sensitivity import Entry, Sensitivity, Tier
from quantkit.formats.whole_file import replacing
from quantkit.ggml import quants
from quantkit.models import family
from quantkit.runtime.layers import LayerWeights, attention, only_forward, route, with_mla
from quantkit.runtime.rope import angles
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import apply_attention, ffn_input
from quantkit.runtime.watch import ExpertVisit, Watcher
from quantkit.tensors import ROUTED_ROLES, Imatrix, TensorSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm
    from matplotlib.image import AxesImage

NOISE = 0.02  # relative energy of the cheap tier's noise: about a layer's damage at 1.6 bit on a model of many layers


@dataclass
class Fork:
    """A (tensor, type) variant; its stream is the index-th, or, in the cheap tier, only its error is kept."""

    spec: TensorSpec
    qtype: str
    error: float = 0.0


class Measurement:
    """One pass. Streams are chunks of one tensor: the first n_chunk are clean, then n_chunk for each fork."""

    def __init__(self, source: CheckpointSource, imatrix: Imatrix, tier: Tier, types: Candidates):
        self.source, self.config, self.imatrix, self.tier = source, source.config, imatrix, tier
        self.plan = {spec: types.of(spec) for spec in family.specs(source.config)}
        self.forks: list[Fork] = []
        self.gains: list[int] = []  # cheap tier: layer of each noise fork, in stream order
        for name in {qtype for types in self.plan.values() for qtype in types}:
            quants.prepare(name)
        self.pool = ThreadPoolExecutor(min(torch.get_num_threads(), machine.cores()))

    def variants(self, layer: int | None, roles: Callable[[str], bool]) -> list[Fork]:
        """Of the layer's tensors (None: of those outside the layers) with such a role."""
        return [
            Fork(spec, qtype)
            for spec, types in self.plan.items()
            if spec.layer == layer and roles(spec.role)
            for qtype in types
        ]

    def requantize(self, fork: Fork, weight: torch.Tensor, matrix: int) -> torch.Tensor:
        """weight [n_out, n_in] of one matrix after encoding and decoding, in the compute dtype."""
        entry = self.imatrix.get(fork.spec.name)
        importance = entry.mean(matrix) if entry is not None else None
        if importance is None and quants.requires_importance(fork.qtype):
            raise QuantkitError(f"imatrix has no {fork.spec.name}, and {fork.qtype} cannot be encoded without it")
        rows = weight.float().cpu().numpy()
        packed = quants.quantize(fork.qtype, rows, importance)
        decoded = torch.from_numpy(quants.dequantize(fork.qtype, packed, rows.shape[1]))
        return decoded.to(weight.device, weight.dtype)

    def whole(self, fork: Fork) -> torch.Tensor:
        """A tensor that is not routed, read anew and requantized, in its own shape."""
        spec = fork.spec
        per_matrix = spec.n_rows // spec.n_matrices

        def part(bounds: tuple[int, int]) -> torch.Tensor:
            rows = family.read(self.source.checkpoint, self.config, spec, *bounds)
            return self.requantize(fork, rows, bounds[0] // per_matrix)

        made = torch.cat(list(self.pool.map(part, family.slices(spec))))
        return made.view(spec.shape).to(self.source.device, self.source.dtype)

    def run(self, tokens: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Carry everything through all layers; afterwards `streams` holds the final hidden states."""
        only_forward(self.config, "measuring sensitivity by forks")
        self.n_chunk, self.t = tokens.shape
        self.n_clean = tokens.numel()
        clean = self.source.embed(tokens)
        embeddings = self.variants(None, lambda role: role == "token_embd")
        made = [F.embedding(tokens.to(clean.device), self.whole(fork).float()) for fork in embeddings]
        self.streams = self._fork(clean, embeddings, made, clean)
        self.angles = angles(self.config, torch.arange(self.t, device=clean.device))
        for layer in range(self.config.n_layer):
            self._layer(layer, with_mla(self.source.layer(layer)))
            if progress:
                progress(layer + 1)

    def _fork(
        self, streams: torch.Tensor, forks: list[Fork], made: list[torch.Tensor], clean: torch.Tensor
    ) -> torch.Tensor:
        """Append the variants' streams, or (cheap) keep only their relative error against the clean states."""
        if self.tier == "full":
            self.forks += forks
            return torch.cat([streams, *made])
        energy = clean.square().mean(-1)
        for fork, variant in zip(forks, made, strict=True):
            fork.error = float(((variant - clean).square().mean(-1) / energy).mean())
        self.forks += forks
        return streams

    def _layer(self, layer: int, weights: LayerWeights) -> None:
        before = self.streams[: self.n_chunk].clone()
        apply_attention(self.streams, weights, self.config, self.angles)
        forks = self.variants(layer, lambda role: role.startswith("attn_"))
        attended = [
            before + attention(before, replaced(weights, fork.spec.role, self.whole(fork)), self.config, self.angles)
            for fork in forks
        ]
        if self.tier == "cheap":  # their error is judged after the whole layer, so they pass its feed-forward too
            middle = torch.cat([self.streams, *attended])
        else:
            self.forks += forks
            middle = self.streams = torch.cat([self.streams, *attended])
        after, ffn_forks, ffn_streams = self._feed_forward(layer, weights, middle)
        clean = after[: self.n_chunk]
        if self.tier == "cheap":
            n_kept = len(self.streams)
            own = list(after[n_kept:].split(self.n_chunk))
            self._fork(clean, [*forks, *ffn_forks], [*own, *ffn_streams], clean)
            generator = torch.Generator().manual_seed(layer)
            noise = torch.randn(clean.shape, generator=generator).to(clean.device)
            noisy = clean + noise * (NOISE * clean.square().mean(-1, keepdim=True)).sqrt()
            self.streams = torch.cat([after[:n_kept], noisy])
            self.gains.append(layer)
        else:
            self.streams = self._fork(after, ffn_forks, ffn_streams, clean)

    def _feed_forward(
        self, layer: int, weights: LayerWeights, middle: torch.Tensor
    ) -> tuple[torch.Tensor, list[Fork], list[torch.Tensor]]:
        """All streams after the clean feed-forward, and the clean stream after each of its variants."""
        x = ffn_input(middle, weights, self.source)
        clean_x, feed = x[: self.n_clean], weights.feed
        forks = self.variants(layer, lambda role: role in ROUTED_ROLES)
        outputs: list[torch.Tensor] = []
        if weights.router is not None and weights.experts is not None:
            expert, weight = route(x, weights.router, self.config)
            routed = RoutedForks(self, forks, torch.zeros((len(forks), *clean_x.shape), device=x.device))
            summed = weights.experts(x, expert, weight, watcher=routed)
            fixed = feed(clean_x).float() if feed else 0.0
            outputs = [each + fixed for each in routed.sums]
        else:
            summed = torch.zeros(x.shape, device=x.device)
        for fork in self.variants(layer, lambda role: role.startswith("ffn_") and role not in ROUTED_ROLES):
            assert feed is not None
            variant = replaced_feed(feed, fork.spec.role, self.whole(fork))
            forks.append(fork)
            outputs.append(summed[: self.n_clean].float() + variant(clean_x).float())
        every = summed.float() + (feed(x).float() if feed else 0.0)
        clean_middle = middle[: self.n_chunk]
        return (middle + every.view_as(middle), forks, [clean_middle + out.view_as(clean_middle) for out in outputs])

    def entries(self) -> Iterator[Entry]:
        """After `run`: divergence of every fork from the clean stream, over the second half of each chunk."""
        head = self.source.head()
        streams = self.streams.split(self.n_chunk)
        if self.tier == "full":
            for fork, hidden in zip(self.forks, streams[1:], strict=True):
                yield self._entry(fork, *divergence(self.source, (head, streams[0]), (head, hidden)))
        else:
            pairs = zip(self.gains, streams[1:], strict=True)
            gain: dict[int | None, tuple[float, float]] = {
                layer: divergence(self.source, (head, streams[0]), (head, hidden)) for layer, hidden in pairs
            }
            gain[None] = gain[0]  # the embedding's error enters where layer 0's does
            for fork in self.forks:
                kld, error = gain[fork.spec.layer]
                yield self._entry(fork, kld * fork.error / NOISE, error * fork.error / NOISE)
        for fork in self.variants(None, lambda role: role == "output"):
            variant = (head[0], linear_of(self.whole(fork)))
            yield self._entry(fork, *divergence(self.source, (head, streams[0]), (variant, streams[0])))

    def _entry(self, fork: Fork, kld: float, error: float) -> Entry:
        return entry(fork.spec, fork.qtype, kld, error)


class RoutedForks(Watcher):
    """What each variant of a layer's experts would make of the clean stream. sums: float32 [n_fork, n_clean, d]."""

    def __init__(self, run: Measurement, forks: list[Fork], sums: torch.Tensor):
        self.run, self.forks, self.sums = run, forks, sums

    def observe_expert(self, visit: ExpertVisit) -> None:
        """Adds the expert's share, of its clean tokens."""
        mine = visit.tokens < self.sums.shape[1]
        if not mine.any():
            return
        tokens, x, hidden, share = visit.tokens[mine], visit.x[mine], visit.hidden[mine], visit.weight[mine, None]
        gate, up, down = visit.matrices
        parts = [ROUTED_ROLES.index(fork.spec.role) for fork in self.forks]
        jobs = [
            self.run.pool.submit(self.run.requantize, fork, visit.matrices[part], visit.expert)
            for fork, part in zip(self.forks, parts, strict=True)
        ]
        for fork_sum, part, job in zip(self.sums, parts, jobs, strict=True):
            made = job.result()
            if part == 0:
                out = (F.silu(x @ made.T) * (x @ up.T)) @ down.T
            elif part == 1:
                out = (F.silu(x @ gate.T) * (x @ made.T)) @ down.T
            else:
                out = hidden @ made.T
            fork_sum.index_add_(0, tokens, out.float() * share)


def choose_tier(source: CheckpointSource, tokens: torch.Tensor, types: Candidates, budget: int) -> tuple[Tier, int]:
    """Full if `budget` stream-tokens (tokens x forks) hold a chunk for each fork, else cheap; and how many chunks."""
    specs = family.specs(source.config)
    n_forks = 1 + sum(len(types.of(spec)) for spec in specs)
    t = tokens.shape[1]
    if budget // (n_forks * t) >= 1:
        return "full", min(len(tokens), budget // (n_forks * t))
    return "cheap", max(1, min(len(tokens), budget // ((source.config.n_layer + 1) * t)))


@torch.inference_mode()
def measure(
    source: CheckpointSource,
    imatrix: Imatrix,
    tokens: torch.Tensor,
    types: Candidates = DEFAULT,
    *,
    tier: Tier | None = None,
    budget: int = 1 << 21,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Sensitivity of every quantizable tensor to every candidate type, for tokens int64 [n_chunk, t].

    tier, budget: as in `choose_tier`, which decides if no tier is given.
    """
    chosen, n_chunk = choose_tier(source, tokens, types, budget)
    run = Measurement(source, imatrix, tier or chosen, types)
    run.run(tokens[:n_chunk], progress)
    return Sensitivity(source.name, run.tier, n_chunk * tokens.shape[1], tuple(run.entries()))


PANELS = 4  # of a heat map, side by side


def heat_map(sensitivity: Sensitivity, path: Path) -> None:
    """A panel a role, layers x types, as PNG or SVG, all in one scale of colours: log10 KLD."""
    with needs("plots"):
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

    rows = [entry for entry in sensitivity.entries if entry.layer is not None]
    roles = sorted({e.role for e in rows}, key=lambda role: (role not in ROUTED_ROLES, role))
    norm = LogNorm(min(max(e.kld, 1e-9) for e in rows), max(max(e.kld, 1e-9) for e in rows) * 1.001)
    n_layer = len({e.layer for e in rows})
    down, across = -(-len(roles) // PANELS), min(PANELS, len(roles))
    size = (2.6 * across + 1.2, (1.3 + min(6.0, max(0.8, 0.13 * n_layer))) * down + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for axes, role in zip(panels, roles, strict=False):
        image = _panel(axes, role, [e for e in rows if e.role == role], norm)
    for axes in panels[len(roles) :]:
        axes.set_axis_off()
    title = f"{sensitivity.model}: KLD at the output if only this tensor has this type"
    figure.suptitle(title, fontsize=11, parse_math=False)  # a$x_{$b is a name
    figure.colorbar(image, ax=list(panels), label="nats per token", fraction=0.03)
    with replacing(path) as out:
        figure.savefig(out, dpi=150, format=path.suffix[1:] or "png")


def _panel(axes: "Axes", role: str, rows: list[Entry], norm: "LogNorm") -> "AxesImage":
    """One role. Types from the fewest bits to the most."""
    types = sorted({e.qtype for e in rows}, key=lambda name: (qtypes.get(name).bpw, name))
    layers = sorted({e.layer for e in rows if e.layer is not None})
    grid = np.full((len(layers), len(types)), np.nan)
    for e in rows:
        if e.layer is not None:
            grid[layers.index(e.layer), types.index(e.qtype)] = max(e.kld, 1e-9)
    image = axes.imshow(grid, aspect="auto", norm=norm, cmap="magma", interpolation="nearest")
    step = max(1, len(layers) // 12)
    axes.set_xticks(range(len(types)), types, rotation=90, fontsize=8)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]], fontsize=8)
    axes.set_title(role, fontsize=9, parse_math=False)
    return image
