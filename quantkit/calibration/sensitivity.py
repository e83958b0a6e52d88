"""How much each tensor's type costs at the output: KL divergence when only that tensor is quantized, in one pass.

Forked streams. At layer l the clean hidden states fork into one variant per (tensor, type), computed with that tensor
quantized and everything else original. All forks then travel on through the clean remaining layers as extra chunks, so
each layer is still read once for all of them, and at the end every fork's logits meet the clean ones.

The cheap tier sends only one fork per layer on, a clean state with known noise. Its KLD over the noise's relative
energy is the layer's gain, by which the relative error of each variant's layer output is multiplied.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.ggml import library as ggml
from quantkit.models import deepseek2 as deepseek
from quantkit.runtime.experts.streamed import ExpertVisit, StreamedExperts
from quantkit.runtime.layers import Block, Feed, Linear, attention, route
from quantkit.runtime.rope import angles
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import apply_attention, ffn_input, head_tiles
from quantkit.tensors import Imatrix, TensorSpec

Tier = Literal["full", "cheap"]
ROUTED_TYPES = ("IQ1_S", "IQ2_XXS", "Q2_K", "Q3_K", "Q4_K")
OTHER_TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0")
NOISE = 0.02  # relative energy of the cheap tier's noise: about a layer's damage at 1.6 bit on a model of many layers


@dataclass(frozen=True)
class Entry:
    """Divergence at the output (nats a token, with its standard error) if only this tensor has this type."""

    tensor: str
    role: str
    layer: int | None
    qtype: str
    n_bytes: int
    kld: float
    kld_error: float


def _checked(entry: Entry) -> Entry:
    """TypeError unless every field is what its annotation says, and the figures are finite."""
    texts, numbers = (entry.tensor, entry.role, entry.qtype), (entry.kld, entry.kld_error)
    whole = (entry.n_bytes, 0 if entry.layer is None else entry.layer)
    fine = all(isinstance(t, str) for t in texts) and all(type(n) is int and 0 <= n < 1 << 62 for n in whole)
    if not (fine and all(type(x) in (int, float) and abs(x) < 1e300 for x in numbers)):
        raise TypeError(f"entry {entry.tensor!r:.80}")
    return entry


@dataclass(frozen=True)
class Sensitivity:
    model: str
    tier: Tier
    tokens: int
    entries: tuple[Entry, ...]

    def to_json(self) -> str:
        head = {"quantkit_sensitivity": 1, "model": self.model, "tier": self.tier, "tokens": self.tokens}
        lines = ",\n".join("  " + json.dumps(asdict(entry)) for entry in self.entries)
        return json.dumps(head)[:-1] + ', "entries": [\n' + lines + "\n]}\n"

    @classmethod
    def load(cls, path: Path) -> "Sensitivity":
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            entries = tuple(_checked(Entry(**row)) for row in table["entries"])
            if (type(table["model"]), type(table["tokens"])) != (str, int) or table["tier"] not in get_args(Tier):
                raise TypeError("model, tier or tokens")
            return cls(table["model"], table["tier"], table["tokens"], entries)
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise QuantkitError(f"{path}: not a sensitivity file: {error}") from None

    def predict(self, types: Mapping[str, str]) -> float:
        """Sum of the entries' KLD over a choice of types (tensor name -> qtype); tensors without an entry count 0."""
        known = {(entry.tensor, entry.qtype): entry.kld for entry in self.entries}
        return sum(known.get(item, 0.0) for item in types.items())


def candidates(spec: TensorSpec, routed: Sequence[str], others: Sequence[str]) -> list[str]:
    """Types to try on a tensor: those whose blocks fit its rows. Fixed tensors have none, embeddings no importance."""
    if spec.fixed:
        return []
    wanted = [name for name in (routed if spec.is_routed else others) if spec.n_in % ggml.block_size(name) == 0]
    blind = spec.role == "token_embd"
    return [name for name in wanted if not (blind and qtypes.needs_importance(name))]


@dataclass
class Fork:
    """A (tensor, type) variant; its stream is the index-th, or, in the cheap tier, only its error is kept."""

    spec: TensorSpec
    qtype: str
    error: float = 0.0


class Measurement:
    """One pass. Streams are chunks of one tensor: the first n_chunk are clean, then n_chunk for each fork."""

    def __init__(
        self, source: CheckpointSource, imatrix: Imatrix, tier: Tier, routed: Sequence[str], others: Sequence[str]
    ):
        self.source, self.config, self.imatrix, self.tier = source, source.config, imatrix, tier
        self.plan = {spec: candidates(spec, routed, others) for spec in deepseek.specs(source.config)}
        self.forks: list[Fork] = []
        self.gains: list[int] = []  # cheap tier: layer of each noise fork, in stream order
        for name in {qtype for types in self.plan.values() for qtype in types}:
            ggml.prepare(name)
        self.pool = ThreadPoolExecutor(torch.get_num_threads())

    def variants(self, layer: int | None, roles: Callable[[str], bool]) -> list[Fork]:
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
        if importance is None and ggml.requires_importance(fork.qtype):
            raise QuantkitError(f"imatrix has no {fork.spec.name}, and {fork.qtype} cannot be encoded without it")
        rows = weight.float().cpu().numpy()
        packed = ggml.quantize(fork.qtype, rows, importance)
        decoded = torch.from_numpy(ggml.dequantize(fork.qtype, packed, rows.shape[1]))
        return decoded.to(weight.device, weight.dtype)

    def whole(self, fork: Fork) -> torch.Tensor:
        """A tensor that is not routed, read anew and requantized, in its own shape."""
        spec = fork.spec
        per_matrix = spec.n_rows // spec.n_matrices

        def part(bounds: tuple[int, int]) -> torch.Tensor:
            rows = deepseek.read(self.source.checkpoint, self.config, spec, *bounds)
            return self.requantize(fork, rows, bounds[0] // per_matrix)

        made = torch.cat(list(self.pool.map(part, deepseek.slices(spec))))
        return made.view(spec.shape).to(self.source.device, self.source.dtype)

    def run(self, tokens: torch.Tensor, progress: Callable[[int], None] | None = None) -> None:
        """Carry everything through all layers; afterwards `streams` holds the final hidden states."""
        self.n_chunk, self.t = tokens.shape
        self.n_clean = tokens.numel()
        clean = self.source.embed(tokens)
        embeddings = self.variants(None, lambda role: role == "token_embd")
        made = [F.embedding(tokens.to(clean.device), self.whole(fork).float()) for fork in embeddings]
        self.streams = self._fork(clean, embeddings, made, clean)
        self.cos, self.sin = angles(self.config, torch.arange(self.t, device=clean.device))
        for layer in range(self.config.n_layer):
            self._layer(layer, self.source.layer(layer))
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

    def _layer(self, layer: int, block: Block) -> None:
        before = self.streams[: self.n_chunk].clone()
        apply_attention(self.streams, block, self.config, self.cos, self.sin)
        forks = self.variants(layer, lambda role: role.startswith("attn_"))
        attended = [
            before + attention(before, self._replaced(block, fork), self.config, self.cos, self.sin) for fork in forks
        ]
        if self.tier == "cheap":  # their error is judged after the whole layer, so they pass its feed-forward too
            middle = torch.cat([self.streams, *attended])
        else:
            self.forks += forks
            middle = self.streams = torch.cat([self.streams, *attended])
        after, ffn_forks, ffn_streams = self._feed_forward(layer, block, middle)
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

    def _replaced(self, block: Block, fork: Fork) -> Block:
        """The block with one attention tensor requantized."""
        weight, role = self.whole(fork), fork.spec.role
        if role in ("attn_k_b", "attn_v_b"):
            return replace(block, **{role.removeprefix("attn_"): weight})
        linear = _linear(weight)
        if role in ("attn_q_a", "attn_q_b"):
            assert isinstance(block.q, tuple)
            q_a, norm, q_b = block.q
            return replace(block, q=(linear, norm, q_b) if role == "attn_q_a" else (q_a, norm, linear))
        return replace(block, **{{"attn_q": "q", "attn_kv_a_mqa": "kv_a", "attn_output": "output"}[role]: linear})

    def _feed_forward(
        self, layer: int, block: Block, middle: torch.Tensor
    ) -> tuple[torch.Tensor, list[Fork], list[torch.Tensor]]:
        """All streams after the clean feed-forward, and the clean stream after each of its variants."""
        x = ffn_input(middle, block, self.source)
        clean_x = x[: self.n_clean]
        forks, outputs = [], []
        routed: dict[int, torch.Tensor] = {}
        routed_forks = self.variants(layer, lambda role: role.endswith("_exps"))
        if block.router is not None and isinstance(block.experts, StreamedExperts):
            expert, weight = route(x, block.router, self.config)
            routed = {i: torch.zeros(clean_x.shape, device=x.device) for i in range(len(routed_forks))}
            block.experts.observe = lambda visit: self._visit(visit, routed_forks, routed)
            summed = block.experts(x, expert, weight)
            fixed = block.feed(clean_x).float() if block.feed else 0.0
            forks, outputs = routed_forks, [routed[i] + fixed for i in range(len(routed_forks))]
        else:
            summed = torch.zeros(x.shape, device=x.device)
        for fork in self.variants(layer, lambda role: role.startswith("ffn_") and not role.endswith("_exps")):
            assert block.feed is not None
            variant = _replaced_feed(block.feed, fork.spec.role, _linear(self.whole(fork)))
            forks = [*forks, fork]
            outputs = [*outputs, summed[: self.n_clean].float() + variant(clean_x).float()]
        every = summed.float() + (block.feed(x).float() if block.feed else 0.0)
        clean_middle = middle[: self.n_chunk]
        return (middle + every.view_as(middle), forks, [clean_middle + out.view_as(clean_middle) for out in outputs])

    def _visit(self, visit: ExpertVisit, forks: list[Fork], sums: dict[int, torch.Tensor]) -> None:
        """One expert: each variant's contribution to the clean stream."""
        mine = visit.tokens < self.n_clean
        if not mine.any():
            return
        tokens, x, hidden, share = visit.tokens[mine], visit.x[mine], visit.hidden[mine], visit.weight[mine, None]
        gate, up, down = visit.matrices
        index = {"ffn_gate_exps": 0, "ffn_up_exps": 1, "ffn_down_exps": 2}
        jobs = [self.pool.submit(self.requantize, f, visit.matrices[index[f.spec.role]], visit.expert) for f in forks]
        for i, (fork, job) in enumerate(zip(forks, jobs, strict=True)):
            made = job.result()
            if fork.spec.role == "ffn_gate_exps":
                out = (F.silu(x @ made.T) * (x @ up.T)) @ down.T
            elif fork.spec.role == "ffn_up_exps":
                out = (F.silu(x @ gate.T) * (x @ made.T)) @ down.T
            else:
                out = hidden @ made.T
            sums[i].index_add_(0, tokens, out.float() * share)

    def entries(self) -> Iterator[Entry]:
        """After `run`: divergence of every fork from the clean stream, over the second half of each chunk."""
        head = self.source.head()
        streams = self.streams.split(self.n_chunk)
        if self.tier == "full":
            for fork, hidden in zip(self.forks, streams[1:], strict=True):
                yield self._entry(fork, *self._divergence(head, streams[0], head, hidden))
        else:
            pairs = zip(self.gains, streams[1:], strict=True)
            gain = {layer: self._divergence(head, streams[0], head, hidden) for layer, hidden in pairs}
            gain[None] = gain[0]  # the embedding's error enters where layer 0's does
            for fork in self.forks:
                kld, error = gain[fork.spec.layer]
                yield self._entry(fork, kld * fork.error / NOISE, error * fork.error / NOISE)
        for fork in self.variants(None, lambda role: role == "output"):
            variant = (head[0], _linear(self.whole(fork)))
            yield self._entry(fork, *self._divergence(head, streams[0], variant, streams[0]))

    def _divergence(
        self,
        head: tuple[torch.Tensor, Linear],
        clean: torch.Tensor,
        other: tuple[torch.Tensor, Linear],
        hidden: torch.Tensor,
    ) -> tuple[float, float]:
        rows = [state[:, self.t // 2 : self.t - 1].reshape(-1, self.config.d) for state in (clean, hidden)]
        tiles = zip(head_tiles(self.source, head, rows[0]), head_tiles(self.source, other, rows[1]), strict=True)
        parts = []
        for p, q in tiles:
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
        kld = torch.cat(parts).double()
        return float(kld.mean()), float(kld.std() / max(1, len(kld)) ** 0.5)

    def _entry(self, fork: Fork, kld: float, error: float) -> Entry:
        spec = fork.spec
        n_bytes = spec.n_rows * ggml.row_bytes(fork.qtype, spec.n_in)
        return Entry(spec.name, spec.role, spec.layer, fork.qtype, n_bytes, kld, error)


def _linear(weight: torch.Tensor) -> Linear:
    return lambda x: x @ weight.T


def _replaced_feed(feed: Feed, role: str, linear: Linear) -> Feed:
    return replace(feed, **{role.removeprefix("ffn_").removesuffix("_shexp"): linear})


def choose_tier(
    source: CheckpointSource, tokens: torch.Tensor, routed: Sequence[str], others: Sequence[str], budget: int
) -> tuple[Tier, int]:
    """Full if `budget` stream-tokens (tokens x forks) hold a chunk for each fork, else cheap; and how many chunks."""
    specs = deepseek.specs(source.config)
    n_forks = 1 + sum(len(candidates(spec, routed, others)) for spec in specs)
    t = tokens.shape[1]
    if budget // (n_forks * t) >= 1:
        return "full", min(len(tokens), budget // (n_forks * t))
    return "cheap", max(1, min(len(tokens), budget // ((source.config.n_layer + 1) * t)))


@torch.inference_mode()
def measure(
    source: CheckpointSource,
    imatrix: Imatrix,
    tokens: torch.Tensor,
    *,
    tier: Tier | None = None,
    routed: Sequence[str] = ROUTED_TYPES,
    others: Sequence[str] = OTHER_TYPES,
    budget: int = 1 << 21,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Sensitivity of every quantizable tensor to every candidate type, for tokens int64 [n_chunk, t]."""
    chosen, n_chunk = choose_tier(source, tokens, routed, others, budget)
    run = Measurement(source, imatrix, tier or chosen, routed, others)
    run.run(tokens[:n_chunk], progress)
    return Sensitivity(source.name, run.tier, n_chunk * tokens.shape[1], tuple(run.entries()))


def heat_map(sensitivity: Sensitivity, path: Path) -> None:
    """layers x (role, type) as PNG or SVG, colour log10 KLD."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.colors import LogNorm

    rows = [entry for entry in sensitivity.entries if entry.layer is not None]
    columns = sorted({(e.role, e.qtype) for e in rows}, key=lambda c: (not c[0].endswith("_exps"), c[0], c[1]))
    layers = sorted({e.layer for e in rows if e.layer is not None})
    grid = np.full((len(layers), len(columns)), np.nan)
    for e in rows:
        if e.layer is not None:
            grid[layers.index(e.layer), columns.index((e.role, e.qtype))] = max(e.kld, 1e-9)
    size = (2 + 0.3 * len(columns), 2.2 + 0.22 * len(layers))
    figure, axes = plt.subplots(figsize=size, layout="constrained")
    image = axes.imshow(grid, aspect="auto", norm=LogNorm(), cmap="magma")
    axes.set_xticks(range(len(columns)), [f"{role} {qtype}" for role, qtype in columns], rotation=90, fontsize=7)
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers], fontsize=7)
    axes.set_ylabel("layer")
    axes.set_title(f"{sensitivity.model}: KLD at the output if only this tensor has this type", fontsize=9)
    figure.colorbar(image, label="nats per token")
    figure.savefig(path, dpi=150)
    plt.close(figure)
