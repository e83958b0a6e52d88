"""The same model in other coordinates: a float32 copy of a checkpoint that computes what the original does.

    python scripts/research/equivalent.py MODEL COPY --text calib.txt --move fold --move hadamard
    quantkit make COPY --recipe 1.58bit ...                                # judged against MODEL by judge.py

Moves are applied in turn. Of the residual stream (x' = x Q: the embedding and all that write it turn, all that read
it turn back; norms must be folded first unless Q is a permutation):

    fold            norms' weights into the matrices that read them (the last one's into the output matrix)
    signs           random signs; with `hadamard` after them QuaRot's randomised Hadamard (arXiv 2404.00456)
    hadamard[=n]    blocks of n on the diagonal (a power of 2 that divides the width; default: the largest)
    pca[=-1]        eigenvectors of the pooled second moments of normed streams, ascending (-1: descending)
    gmd             all Cholesky pivots of these moments alike (geometric mean decomposition, Jiang, Hager and Li 2005)
    fit[=steps]     by gradient (default 100 steps), so that the sum over blocks of 32 of the mean square of routed gate
                    and up times the pivots is least, in the geometric mean over layers
    sort[=-1]       hidden dimensions by their mean square

of one layer (no rotation):

    norm=p          s = (mean square of the normed input)^p from ffn_norm into its readers' columns (AWQ, arXiv
                    2306.00978)
    inner=p         s = (mean square of a routed expert's activations)^p from up's rows into down's columns
    pivots=p        as inner, s = (pivot of damped H / mean square of down's column)^p, by which p = 1/4 makes the sum
                    of blocks' weights x pivots least
    channels[=-1]   a routed expert's channels by the mean square of its activations

The layer for multi-token prediction is left out (its own last norm cannot be folded: the output matrix is shared).
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from starve import CHUNK, chunks, divergence

from quantkit.encoding.hessian import Hessian, damp, damping, second_moment
from quantkit.encoding.moments import Moments
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.open import open_weights
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import stream
from quantkit.runtime.watch import ExpertVisit, Watcher

ARCHITECTURE = "DeepseekV3ForCausalLM"
READERS = {  # of a norm; of the routed experts too
    "input_layernorm": ("self_attn.q_a_proj", "self_attn.q_proj", "self_attn.kv_a_proj_with_mqa"),
    "post_attention_layernorm": ("mlp.gate", "gate_proj", "up_proj"),
}
WRITERS = ("self_attn.o_proj", "down_proj")
NOT_COPIED = ("quantization_config", "num_nextn_predict_layers")
SEED, EXACT = 0, 1e-6
BLOCK, RATE = 32, 0.004  # weights under one scale; of `fit`

Weights = dict[str, torch.Tensor]
Turn = torch.Tensor
"""Orthogonal float64 [d, d]: x' = x Q."""


class Seen(Watcher):
    """Moments of what a layer's norms put out (`attn`, `ffn`), and of what its routed experts' down multiplies."""

    def __init__(self) -> None:
        self.moments: dict[str, Moments] = {}
        self.experts: dict[int, Hessian] = {}
        self.weights: list[torch.Tensor] = []

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        if role == "ffn_gate_inp":
            self.weights.append(weight)
        if name := {"attn_kv_a_mqa": "attn", "ffn_gate_inp": "ffn", "ffn_gate": "ffn"}.get(role):
            self.moments.setdefault(name, Moments()).add(x, weight)

    def observe_expert(self, visit: ExpertVisit) -> None:
        weight = torch.cat(self.weights)[visit.tokens] * visit.weight.float().square()
        self.experts[visit.expert] = second_moment(visit.hidden, weight)


class Model:
    """A checkpoint's weights in float64 under its own names, all in memory, and what was seen of its layers."""

    def __init__(self, checkpoint: Checkpoint, text: Path | None, n_chunks: int) -> None:
        self.source = CheckpointSource(checkpoint, "cpu", torch.float32)
        self.config = self.source.config
        n_layer = self.config.n_layer
        kept = [name for name in checkpoint.tensors if not name.endswith("_scale_inv") and _layer(name, n_layer)]
        self.weights: Weights = {name: checkpoint.read(name).double() for name in kept}
        self.text, self.n_chunks = text, n_chunks
        self._seen: list[Seen] = []
        self.q: Turn = torch.eye(self.config.d, dtype=torch.float64)

    def seen(self) -> list[Seen]:
        """Of every layer, of the original: moments of today's coordinates are asked for by `stream_moments`."""
        if self.text is None:
            raise click.UsageError("this move needs --text")
        if not self._seen:
            for step in stream(self.source, chunks(self.source, self.text, self.n_chunks)):
                self._seen.append(Seen())
                step.compute(self._seen[-1])
        return self._seen

    def norm(self, layer: int, which: str) -> torch.Tensor:
        """Weight of a layer's norm (`attn`, `ffn`) now."""
        name = {"attn": "input_layernorm", "ffn": "post_attention_layernorm"}[which]
        return self.weights[f"model.layers.{layer}.{name}.weight"]

    def stream_moments(self, which: tuple[str, ...] = ("attn", "ffn")) -> torch.Tensor:
        """Pooled moments of the normed streams of all layers, norms' weights taken out, float64 [d, d], as Q has it."""
        originals = CheckpointSource(self.source.checkpoint, "cpu")
        total = torch.zeros_like(self.q)
        for layer, seen in enumerate(self.seen()):
            of = originals.layer(layer)
            norms = {"attn": of.attn_norm, "ffn": of.ffn_norm}
            for name in which:
                h = seen.moments[name].hessians()[0].matrix / norms[name][:, None] / norms[name]
                total += h.double() / h.diagonal().mean()
        return self.q.T @ total @ self.q / len(which) / self.config.n_layer

    def matching(self, layer: int, ends: tuple[str, ...]) -> Iterator[str]:
        """Matrices of a layer whose names end so."""
        prefix, suffixes = f"model.layers.{layer}.", tuple(f"{end}.weight" for end in ends)
        return (name for name in self.weights if name.startswith(prefix) and name.endswith(suffixes))

    def readers(self) -> Iterator[tuple[str, list[str]]]:
        """Every norm of the residual stream with the matrices that read it."""
        for layer in range(self.config.n_layer):
            for norm, ends in READERS.items():
                yield f"model.layers.{layer}.{norm}.weight", list(self.matching(layer, ends))
        yield "model.norm.weight", ["lm_head.weight"]


def _layer(name: str, n_layer: int) -> bool:
    """Whether a tensor lies outside of the layers, or in one of the first so many."""
    parts = name.split(".")
    return parts[1] != "layers" or int(parts[2]) < n_layer


def scale_norm(model: Model, norm: str, readers: list[str], s: torch.Tensor) -> None:
    """Take s [d] out of a norm's weight and into the columns of what reads it."""
    model.weights[norm] = model.weights[norm] / s
    for name in readers:
        model.weights[name] = model.weights[name] * s


def turn(model: Model, q: Turn) -> None:
    """Turn the stream; norms that are not all ones go along with a permutation only."""
    permutation = bool(((q.abs() == 1).sum(0) == 1).all())
    for norm, readers in model.readers():
        weight = model.weights[norm]
        if permutation:
            model.weights[norm] = weight @ q.abs()
        elif not bool((weight == 1).all()):
            raise click.UsageError("fold first: a norm whose weights differ does not turn")
        for name in readers:
            model.weights[name] = model.weights[name] @ q
    for layer in range(model.config.n_layer):
        for name in model.matching(layer, WRITERS):
            model.weights[name] = q.T @ model.weights[name]
    model.weights["model.embed_tokens.weight"] = model.weights["model.embed_tokens.weight"] @ q
    model.q = model.q @ q


def fold(model: Model, _: float | None) -> None:
    for norm, readers in model.readers():
        scale_norm(model, norm, readers, model.weights[norm])


def signs(model: Model, _: float | None) -> None:
    random = torch.randint(0, 2, (model.config.d,), generator=torch.Generator().manual_seed(SEED))
    turn(model, torch.diag(2.0 * random.double() - 1))


def hadamard(model: Model, size: float | None) -> None:
    d = model.config.d
    n = int(size) if size else d & -d
    block = torch.ones(1, 1, dtype=torch.float64)
    while len(block) < n:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    if len(block) != n or d % n:
        raise click.UsageError(f"{n} is no power of 2 that divides the width {d}")
    turn(model, torch.block_diag(*[block / math.sqrt(n)] * (d // n)))


def pca(model: Model, order: float | None) -> None:
    _, vectors = torch.linalg.eigh(model.stream_moments())
    turn(model, vectors.flip(1) if order else vectors)


def gmd(model: Model, _: float | None) -> None:
    """Of damped moments, as experts with some 20 tokens a dimension have them."""
    h = damp(model.stream_moments(("ffn",)).float(), 20 * model.config.d).double()
    turn(model, equal_pivots(h))


def equal_pivots(h: torch.Tensor) -> Turn:
    """Q such that all pivots of the Cholesky factor of Qᵀ H Q are the geometric mean of H's eigenvalues."""
    values, q = torch.linalg.eigh(h)
    values, q = values.flip(0), q.flip(1)
    n, root = len(h), torch.diag(values.sqrt())
    mean = float(values.sqrt().log().mean().exp())
    for k in range(n - 1):
        rest = root.diagonal()[k + 1 :]
        j = k + 1 + int(rest.argmin() if root[k, k] >= mean else rest.argmax())
        swap = torch.arange(n)
        swap[k + 1], swap[j] = j, k + 1
        root, q = root[swap][:, swap], q[:, swap]
        a, b = float(root[k, k]), float(root[k + 1, k + 1])
        if math.isclose(a, b, rel_tol=1e-12):
            continue
        c = math.sqrt(min(max((mean**2 - b**2) / (a**2 - b**2), 0), 1))
        s = math.sqrt(1 - c * c)
        right = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
        left = torch.tensor([[c * a, s * b], [-s * b, c * a]], dtype=torch.float64) / mean
        root[:, k : k + 2] = root[:, k : k + 2] @ right
        q[:, k : k + 2] = q[:, k : k + 2] @ right
        root[k : k + 2] = left @ root[k : k + 2]
    return q.flip(1)  # feedback's factor is that of the reversed matrix


def fit(model: Model, steps: float | None) -> None:
    """A turn is multiplied by Cayley transforms of the gradient (Wen and Yin 2013), with Adam's step size."""
    of_layers = [(layer, seen) for layer, seen in enumerate(model.seen()) if seen.experts]
    originals = CheckpointSource(model.source.checkpoint, "cpu")
    h = torch.stack([_plain(seen, originals.layer(layer).ffn_norm) for layer, seen in of_layers])
    c = torch.zeros_like(h)
    for power, (layer, _) in zip(c, of_layers, strict=True):
        for name in model.matching(layer, ("gate_proj", "up_proj")):
            if ".experts." in name:
                power += model.weights[name].T @ model.weights[name]
    with torch.inference_mode(False):
        turn(model, _least(model.q.T @ h.clone() @ model.q, c.clone(), int(steps or 100)))


def _plain(seen: Seen, norm: torch.Tensor) -> torch.Tensor:
    """Moments of a layer's normed stream without its norm's weight, mean diagonal 1, damped as 12 tokens a dimension
    would be; float64 [d, d]."""
    h = seen.moments["ffn"].hessians()[0].matrix.double() / norm[:, None] / norm
    h = h / h.diagonal().mean()
    return h + torch.eye(len(h)) * damping(len(h), 12 * len(h))


def _loss(h: torch.Tensor, c: torch.Tensor, q: Turn) -> torch.Tensor:
    """float64 [layers]: what feedback would lose, for moments of inputs h and of weights c, [layers, d, d]."""
    h = q.T @ h @ q
    h = h + torch.diag_embed(0.1 * h.diagonal(dim1=-2, dim2=-1))
    pivot = torch.linalg.cholesky(h.flip(-1, -2)).diagonal(dim1=-2, dim2=-1).flip(-1).square()
    power = (q.T @ c @ q).diagonal(dim1=-2, dim2=-1)
    blocks = (len(h), -1, BLOCK)
    return (power.reshape(blocks).mean(-1) * pivot.reshape(blocks).sum(-1)).sum(-1)


def _least(h: torch.Tensor, c: torch.Tensor, steps: int) -> Turn:
    """The turn of least `_loss`, from none on."""
    eye = torch.eye(h.shape[-1], dtype=torch.float64)
    q, momentum, square = eye.clone(), torch.zeros_like(eye), 0.0
    first = _loss(h, c, q)
    for step in range(1, steps + 1):
        skew = torch.zeros_like(eye, requires_grad=True)
        loss = (_loss(h, c, q @ (eye + skew - skew.T)) / first).log().mean()
        (gradient,) = torch.autograd.grad(loss, skew)
        momentum = 0.9 * momentum + 0.1 * gradient
        square = 0.98 * square + 0.02 * float(gradient.square().mean())
        move = momentum / (1 - 0.9**step) / (square / (1 - 0.98**step)) ** 0.5
        move = -RATE * (1 - (step - 1) / steps) / 4 * (move - move.T)
        q = q @ torch.linalg.solve(eye - move, eye + move)
    print(f"fit: {float((_loss(h, c, q) / first).log().mean().exp()):.3f} of the sum before, after {steps} steps")
    return q


def sort(model: Model, order: float | None) -> None:
    by = model.stream_moments(("ffn",)).diagonal().argsort(descending=bool(order), stable=True)
    turn(model, torch.eye(model.config.d, dtype=torch.float64)[:, by])


def norm_scales(model: Model, power: float | None) -> None:
    if not torch.equal(model.q, torch.eye(model.config.d, dtype=torch.float64)):
        raise click.UsageError("norm comes before all that turns the stream")
    for layer, seen in enumerate(model.seen()):
        of = seen.moments["ffn"].hessians()[0].diagonal
        norm = f"model.layers.{layer}.post_attention_layernorm.weight"
        s = (of / of.mean()).double() ** (power or 0.25)
        scale_norm(model, norm, list(model.matching(layer, READERS["post_attention_layernorm"])), s)


def inner(model: Model, power: float | None) -> None:
    _inner(model, lambda h, down: h.diagonal.double() ** (power or 0.25))


def pivots(model: Model, power: float | None) -> None:
    def by(h: Hessian, down: torch.Tensor) -> torch.Tensor:
        damped = damp(h.matrix, h.tokens).double().flip(0, 1)
        pivot = torch.linalg.cholesky(damped).flip(0, 1).diagonal().square()
        return (pivot / down.square().mean(0)) ** (power or 0.25)

    _inner(model, by)


def channels(model: Model, order: float | None) -> None:
    for layer, seen in enumerate(model.seen()):
        for expert, h in seen.experts.items():
            if h.diagonal is not None:
                by = h.diagonal.argsort(descending=bool(order), stable=True)
                of = f"model.layers.{layer}.mlp.experts.{expert}."
                for name in (f"{of}gate_proj.weight", f"{of}up_proj.weight"):
                    model.weights[name] = model.weights[name][by]
                model.weights[f"{of}down_proj.weight"] = model.weights[f"{of}down_proj.weight"][:, by]


def _inner(model: Model, scales: Callable[[Hessian, torch.Tensor], torch.Tensor]) -> None:
    for layer, seen in enumerate(model.seen()):
        for expert, h in seen.experts.items():
            if h.matrix is None:
                continue
            up, down = (f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight" for part in ("up", "down"))
            s = scales(h, model.weights[down])
            s = s / s.log().mean().exp()
            model.weights[up] = model.weights[up] / s[:, None]
            model.weights[down] = model.weights[down] * s


MOVES: dict[str, Callable[[Model, float | None], None]] = {
    "fold": fold,
    "signs": signs,
    "hadamard": hadamard,
    "pca": pca,
    "gmd": gmd,
    "fit": fit,
    "sort": sort,
    "norm": norm_scales,
    "inner": inner,
    "pivots": pivots,
    "channels": channels,
}


def save(model: Model, folder: Path) -> None:
    """As float32 shards, one a layer, beside config and tokenizer of the original."""
    original = Path(model.source.checkpoint.path)
    folder.mkdir(parents=True)
    for file in original.glob("*.json"):
        if not file.name.endswith(".index.json"):
            shutil.copy(file, folder)
    config = json.loads((original / "config.json").read_text())
    config = {key: value for key, value in config.items() if key not in NOT_COPIED}
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}, indent=1))
    of_shard: dict[str, Weights] = {}
    for name, value in model.weights.items():
        parts = name.split(".")
        shard = f"model-{parts[2] if parts[1] == 'layers' else 'ends'}.safetensors"
        of_shard.setdefault(shard, {})[name] = value.float().contiguous()
    for shard, weights in of_shard.items():
        save_file(weights, folder / shard)
    index = {"weight_map": {name: shard for shard, weights in of_shard.items() for name in weights}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@click.command()
@click.argument("name")
@click.argument("copy", type=click.Path(path_type=Path))
@click.option("--move", "moves", multiple=True, metavar="NAME[=NUMBER]", required=True)
@click.option("--text", type=click.Path(exists=True, path_type=Path), help="Of moments.")
@click.option("--chunks", "n_chunks", default=64, show_default=True, help="Of 512 tokens, for moments.")
@torch.inference_mode()
def main(name: str, copy: Path, moves: tuple[str, ...], text: Path | None, n_chunks: int) -> None:
    """Write the copy, and the KLD of its logits from the original's."""
    checkpoint = open_weights(name)
    if checkpoint.config.get("architectures") != [ARCHITECTURE] or checkpoint.config.get("tie_word_embeddings"):
        raise click.UsageError(f"{name}: only {ARCHITECTURE} with an output matrix of its own")
    model = Model(checkpoint, text, n_chunks)
    for move in moves:
        what, _, number = move.partition("=")
        if what not in MOVES:
            raise click.UsageError(f"--move {move}: one of {', '.join(MOVES)}")
        MOVES[what](model, float(number) if number else None)
    save(model, copy)
    tokens = torch.randint(0, model.config.n_vocab, (1, CHUNK), generator=torch.Generator().manual_seed(SEED))
    if text is not None:
        tokens = chunks(model.source, text, 2)
    kld = divergence(model.source, CheckpointSource(open_weights(str(copy)), "cpu", torch.float32), tokens)
    print(f"{copy}: {', '.join(moves)}; KLD from the original {kld:.2g} in float32, {tokens.numel() // 2} tokens")
    if not abs(kld) < EXACT:
        sys.exit(f"{copy}: not the same model")


if __name__ == "__main__":
    main()
