"""`quantkit verify`: is the file sound, and how far is it from the original? One read of both, layer by layer."""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import prod
from pathlib import Path
from typing import Any

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.calibration.measure import memory_limit
from quantkit.errors import QuantkitError
from quantkit.evaluation import generation
from quantkit.evaluation.divergence import (
    Divergence,
    HeadLogits,
    HeldLogits,
    Score,
    diverge,
    first_scored,
    scored,
    scored_targets,
)
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.planning import targets
from quantkit.planning.plan import mla_of, split_name
from quantkit.progress import track
from quantkit.runtime.generate import Engine, Opener
from quantkit.runtime.sources.gguf import GGUFSource
from quantkit.runtime.stream import Source, choose_room, final_hidden, memory, stream

PROBE_TOKENS = 4096  # tokens over which each layer's own error is measured
OUTLIER, OUTLIER_LEAST = 2.5, 0.05  # a layer stands out: so many times the median own error, and no less than this
MOST_OWN = 0.95  # an update that is as wrong as none at all
MODE_KLD, MODE_SHARE, MODE_PPL = 0.002, 0.1, 0.02  # agreement of modes: nats, share of the file's KLD, log ratio of PPL


@dataclass(frozen=True)
class FileTensor:
    """A tensor of a finished file in the words of a plan."""

    name: str
    role: str
    shape: tuple[int, ...]
    qtype: str


def sizes(file: GGUFFile) -> dict[str, Any]:
    """bytes of the file(s), bpw of all weights and of the routed experts (tensor data bits per weight)."""

    def bpw(tensors) -> float:
        tensors = list(tensors)
        weights = sum(prod(tensor.shape) for tensor in tensors)
        return 8 * sum(tensor.n_bytes for tensor in tensors) / weights if weights else 0.0

    values = file.tensors.values()
    return {
        "bytes": sum(path.stat().st_size for path in file.files),
        "bpw": bpw(values),
        "bpw_routed": bpw(tensor for tensor in values if "_exps." in tensor.name),
    }


def check_same_model(source: Source, reference: Source) -> None:
    """Both must be the same architecture in every number that decides what a layer computes."""
    ours, theirs = vars(source.config), vars(reference.config)
    for key in ("has_bias", "tied", "bos", "eos"):  # a tied head is written once; GGUF derives the others elsewhere
        ours, theirs = ({k: v for k, v in d.items() if k != key} for d in (ours, theirs))
    for key, value in theirs.items():
        close = isinstance(value, float) and abs(ours[key] - value) <= 1e-6 * abs(value)
        if ours[key] != value and not close and key != "yarn":
            raise QuantkitError(f"{source.name}: {key} is {ours[key]}, but {reference.name} has {value}")


@dataclass(frozen=True)
class LayerError:
    """How far one layer is from the original's.

    error: of the hidden state after it, what earlier layers did wrong included: root mean square over tokens of
    |h_quantized - h| / |h|. own: what this layer alone does wrong, given the original's hidden states: the same of
    its update, over the probe chunks.
    """

    layer: int
    error: float
    own: float


class SideBySide:
    """Two models through the same tokens int64 [n_chunk, t], layer by layer in step; one read of both.

    The quantized stream carries the first chunks twice: the copies are reset to the original's states before every
    layer, so that each layer's own error is seen without what came before.
    After `run`: hidden states [n_chunk, t, d] of both sides after the last layer, and `errors` of all layers.
    """

    def __init__(self, reference: Source, source: Source, tokens: torch.Tensor, dtype: torch.dtype = torch.float32):
        self.reference, self.source, self.tokens, self.dtype = reference, source, tokens, dtype
        self.n_probe = min(len(tokens), max(1, PROBE_TOKENS // tokens.shape[1]))
        self.errors: list[LayerError] = []

    def run(self, advance: Callable[[float], object]) -> tuple[torch.Tensor, torch.Tensor]:
        n, k = len(self.tokens), self.n_probe
        theirs = self.reference.embed(self.tokens).to(self.reference.device, self.dtype)
        ours = self.source.embed(self.tokens).to(self.source.device, self.dtype)
        ours = torch.cat((ours, theirs[:k].to(ours.device)))
        before = theirs[:k].clone()
        doubled = torch.cat((self.tokens, self.tokens[:k]))
        streams = (
            stream(self.reference, self.tokens, hidden=theirs, hidden_dtype=self.dtype),
            stream(self.source, doubled, hidden=ours, hidden_dtype=self.dtype),
        )
        for layer, other in zip(*streams, strict=True):
            theirs, ours = layer.hidden, other.hidden
            error = relative_error(theirs, ours[:n])
            own = relative_error(theirs[:k] - before, ours[n:].to(before.device) - before)
            if not (math.isfinite(error) and math.isfinite(own)):
                raise QuantkitError(
                    f"{self.source.name}: layer {layer.index} computes numbers that are not finite; "
                    "`quantkit certify` names the tensor"
                )
            self.errors.append(LayerError(layer.index, error, own))
            ours[n:] = theirs[:k]
            before.copy_(theirs[:k])
            advance(2 * self.tokens.numel() / 1e3)
        return theirs, ours[:n]


def relative_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Root mean square over tokens of |other - reference| / |reference|, for [n_chunk, t, d]; BOS is left out, whose
    state is hundreds of times larger than any other."""
    total, n = 0.0, 0
    for a, b in zip(reference, other, strict=True):
        a, b = a[1:].float(), b[1:].to(a.device).float()
        norm = a.square().sum(-1).clamp_min(1e-20)
        total += float(((b - a).square().sum(-1) / norm).double().sum())
        n += len(a)
    return math.sqrt(total / max(1, n))


def bad_layers(errors: Sequence[LayerError]) -> list[int]:
    """Layers whose own error stands out: several times the median layer's, or an update that is mostly wrong."""
    if not errors:
        return []
    middle = statistics.median(layer.own for layer in errors)
    return [layer.layer for layer in errors if layer.own > max(OUTLIER * middle, OUTLIER_LEAST) or layer.own > MOST_OWN]


def verify(
    source: GGUFSource,
    reference: Source,
    chunks: Chunks,
    target: str | None = None,
    *,
    score: Score = "half",
    runtime: Opener | None = None,
    runtime_tokens: int = 0,
    prompts: int = 0,
    ram: int | None = None,
    known: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Structure, types, then perplexity and divergence from the reference over the scored tokens of every chunk.

    score: "half" scores the second half of each chunk, as llama-perplexity does; "all" every token but a chunk's
    first. runtime: opens the file as a person runs it; with it, the first runtime_tokens are also computed token by
    token through the KV cache, and `prompts` texts are continued. ram: bytes that the streams may use, default what the
    machine has. known: the reference's `scored` states, if a pass has computed them already (then no layer is compared,
    and its weights are not read again).
    Returns what verify.json holds: sizes, the figures of Divergence.summary with 95 % intervals, the same by domain,
    errors by layer, and what was compared.
    """
    if target:
        check_target(source.file, target)
    check_same_model(source, reference)
    started = time.perf_counter()
    n_tokens, t = chunks.tokens.numel(), chunks.tokens.shape[1]
    dtype, layers = checked_dtype(reference, n_tokens, ram), []
    n_streams = 2 if known is None else 1
    with track("verify", n_streams * reference.config.n_layer * n_tokens / 1e3, "ktoken-layers") as advance:
        if known is None:
            both = SideBySide(reference, source, chunks.tokens, dtype)
            hidden, layers = [scored(states, score) for states in both.run(advance)], both.errors
        else:
            states = final_hidden(source, chunks.tokens, lambda _: advance(n_tokens / 1e3), dtype)
            hidden = [known, scored(states, score)]
    per_chunk = t - 1 - first_scored(t, score)
    heads = HeadLogits(reference, hidden[0]), HeadLogits(source, hidden[1])
    with track("head", reference.config.n_vocab / 1e3, "ktokens of vocabulary") as advance:
        found = diverge(
            *heads, scored_targets(chunks.targets, score), reference.config.n_vocab, lambda k: advance(k / 1e3)
        )
    about = {
        "file": source.name,
        "reference": reference.name,
        "chunks": len(chunks.tokens),
        "chunk_length": t,
        "score": score,
    }
    result = (
        about
        | sizes(source.file)
        | found.summary(per_chunk)
        | {
            "domains": by_domain(found, chunks.domains, per_chunk),
            "layers": [asdict(layer) for layer in layers],
            "bad_layers": bad_layers(layers),
            "kld_histogram": found.histogram(),
            "seconds": time.perf_counter() - started,
        }
    )
    if runtime is not None and runtime_tokens:
        result["runtime"] = runtime_mode(runtime, heads, chunks, score, runtime_tokens)
    if runtime is not None and prompts:
        result["generation"] = generation.check(runtime, reference, chunks, prompts)
    return result


def by_domain(found: Divergence, domains: Sequence[str], per_chunk: int) -> dict[str, dict[str, Any]]:
    """The figures of each domain's chunks, in the order in which domains appear."""
    out = {}
    for domain in dict.fromkeys(domains):
        mine = torch.tensor([d == domain for d in domains]).repeat_interleave(per_chunk)
        out[domain] = found[mine].summary(per_chunk)
    return out


def checked_dtype(reference: Source, n_tokens: int, ram: int | None) -> torch.dtype:
    """float32 hidden states if both streams fit in memory with them, else bfloat16; refused if they do not fit."""
    limit, option = memory_limit(ram, reference.device)
    for dtype in (torch.float32, torch.bfloat16):
        need = memory(reference.config, reference.dtype, dtype)
        if 2 * need.total(n_tokens) <= limit:
            return dtype
    on_gpu = reference.device.type != "cpu"
    choose_room(need, n_tokens, "device", limit // 2, f"half of {option}", limit, on_gpu)
    return torch.bfloat16


def runtime_mode(
    runtime: Opener, heads: tuple[HeadLogits, HeadLogits], chunks: Chunks, score: Score, n_tokens: int
) -> dict[str, Any]:
    """The file as a person runs it: what is not scored as a prompt, then token by token through the KV cache, routed
    experts multiplied from their quantized bytes. heads: of the original's and the streamed file's scored states.

    `original`, `streamed`: divergence of this mode from the original, and of the streamed mode on the same tokens;
    `agreement`: of this mode from the streamed one. What remains there is the rounding of activations to 8 bits.
    """
    t = chunks.tokens.shape[1]
    engine = runtime(t)
    prompt, n_chunk = first_scored(t, score), min(len(chunks.tokens), max(1, n_tokens // t))
    parts: dict[str, list[Divergence]] = {"original": [], "streamed": [], "agreement": []}
    with track("runtime", n_chunk * (t - 1), "tokens") as advance:
        for i in range(n_chunk):
            logits = HeldLogits(stepped(engine, chunks.tokens[i].tolist(), prompt, advance))
            rows = slice(i * logits.n, (i + 1) * logits.n)
            theirs, ours = (HeadLogits(head.source, head.hidden[rows]) for head in heads)
            targets = scored_targets(chunks.targets[i : i + 1], score)
            for key, (p, q) in {
                "original": (theirs, logits),
                "streamed": (theirs, ours),
                "agreement": (ours, logits),
            }.items():
                parts[key].append(diverge(p, q, targets, engine.config.n_vocab))
    figures = {key: join(values).summary(t - 1 - prompt) for key, values in parts.items()}
    return {"agree": modes_agree(figures)} | figures


def stepped(engine: Engine, tokens: list[int], prompt: int, advance: Callable[[float], object]) -> torch.Tensor:
    """float32 [t - 1 - prompt, n_vocab] of one chunk: prompt tokens together, the others one by one."""
    for at in range(0, prompt, engine.piece):
        engine.prefill(0, tokens[at : min(at + engine.piece, prompt)], at)
    advance(prompt)
    rows = []
    for i in range(prompt, len(tokens) - 1):
        row = engine.decode([0], [tokens[i]])[0] if i else engine.prefill(0, [tokens[0]], 0)
        rows.append(row.cpu().clone())
        advance(1)
    return torch.stack(rows)


def join(parts: Sequence[Divergence]) -> Divergence:
    return Divergence(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Divergence)))


def modes_agree(figures: Mapping[str, Mapping[str, Any]]) -> bool:
    """Within what 8-bit activations explain: a small share of the file's own divergence from the original."""
    streamed, between = figures["streamed"]["kld_mean"], figures["agreement"]["kld_mean"]
    ratio = figures["original"]["ppl"] / figures["streamed"]["ppl"]
    return between <= max(MODE_KLD, MODE_SHARE * streamed) and abs(math.log(ratio)) <= MODE_PPL


def check_target(file: GGUFFile, target: str) -> None:
    """Refuse types and layouts that the target cannot compute."""
    found = [FileTensor(t.name, split_name(t.name)[0], t.shape, t.qtype) for t in file.tensors.values()]
    targets.check_mla(mla_of([tensor.role for tensor in found]), target)
    targets.check(found, target)


def layer_line(result: Mapping[str, Any]) -> str:
    """One line about the layers: how the error grows, and which layer stands out."""
    layers = result["layers"]
    middle = statistics.median(layer["own"] for layer in layers)
    bad = [layer for layer in layers if layer["layer"] in result["bad_layers"]]
    named = "; ".join(f"layer {layer['layer']} stands out with {layer['own']:.3f}" for layer in bad)
    return f"error {layers[-1]['error']:.3f} after the last, own {middle:.3f} (median); {named or 'none stands out'}"


def short_table(result: Mapping[str, Any], path: Path) -> str:
    """The lines that `make` and `verify` end with."""
    rows = [
        ("file", f"{path}"),
        ("size", f"{result['bytes']:,} bytes"),
        ("bpw", f"{result['bpw']:.3f} (routed experts {result['bpw_routed']:.3f})"),
        ("perplexity", f"{result['ppl']:.4f} (original {result['ppl_reference']:.4f})"),
        (
            "KLD",
            f"mean {result['kld_mean']:.5f} ± {result['kld_mean_error']:.5f}, median {result['kld_median']:.5f}, "
            f"99 % {result['kld_p99']:.4f}",
        ),
        ("same top-1", f"{result['top1_agreement']:.2f} %"),
        ("tokens", f"{result['tokens']:,} scored"),
    ]
    if len(domains := result["domains"]) > 1:
        rows.append(("by domain", ", ".join(f"{name} {d['kld_mean']:.3f}" for name, d in domains.items())))
    if result["layers"]:
        rows.append(("layers", layer_line(result)))
    if mode := result.get("runtime"):
        klds = [mode[key]["kld_mean"] for key in ("original", "agreement")]
        how = "agreeing with" if mode["agree"] else "DISAGREEING with"
        rows.append(("runtime", f"KLD {klds[0]:.5f} token by token, {how} the streamed mode ({klds[1]:.5f})"))
    if written := result.get("generation"):
        rows.append(("generation", written["summary"]))
    return "\n".join(f"{key:<12}{value}" for key, value in rows)
