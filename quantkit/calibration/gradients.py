"""A streamed backward pass: how much the loss of the whole model depends on what each matrix makes.

Tokens go forward through the layers, whose inputs are spilled to disk; labels are drawn from the model itself,
y ~ p(· | text), for the Fisher information (the text's own labels would give something else); the sum of -log p(y) over
all positions is derived backward, layer after layer, with the weights read again. All samples of labels share the visit
of a layer. What is left of a layer is a file of `formats.gradients`:

- of routed experts the rows √mean(x²) · g, for gate and up stacked and for down;
- the rows g at the residual stream, after attention and after the layer (of layer 0 before it, too);
- of other matrices H_O, float32, if they have at most MOST_OUTPUTS outputs. In R1 these are left out: attn_q_b (24,576
  outputs: 2.4 GB), gate and up of the dense layers (18,432) and the output matrix (129,280). attn_k_b and attn_v_b are
  left out too: they are many small matrices, and attn_kv_b, which they are cut from, has 32,768 outputs. Router, norms
  and embedding have no low-bit type.

In memory, where the weights are: one layer's weights and the next one's being read, H_O of a layer (0.5 GB in R1) and
tiles, 9 GB in R1 by the estimate; and for each token the hidden state, the input of the feed-forward, and two float32
vectors a sample, 0.24 MB in R1 for 3 samples: there too, or in RAM or on disk, as there is room. So R1's peak is 13 GB
for 16,384 tokens and 25 GB for 65,536. Several ranks share the routed experts, and hand each other what comes back
through one; each has a copy of all the rest. Attention holds the scores of ATTENTION_TOKENS, so chunks are to be short.
"""

import hashlib
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch

from quantkit import ranks
from quantkit.calibration.collect import turns_of
from quantkit.calibration.corpus import TextChoice, cut
from quantkit.calibration.spill import Spill
from quantkit.errors import QuantkitError
from quantkit.formats import gradients, sealed
from quantkit.formats.lock import locked
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.progress import say, track
from quantkit.runtime import backward
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.backward import Backward, Draw, ExpertGradients
from quantkit.runtime.layers import LayerWeights, only_forward, with_mla
from quantkit.runtime.memory import HIDDEN_BYTES, Limits, Memory, room_for
from quantkit.runtime.room import Place, Room
from quantkit.runtime.stream import HEAD_ELEMENTS, Source, job_of, stream
from quantkit.sizes import both_units

MOST_OUTPUTS = 8192
TOKENS = 16384
MOST_SHARE = 8
FORMAT = 2  # of the files: another number, another job


@dataclass(frozen=True)
class GradientOptions:
    """What to derive. samples: of labels; the first seed is `seed`, and each has the next. memory, hidden: as in
    `Calibration`."""

    text: TextChoice = field(default_factory=lambda: TextChoice(n_tokens=TOKENS))
    samples: int = 3
    seed: int = 0
    memory: int | None = None
    hidden: Place | None = None


def calibrate_gradients(source: Source, how: GradientOptions, folder: Path, restart: bool = False) -> list[Path]:
    """Write gradients-NNN.safetensors of every layer into a folder; a pass that was stopped anywhere goes on, with any
    number of ranks, to the same bytes. Refuses, before any work, what memory or disk have no room for."""
    only_forward(source.config, "gradients")
    tokens = cut(how.text.corpus("calibration"), source, how.text).tokens
    with locked(folder), torch.inference_mode(False):
        _write(source, tokens, how, folder, restart)
    return [gradients.path_of(folder, layer) for layer in range(source.config.n_layer)]


def _write(source: Source, tokens: torch.Tensor, how: GradientOptions, folder: Path, restart: bool) -> None:
    ranks.agree(lambda: folder.mkdir(parents=True, exist_ok=True))
    more = memory(source, how.samples, tokens.shape[1])
    room = room_for(source, tokens.numel(), Limits(how.memory, how.hidden, folder), more)
    rows = Rows.of(source.config, tokens.numel(), how.samples)
    facts = f"{job_of(source, tokens)} {how.samples} {how.seed} {room.hidden} {rows.dtype} {FORMAT}"
    job = hashlib.sha256(facts.encode()).hexdigest()
    ranks.same(job, "text, checkpoint or device")
    if ranks.agree(lambda: _is_done(source, folder, job, restart)):
        say(f"{folder}: the gradients are there")
        return
    ranks.agree(lambda: _check_disk(source, rows, room, folder))
    spill = Spill(folder / "state", job)
    GradientPass(source, tokens, rows, room, spill, folder).run(Labels(source, how))
    ranks.agree(spill.remove)


def _is_done(source: Source, folder: Path, job: str, restart: bool) -> bool:
    """Whether the folder holds all that this job is to make. Forgets another one's if it is to restart."""
    paths = [gradients.path_of(folder, layer) for layer in range(source.config.n_layer)]
    found, state = {gradients.job_in(path) for path in paths}, folder / "state"
    shutil.rmtree(folder / "state.done", ignore_errors=True)
    if restart:
        for path in paths:
            path.unlink(missing_ok=True)
        shutil.rmtree(state, ignore_errors=True)
        return False
    if not found <= {None, job}:
        raise QuantkitError(f"{folder} holds gradients of another pass; choose another folder, or use --restart")
    return found == {job} and not state.exists()


class Labels:
    """Draws them from probabilities: a generator for each sample, on the model's device."""

    def __init__(self, source: Source, how: GradientOptions):
        seeds = range(how.seed, how.seed + how.samples)
        self.generators = [torch.Generator(source.device).manual_seed(seed) for seed in seeds]

    def __call__(self, p: torch.Tensor) -> torch.Tensor:
        """As `backward.Draw`."""
        drawn = torch.stack([torch.multinomial(p, 1, generator=generator)[:, 0] for generator in self.generators])
        return ranks.spread(drawn, 0)  # GPUs that round differently must not disagree


@dataclass(frozen=True)
class Rows:
    """Rows that the layers leave: tokens, samples, and the dtype they are stored in."""

    n_tokens: int
    n_sample: int
    dtype: torch.dtype

    @classmethod
    def of(cls, c: ModelConfig, n_tokens: int, n_sample: int) -> "Rows":
        """float32 while they are small."""
        rows = cls(n_tokens, n_sample, torch.float32)
        size = sum(sealed.n_bytes(shape) for layer in range(c.n_layer) for shape in rows.shapes(c, layer).values())
        return rows if size <= HIDDEN_BYTES else replace(rows, dtype=torch.bfloat16)

    def shapes(self, c: ModelConfig, layer: int) -> sealed.Shapes:
        """Of all tensors of a layer's file: known before there are any data."""
        stream = (self.dtype, (self.n_sample * self.n_tokens, c.d))
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {gradients.MIDDLE: stream}
        if layer == 0:
            found |= {gradients.BEFORE: stream, gradients.TOKENS: (torch.int64, (self.n_tokens,))}
        if not c.is_moe(layer):
            found |= {gradients.after(False): stream}
        else:
            m, counts = self.n_sample * self.n_tokens * c.n_used, (torch.int64, (c.n_expert,))
            found |= {
                f"rows.{gradients.INNER}": (self.dtype, (m, 2 * c.n_ff_exp)),
                f"counts.{gradients.INNER}": counts,
                gradients.after(True): stream,
                f"counts.{gradients.DOWN}": counts,
                f"index.{gradients.DOWN}": (torch.int32, (m,)),
                f"scale.{gradients.DOWN}": (torch.float32, (m,)),
            }
        return found | {f"outputs.{role}": (torch.float32, (n, n)) for role, n in outputs(c, layer).items()}


def outputs(c: ModelConfig, layer: int) -> dict[str, int]:
    """Role -> number of outputs of the matrices of which H_O is measured."""
    matrices = (spec for spec in family.specs(c) if spec.layer == layer and len(spec.shape) == 2 and not spec.fixed)
    return {spec.role: spec.shape[0] for spec in matrices if spec.shape[0] <= MOST_OUTPUTS}


def memory(source: Source, n_sample: int, t: int) -> Memory:
    """Of the backward pass, beyond a forward pass's: an upper estimate, of chunks of t tokens."""
    c, size = source.config, source.dtype.itemsize
    tile = max(backward.ATTENTION_TOKENS, t)
    attention = 4 * tile * c.n_head * (4 * c.qk_head + 4 * c.v_head + 6 * t)
    experts = 4 * backward.EXPERT_TOKENS * n_sample * (3 * c.d + 6 * c.n_ff_exp)
    head = c.n_vocab * c.d * size + 4 * 4 * HEAD_ELEMENTS
    h_o = max(sum(4 * n * n for n in outputs(c, layer).values()) for layer in (0, c.n_layer - 1))
    handed = 0  # among ranks: all of an expert, of up to MOST_SHARE times as many tokens as the mean
    if ranks.count() > 1 and c.n_moe:
        handed = MOST_SHARE * 4 * n_sample * c.d * c.n_used // c.n_expert
    return Memory(max(attention, experts, head) + h_o, 4 * n_sample * c.n_used + handed, 8 * n_sample * c.d)


def disk(c: ModelConfig, rows: Rows, hidden: torch.dtype) -> tuple[int, int]:
    """Bytes of the state and of the files that stay."""
    array = rows.n_tokens * c.d
    state = (c.n_layer + 1) * array * hidden.itemsize + 2 * rows.n_sample * array * 4
    shapes = (shape for layer in range(c.n_layer) for shape in rows.shapes(c, layer).values())
    return state, sum(map(sealed.n_bytes, shapes))


def _check_disk(source: Source, rows: Rows, room: Room, folder: Path) -> None:
    """Says what the pass takes, and refuses what there is no room for."""
    state, kept = disk(source.config, rows, room.hidden)
    if room.place == "disk":
        state += (
            rows.n_tokens * source.config.d * (2 * room.hidden.itemsize + source.dtype.itemsize + 8 * rows.n_sample)
        )
    say(
        f"gradients of {rows.n_tokens:,} tokens x {rows.n_sample} samples: {both_units(kept)} in {folder}, and "
        f"{both_units(state)} there until the end"
    )
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free
    if state + kept - there > free:
        raise QuantkitError(f"{folder}: {state + kept - there:,} bytes are needed, {free:,} are free")


@dataclass(frozen=True)
class GradientPass:
    """Both ways over the layers. tokens int64 [n_chunk, t]. spill: what is done so far. folder: for the files."""

    source: Source
    tokens: torch.Tensor
    rows: Rows
    room: Room
    spill: Spill
    folder: Path

    def run(self, draw: Draw) -> None:
        """Goes on where an earlier run stopped. draw: the labels."""
        self.forward()
        self.backward(draw)

    @torch.no_grad()
    def forward(self) -> None:
        """Spills the inputs of every layer, and what the last one makes."""
        c, spill, hidden = self.source.config, self.spill, None
        needed = range(c.n_layer + 1)
        first = ranks.agree(lambda: next((i for i in needed if not spill.has(_inputs(i))), c.n_layer + 1))
        with track("forward", c.n_layer, "layers") as advance:
            advance(max(0, first - 1), before=True)
            if first > c.n_layer:
                return
            if first:
                hidden = torch.empty((*self.tokens.shape, c.d), dtype=self.room.hidden)
                spill.read(_inputs(first - 1), hidden)
            start, turns = max(0, first - 1), turns_of(c.n_expert)
            for step in stream(self.source, self.tokens, hidden=hidden, start=start, room=self.room, turns=turns):
                hidden = None
                if step.layer >= first:
                    spill.put(_inputs(step.layer), step.hidden)
                last = step.compute()
                advance(1)
            spill.put(_inputs(c.n_layer), last)
        ranks.barrier()  # all read what rank 0 has put

    def backward(self, draw: Draw) -> None:
        """Writes the file of every layer, from the last to the first."""
        n_layer, spill = self.source.config.n_layer, self.spill
        n_chunk, t = self.tokens.shape
        back = Backward(self.source, (n_chunk, t), self.rows.n_sample, self.room.another())
        with track("backward", n_layer, "layers") as advance:
            done = ranks.agree(self._done)
            if done is None:
                spill.read(_inputs(n_layer), back.hidden)
                back.head(draw)
                done = n_layer
                spill.put(_gradient(done), back.gradient)
            else:
                spill.read(_gradient(done), back.gradient)
            advance(n_layer - done, before=True)
            layers = range(done - 1, -1, -1)
            load = partial(self.source.layer, turns=turns_of(self.source.config.n_expert))
            for layer, weights in zip(layers, read_ahead(load, layers), strict=True):
                spill.read(_inputs(layer), back.hidden)
                self._layer(layer, with_mla(weights), back)
                if layer:
                    spill.put(_gradient(layer), back.gradient)
                    spill.drop(_gradient(layer + 1))
                advance(1)

    def _done(self) -> int | None:
        """The layer whose input gradient is known, and with it the files from there on; None if one is not whole: all
        of them come from the first gradient, which is not kept."""
        n_layer, spill = self.source.config.n_layer, self.spill
        done = next((layer for layer in range(n_layer + 1) if spill.has(_gradient(layer))), None)
        if done is None or all(
            gradients.job_in(gradients.path_of(self.folder, layer)) == spill.job for layer in range(done, n_layer)
        ):
            return done
        for layer in range(n_layer + 1):
            spill.drop(_gradient(layer))
        return None

    def _layer(self, layer: int, weights: LayerWeights, back: Backward) -> None:
        shapes = self.rows.shapes(self.source.config, layer)
        about = {"job": self.spill.job, "chunk": str(self.tokens.shape[1]), "samples": str(self.rows.n_sample)}
        with sealed.writing(gradients.path_of(self.folder, layer), shapes, about) as file:
            recorder = Recorder(file, self.rows, outputs(self.source.config, layer))
            recorder.stream(gradients.after(weights.router is not None), back.gradient)
            back.layer(weights, recorder)
            if layer == 0:
                recorder.stream(gradients.BEFORE, back.gradient)
                recorder.text(self.tokens)
            if not back.gradient.isfinite().all():
                raise QuantkitError(f"layer {layer}: its gradient is not finite")
            recorder.finish()


class Recorder:
    """The `backward.Receiver` that writes a layer's file: rows of this rank's experts as they come; on rank 0 all else,
    H_O in the end."""

    def __init__(self, file: sealed.Writer, rows: Rows, roles: Mapping[str, int]):
        self.file, self.rows, self.roles = file, rows, roles if ranks.index() == 0 else {}
        self.attended = (0, 0)  # sample and first token of the rows that come next: of a tile all samples
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: list[int] = []
        self.next: list[int] = []  # row of each expert that comes next

    def stream(self, name: str, gradient: torch.Tensor) -> None:
        """Of the residual stream there, [n_sample, n_tokens, d]."""
        for s, rows in enumerate(gradient if ranks.index() == 0 else ()):
            self.file.write(name, rows, s * self.rows.n_tokens)

    def text(self, tokens: torch.Tensor) -> None:
        """What the pass went over, int64 [n_chunk, t]."""
        if ranks.index() == 0:
            self.file.write(gradients.TOKENS, tokens.flatten())

    def matrix(self, role: str, x: torch.Tensor, gradient: torch.Tensor) -> None:
        """Adds to H_O, in float32."""
        g, n = gradient.float(), self.roles[role]
        if role == "attn_output":  # what it puts out is added to the stream
            sample, first = self.attended
            self.file.write(gradients.MIDDLE, g, sample * self.rows.n_tokens + first)
            last = sample + 1 == self.rows.n_sample
            self.attended = (0, first + len(g)) if last else (sample + 1, first)
        if role not in self.sums:
            self.sums[role] = torch.zeros(n, n, device=g.device)
        self.sums[role].addmm_((g * _mean_square(x)[:, None]).T, g)

    def routed(self, counts: Sequence[int]) -> None:
        """Where rows of each expert go: those of all samples follow from its tokens."""
        self.counts = [self.rows.n_sample * count for count in counts]
        self.next = [0, *accumulate(self.counts)][:-1]

    def expert(self, found: ExpertGradients) -> None:
        """Rows of all samples, one after the other."""
        n_sample, m, _ = found.inner.shape
        here = self.next[found.expert]
        inner = found.inner * _mean_square(found.x).sqrt()[:, None]
        index = torch.arange(n_sample, device=found.tokens.device)[:, None] * self.rows.n_tokens + found.tokens
        scale = (_mean_square(found.hidden).sqrt() * found.weight).repeat(n_sample)
        self.file.write(f"rows.{gradients.INNER}", inner.flatten(0, 1), here)
        self.file.write(f"index.{gradients.DOWN}", index.flatten(), here)
        self.file.write(f"scale.{gradients.DOWN}", scale, here)
        self.next[found.expert] += n_sample * m

    def finish(self) -> None:
        """What is left."""
        if self.counts and ranks.index() == 0:
            for key in (gradients.INNER, gradients.DOWN):
                self.file.write(f"counts.{key}", torch.tensor(self.counts))
        for role in self.roles:
            self.file.write(f"outputs.{role}", self.sums[role])


def _mean_square(x: torch.Tensor) -> torch.Tensor:
    return x.float().square().mean(-1)


def _inputs(layer: int) -> str:
    return f"inputs-{layer:03}"


def _gradient(layer: int) -> str:
    return f"gradient-{layer:03}"
