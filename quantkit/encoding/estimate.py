"""What each tensor's type costs at the output, estimated for our own encoder from one backward pass.

To second order the divergence is ½ E (g·δ)², summed over tokens: g are gradients at the residual stream
(`formats.gradients`, labels drawn from the model: the Fisher information), δ is what a tensor's error changes there. So
no variant travels on through the model: a tensor is encoded in each type, and what its layer makes then is compared
with what it should make. ½ tr(H_O Δ H_I Δᵀ) of arXiv 2505.22988 is the same, factored; here tokens stay apart, and
what lies between a matrix and the stream is computed.

Text goes through the layers as in `calibration.collect`. The chunks that the gradients are of are compared; moments are
of the others, so that no encoder is judged by the tokens that it was fitted to. Of routed experts a sample stands for
all, by its share of the energy.

The second order does not see that errors move tokens to other experts in the layers behind, so it favours late layers.
How many are moved goes with the size of an error, not its square. Therefore some chunks go through the model with noise
of a known energy, added behind each layer in a copy of its own: what they diverge by beyond what the gradients say of
the noise, over the root of its energy, is what the layer's errors cost besides.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from quantkit import ranks
from quantkit.calibration.collect import turns_of
from quantkit.calibration.variants import Candidates, divergence, entry, replaced, replaced_feed
from quantkit.encoding.api import SUPPORTED, nearest
from quantkit.encoding.hessian import Factor, Hessian, blend, prepare, second_moment
from quantkit.encoding.moments import SAME_INPUT, Moments
from quantkit.errors import QuantkitError
from quantkit.formats.gradients import StreamGradients, path_of, tokens_in
from quantkit.formats.sensitivity import Entry, Sensitivity
from quantkit.ggml import quants
from quantkit.models import family
from quantkit.progress import say
from quantkit.runtime.layers import Feed, LayerWeights, attention, rms_norm, with_mla
from quantkit.runtime.memory import Limits, Memory, room_for
from quantkit.runtime.rope import angles
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import ATTENTION_TOKENS, Step, stream
from quantkit.runtime.watch import ExpertVisit, Watcher
from quantkit.tensors import ROUTED_ROLES, TensorSpec

SAMPLED = 8  # routed experts of a layer
NOISE = 1e-3  # its energy over that of the stream
GRADIENT_BYTES = 48  # for each number of the stream that is compared: three gradients, their products, both states
NOISY_TOKENS = 1 << 18  # of all noisy copies together, if there are chunks for them

Scores = dict[tuple[str, str, int], list[float]]
"""(tensor, type, expert or 0) -> Σ (g·δ)² of each chunk, all samples of labels together; last Σ |δ|² / |stream|²."""


@dataclass(frozen=True)
class Text:
    """Chunks of one length, int64 [n, t]: those that the gradients are of, those for moments (none: the former serve),
    and how many of the former go through the model noisily, once for each place where there is noise."""

    compared: torch.Tensor
    fitted: torch.Tensor
    n_noisy: int
    places: int

    @classmethod
    def of(cls, folder: Path, tokens: torch.Tensor, n_layer: int) -> "Text":
        """tokens: calibration text; what the gradients in the folder are of is taken out of it."""
        compared = tokens_in(folder)
        if compared.shape[1] != tokens.shape[1]:
            tokens = compared[:0]
        known = {tuple(row) for row in compared.tolist()}
        keep = [i for i, row in enumerate(tokens.tolist()) if tuple(row) not in known]
        places = n_layer + 1
        return cls(
            compared, tokens[keep], max(1, min(len(compared), NOISY_TOKENS // (places * compared.shape[1]))), places
        )

    @property
    def all(self) -> torch.Tensor:
        """In the order of the stream."""
        return torch.cat([self.compared, self.fitted, *[self.compared[: self.n_noisy]] * self.places])

    @property
    def for_moments(self) -> range:
        """Tokens that moments are formed of."""
        n = self.compared.numel()
        return range(n, n + self.fitted.numel()) if len(self.fitted) else range(n)

    def noisy(self, place: int) -> slice:
        """Chunks of the copy with noise behind layer `place - 1`."""
        first = len(self.compared) + len(self.fitted) + place * self.n_noisy
        return slice(first, first + self.n_noisy)


class Estimate:
    """One pass: what its layers share, and what it has found so far."""

    def __init__(self, source: CheckpointSource, folder: Path, text: Text, types: Candidates):
        self.source, self.folder, self.text = source, folder, text
        self.specs = family.specs(source.config)
        self.types = {spec: types.of(spec) for spec in self.specs}
        self.angles = angles(source.config, torch.arange(text.compared.shape[1], device=source.device))
        self.scores: dict[tuple[str, str], list[float]] = {}
        self.expected: list[float] = []  # by the gradients, of the noise at each place
        self.n_sample = 0

    def wanted(self, layer: int | None, roles: Callable[[str], bool]) -> list[TensorSpec]:
        """Tensors of a layer with such a role for which there are candidates."""
        return [spec for spec in self.specs if spec.layer == layer and roles(spec.role) and self.types[spec]]

    def whole(self, spec: TensorSpec) -> torch.Tensor:
        """A tensor that is not routed, float32 [n_matrices, rows, n_in]."""
        per, device = spec.n_rows // spec.n_matrices, str(self.source.device)
        starts = range(0, spec.n_rows, per)
        read = [family.read(self.source.checkpoint, self.source.config, spec, i, i + per, device) for i in starts]
        return torch.stack(read)

    def variants(
        self, spec: TensorSpec, weights: torch.Tensor, known: Factor | None
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Matrices float32 [E, rows, n_in] in each candidate type, as `make` would encode them."""
        for qtype in self.types[spec]:
            if qtype in SUPPORTED and known is not None:
                yield qtype, nearest(qtype, weights, known)
            else:
                each: list[torch.Tensor | None] = [None] * len(weights)
                if known is not None:
                    each = list(known.h.diagonal(dim1=-2, dim2=-1) if known.coupled else known.weights)
                yield qtype, torch.stack([_by_ggml(qtype, w, h) for w, h in zip(weights, each, strict=True)])

    def layer(self, step: Step) -> None:
        """Computes it and adds what there is to say of its tensors."""
        source, text = self.source, self.text
        before = step.hidden[: len(text.compared)].to(source.device, torch.float32, copy=True)
        here = LayerEstimate(self, step.layer)
        self.n_sample = len(here.gradients.middle)
        if step.layer == 0:
            here.embedding()
            self._noise(step.hidden, here.gradients.before, 0)
        step.compute(here)
        weights = with_mla(step.weights)
        middle = here.attention(before, weights)
        if weights.feed is not None:
            here.feed_forward(middle, weights, weights.feed)
        self._noise(step.hidden, here.gradients.after, step.layer + 1)
        self._gather(here)

    def _gather(self, here: "LayerEstimate") -> None:
        """Of all ranks, experts in their order: the same sums for any number of ranks."""
        energy: dict[int, float] = {}
        scores: Scores = {}
        for energies, found in ranks.gather([list(here.energy.items()), [[*key, s] for key, s in here.scores.items()]]):
            energy |= {e: value for e, value in energies}
            scores |= {(name, qtype, e): s for name, qtype, e, s in found}
        seen = sum(energy[e] for e in sorted(energy) if e in here.sampled)
        share = sum(energy[e] for e in sorted(energy)) / seen if seen else 1.0
        routed = {spec.name for spec in self.specs if spec.is_routed}
        for (name, qtype, _), found in sorted(scores.items()):
            sums = self.scores.setdefault((name, qtype), [0.0] * len(found))
            by = share if name in routed else 1.0
            self.scores[name, qtype] = [a + by * b for a, b in zip(sums, found, strict=True)]

    def _noise(self, hidden: torch.Tensor, gradient: torch.Tensor | None, place: int) -> None:
        """Into the copy of this place."""
        if gradient is None:
            raise RuntimeError("no gradient before the first layer")
        clean = hidden[: self.text.n_noisy].float()
        energy = NOISE * clean.square().mean(-1, keepdim=True)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(place)).to(clean.device)
        hidden[self.text.noisy(place)] = (clean + noise * energy.sqrt()).to(hidden.dtype)
        tokens = clean[..., 0].numel()
        g = gradient[:, :tokens].float().square().sum(-1).to(clean.device)
        self.expected.append(0.5 * float((g * energy.flatten()).sum(dtype=torch.float64)) / g.numel())

    def entries(self, hidden: torch.Tensor) -> Iterator[Entry]:
        """After the last layer, whose output is `hidden`."""
        head, text, excess = self.source.head(), self.text, self._excess(hidden)
        clean = hidden[: len(text.compared)]
        tokens, by_name = self.n_sample * text.compared.shape[1], {spec.name: spec for spec in self.specs}
        for (name, qtype), (*sums, energy) in self.scores.items():
            spec, chunks = by_name[name], torch.tensor(sums, dtype=torch.float64) / (2 * tokens)
            # What attention errs meets its own layer's router, too.
            place = 0 if spec.layer is None else spec.layer + (not spec.role.startswith("attn_"))
            moved = excess[place] * (energy / text.compared.numel()) ** 0.5
            error = float(chunks.std()) / len(chunks) ** 0.5 if len(chunks) > 1 else 0.0
            yield entry(spec, qtype, float(chunks.mean()) + moved, error)
        for spec in self.wanted(None, lambda role: role == "output"):
            for qtype, made in self.variants(spec, self.whole(spec), None):
                weight = made[0].to(self.source.dtype)
                other = (head[0], lambda x, weight=weight: x @ weight.T)
                yield entry(spec, qtype, *divergence(self.source, (head, clean), (other, clean)))

    def _excess(self, hidden: torch.Tensor) -> list[float]:
        """Of every place, nats a token for errors of the stream's own energy."""
        head, text = self.source.head(), self.text
        clean = head, hidden[: text.n_noisy]
        noisy = [(head, hidden[text.noisy(place)]) for place in range(text.places)]
        found = [divergence(self.source, clean, other, first=0)[0] for other in noisy]
        more = [max(0.0, kld - expected) / NOISE**0.5 for kld, expected in zip(found, self.expected, strict=True)]
        say(
            "noise costs, over what gradients expect: "
            + " ".join(f"{k / e:.2f}" for k, e in zip(found, self.expected, strict=True))
        )
        return more


def _by_ggml(qtype: str, weight: torch.Tensor, importance: torch.Tensor | None) -> torch.Tensor:
    """[rows, n_in] as ggml encodes it."""
    rows = weight.float().cpu().numpy()
    if importance is None and quants.requires_importance(qtype):
        importance = torch.ones(rows.shape[1])
    packed = quants.quantize(qtype, rows, None if importance is None else importance.float().cpu().numpy())
    return torch.from_numpy(quants.dequantize(qtype, packed, rows.shape[1])).to(weight.device)


class LayerEstimate(Watcher):
    """One layer, while it is computed and after: what this rank has of it.

    energy: routed expert -> of what it adds to the stream under the gradients; its share of the layer's damage.
    """

    def __init__(self, run: Estimate, layer: int):
        self.run, self.layer = run, layer
        self.gradients = StreamGradients.load(path_of(run.folder, layer))
        if self.gradients.after.shape[1:] != (run.text.compared.numel(), run.source.config.d):
            raise QuantkitError(f"{path_of(run.folder, layer)}: gradients of another model, or of other layers' text")
        self.own = self._share()
        self.needed = {SAME_INPUT.get(spec.role, spec.role) for spec in self.own}
        self.moments: dict[str, Moments] = {}
        self.seen: Counter[str] = Counter()
        self.weights: list[torch.Tensor] = []
        self.shared: Hessian | None = None
        self.scores: Scores = {}
        self.energy: dict[int, float] = {}
        n_expert = run.source.config.n_expert
        step = max(1, n_expert // SAMPLED)
        self.sampled = range(layer % step, n_expert, step)

    def _share(self) -> list[TensorSpec]:
        """Tensors that are not routed and that this rank looks at."""
        every = self.run.wanted(self.layer, lambda role: role not in ROUTED_ROLES)
        return every[ranks.index() :: ranks.count()]

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Adds to the moments those tokens that are for them."""
        if role == "ffn_gate_inp":
            self.weights.append(weight)
        elif role not in self.needed:
            return
        first, wanted = self.seen[role], self.run.text.for_moments
        self.seen[role] += len(x)
        here = slice(max(0, wanted.start - first), max(0, wanted.stop - first))
        if len(x[here]):
            self.moments.setdefault(role, Moments()).add(x[here], weight[here])

    def observe_expert(self, visit: ExpertVisit) -> None:
        """Encodes and compares its matrices, if it is of the sample."""
        if self.shared is None:
            self.shared = self.moments["ffn_gate_inp"].hessians()[0]
            self.weight = torch.cat(self.weights)
        compared = self.run.text.compared.numel()
        mine = (visit.tokens < compared).nonzero()[:, 0]  # tokens are in order
        tokens, share = visit.tokens[mine], visit.weight[mine]
        g = self._at(self.gradients.after, tokens)
        inner = visit.hidden[mine].float().square().mean(-1) * share.square()
        self.energy[visit.expert] = float((g.square().sum((0, 2)) * inner).sum(dtype=torch.float64))
        if visit.expert not in self.sampled or not len(mine):
            return
        known, x, stream_size = self._factors(visit), visit.x[mine], 1 / self.weight[tokens]
        gate, up, down = visit.matrices
        a, b = x @ gate.T, x @ up.T
        clean = (F.silu(a) * b) @ down.T
        for spec in self.run.wanted(self.layer, lambda role: role in ROUTED_ROLES):
            part = ROUTED_ROLES.index(spec.role)
            for qtype, made in self.run.variants(spec, visit.matrices[part].float()[None], known[part == 2]):
                w = made[0].to(x.dtype)
                hidden = F.silu(x @ w.T) * b if part == 0 else F.silu(a) * (x @ w.T if part == 1 else b)
                change = hidden @ (w if part == 2 else down).T - clean
                self._add((spec.name, qtype, visit.expert), g, change.float() * share[:, None], tokens, stream_size)

    def _factors(self, visit: ExpertVisit) -> tuple[Factor, Factor]:
        """Of gate and up, and of down, as `layer.LayerEncoder` has them."""
        wanted, device = self.run.text.for_moments, visit.x.device
        fit = (visit.tokens >= wanted.start) & (visit.tokens < wanted.stop)
        weight = self.weight[visit.tokens[fit]] * visit.weight[fit].float().square()
        n_in, n_ff = visit.x.shape[1], visit.hidden.shape[1]
        assert self.shared is not None
        inner = blend(second_moment(visit.x[fit], weight), self.shared, n_in)
        return prepare([inner], n_in, device), prepare([second_moment(visit.hidden[fit], weight)], n_ff, device)

    def _at(self, gradient: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [n_sample, m, d], where the weights are."""
        return gradient[:, tokens.to(gradient.device)].to(self.run.source.device).float()

    def _add(
        self, key: tuple[str, str, int], g: torch.Tensor, change: torch.Tensor, tokens: torch.Tensor, size: torch.Tensor
    ) -> None:
        """change [m, d] of the stream at these tokens; size [m]: mean squares of the stream."""
        squares = (g * change).sum(-1, dtype=torch.float64).square().sum(0)
        chunk = tokens.to(squares.device) // self.run.text.compared.shape[1]
        sums = squares.new_zeros(len(self.run.text.compared)).index_add_(0, chunk, squares)
        self.scores[key] = [*sums.tolist(), float((change.square().mean(-1) / size).sum(dtype=torch.float64))]

    def _every(self) -> torch.Tensor:
        return torch.arange(self.run.text.compared.numel(), device=self.run.source.device)

    def embedding(self) -> None:
        """Compares the embedding, if it has candidates."""
        assert self.gradients.before is not None
        if ranks.index():
            return
        for spec in self.run.wanted(None, lambda role: role == "token_embd"):
            g, table = self.gradients.before.to(self.run.source.device).float(), self.run.whole(spec)
            ids = self.run.text.compared.flatten().to(table.device)
            for qtype, made in self.run.variants(spec, table, None):
                change = F.embedding(ids, made[0] - table[0])
                self._add((spec.name, qtype, 0), g, change, self._every(), _size(F.embedding(ids, table[0])))

    def attention(self, before: torch.Tensor, weights: LayerWeights) -> torch.Tensor:
        """Compares matrices of attention; the state after it, [n_compared, t, d]."""
        run, config = self.run, self.run.source.config
        parts = before.split(max(1, ATTENTION_TOKENS // before.shape[1]))
        clean = torch.cat([attention(part, weights, config, run.angles) for part in parts])
        g, after = self.gradients.middle.to(before.device).float(), before + clean
        for spec in self.own:
            if spec.role.startswith("attn_"):
                for qtype, made in self._variants(spec):
                    variant = replaced(weights, spec.role, made.view(spec.shape).to(weights.k_b.dtype))
                    out = torch.cat([attention(part, variant, config, run.angles) for part in parts])
                    self._add(
                        (spec.name, qtype, 0), g, (out - clean).float().flatten(0, 1), self._every(), _size(after)
                    )
        return after

    def feed_forward(self, middle: torch.Tensor, weights: LayerWeights, feed: Feed) -> None:
        """Compares matrices of the dense or shared feed-forward."""
        source = self.run.source
        x = rms_norm(middle.flatten(0, 1), weights.ffn_norm, source.config.rms_eps).to(source.dtype)
        clean, g = feed(x), self.gradients.after.to(x.device).float()
        for spec in self.own:
            if spec.role.startswith("ffn_"):
                for qtype, made in self._variants(spec):
                    out = replaced_feed(feed, spec.role, made.view(spec.shape).to(x.dtype))(x)
                    self._add((spec.name, qtype, 0), g, (out - clean).float(), self._every(), _size(middle))

    def _variants(self, spec: TensorSpec) -> Iterator[tuple[str, torch.Tensor]]:
        known = self.moments[SAME_INPUT.get(spec.role, spec.role)].hessians()
        yield from self.run.variants(spec, self.run.whole(spec), prepare(known, spec.n_in, self.run.source.device))


def _size(stream: torch.Tensor) -> torch.Tensor:
    """Mean squares of [..., d], [n]."""
    return stream.float().square().mean(-1).flatten()


@torch.inference_mode()
def estimate(
    source: CheckpointSource,
    folder: Path,
    tokens: torch.Tensor,
    types: Candidates,
    memory: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Sensitivity:
    """Of every tensor and candidate type, as `calibration.sensitivity.measure` has it. folder: of gradients. tokens
    int64 [n_chunk, t]: calibration text. memory: bytes for the pass. Ranks share the work.

    QuantkitError if the folder's gradients are of another model, or of an older version.
    """
    text = Text.of(folder, tokens, source.config.n_layer)
    if not len(text.fitted):
        say("warning: types are judged by the tokens that they were fitted to; take more --tokens than gradients have")
    run, last = Estimate(source, folder, text, types), None
    more = Memory(GRADIENT_BYTES * text.compared.numel() * source.config.d, 0, 0)
    room = room_for(source, text.all.numel(), Limits(memory, None, folder), more)
    for step in stream(source, text.all, room=room, turns=turns_of(source.config.n_expert)):
        run.layer(step)
        last = step.hidden
        if progress:
            progress(step.layer + 1)
    assert last is not None
    return Sensitivity(source.name, "gradients", text.compared.numel(), tuple(run.entries(last)))
