"""`quantkit verify`: is the file sound, and how far is it from the original? One read of both, layer by layer."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import Any

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.errors import QuantkitError
from quantkit.evaluation.divergence import Divergence, HeadLogits, Score, diverge, first_scored, scored, scored_targets
from quantkit.evaluation.side_by_side import LayerError, NotFinite, SideBySide, bad_layers, room_of
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models.config import mla_of
from quantkit.planning import targets
from quantkit.progress import Advance, say_once, track
from quantkit.runtime.memory import choose_place, memory, memory_limit
from quantkit.runtime.sources.gguf import GGUFSource
from quantkit.runtime.stream import Source, final_hidden


def check_same_model(source: Source, reference: Source) -> None:
    """Both must be the same architecture in every number that decides what a layer computes.

    But for groups of experts, of which a line says that they are not there (`ungrouped`).
    """
    ours, theirs = vars(source.config), vars(reference.config)
    if why := ungrouped(source, reference):
        say_once(f"warning: {source.name}: {why}")
        theirs = theirs | {"n_group": 1, "n_group_used": 1}
    for key in (
        "has_bias",
        "tied",
        "bos",
        "eos",
        "more_ends",
        "n_mtp",  # no part of what is compared
    ):  # a tied head is written once; GGUF derives the others elsewhere
        ours, theirs = ({k: v for k, v in d.items() if k != key} for d in (ours, theirs))
    for key, value in theirs.items():
        if not _alike(ours[key], value) and key != "yarn":
            raise QuantkitError(f"{source.name}: {key} is {ours[key]}, but {reference.name} has {value}")


def ungrouped(source: Source, reference: Source) -> str | None:
    """What is to be said of a file without groups of experts whose original has them: older converters did not write
    them, and llama.cpp chooses from all experts then; so does what computes the file here. None of any other."""
    ours, theirs = source.config, reference.config
    if (ours.n_group, ours.n_group_used) != (1, 1) or theirs.n_group == 1:
        return None
    return (
        f"does not say that experts are chosen from {theirs.n_group_used} of {theirs.n_group} groups, like files of "
        "older converters: computed as llama.cpp does, from all of them"
    )


def _alike(ours: Any, theirs: Any) -> bool:
    """The same number, as a file's float32 holds it; of a table of numbers, each."""
    if is_dataclass(theirs) and type(ours) is type(theirs):
        return all(_alike(getattr(ours, field.name), getattr(theirs, field.name)) for field in fields(theirs))
    close = isinstance(theirs, float) and isinstance(ours, float) and abs(ours - theirs) <= 1e-6 * abs(theirs)
    return close or ours == theirs


@dataclass(frozen=True)
class Verification:
    """What one read of a file and its original found.

    figures: what verify.json holds: sizes, the figures of Divergence.summary with 95 % intervals, the same by domain,
    errors by layer, and what was compared. heads: logits of the original and of the file at the scored tokens, for a
    comparison with other ways of computing them (`runtime_mode`). found: token by token, for one with other files.
    """

    figures: dict[str, Any]
    heads: tuple[HeadLogits, HeadLogits]
    found: Divergence


def verify(
    source: GGUFSource,
    reference: Source,
    chunks: Chunks,
    target: str | None = None,
    *,
    score: Score = "half",
    ram: int | None = None,
    known: torch.Tensor | None = None,
) -> Verification:
    """Structure, types, then perplexity and divergence from the reference over the scored tokens of every chunk.

    target: refuse what it cannot compute. score: "half" scores the second half of each chunk, as llama-perplexity does;
    "all" every token but a chunk's first. ram: bytes that the streams may use, default what the machine has. known: the
    reference's `scored` states, if a pass has computed them already (then no layer is compared, and its weights are not
    read again). QuantkitError if the two are not one model, if memory is short, or if a layer breaks down.
    """
    if target:
        check_target(source.file, target)
    check_same_model(source, reference)
    started, t = time.perf_counter(), chunks.tokens.shape[1]
    theirs, ours, layers = _scored_states(source, reference, chunks, score, ram, known)
    heads = HeadLogits(reference, theirs), HeadLogits(source, ours)
    found = _met(*heads, chunks, score)
    _check_finite(found, reference, source)
    about = {
        "file": source.name,
        "reference": reference.name,
        "chunks": len(chunks.tokens),
        "chunk_length": t,
        "score": score,
    }
    more = {
        "layers": [asdict(layer) for layer in layers],
        "bad_layers": bad_layers(layers),
        "seconds": time.perf_counter() - started,
    }
    return Verification(about | source.file.sizes() | scores(found, chunks, score) | more, heads, found)


def scores(found: Divergence, chunks: Chunks, score: Score = "half") -> dict[str, Any]:
    """The figures of `Divergence.summary` with intervals over chunks, the same by domain, and the histogram."""
    per_chunk = scored_of_chunk(chunks, score)
    domains = by_domain(found, chunks.domains, per_chunk)
    return found.summary(per_chunk) | {"domains": domains, "kld_histogram": found.histogram()}


def scored_of_chunk(chunks: Chunks, score: Score = "half") -> int:
    """Tokens of a chunk that are scored."""
    t = chunks.tokens.shape[1]
    return t - 1 - first_scored(t, score)


def likelihood(source: Source, chunks: Chunks, score: Score = "half", ram: int | None = None) -> Divergence:
    """A model by itself: negative log-likelihoods of the scored tokens of every chunk; its divergence is none."""
    n_tokens = chunks.tokens.numel()
    dtype = checked_dtype(source, n_tokens, ram)
    with track("likelihood", source.config.n_layer * n_tokens / 1e3, "ktoken-layers") as advance:
        head = HeadLogits(source, _alone(source, chunks, score, dtype, advance))
    found = _met(head, head, chunks, score)
    _check_finite(found, source, source)
    return found


def _alone(source: Source, chunks: Chunks, score: Score, dtype: torch.dtype, advance: Advance) -> torch.Tensor:
    """`scored` states of a model that goes through the layers by itself. NotFinite if they are no numbers."""
    n_tokens = chunks.tokens.numel()
    states = final_hidden(source, chunks.tokens, lambda _: advance(n_tokens / 1e3), room_of(source, dtype))
    if not bool(states.isfinite().all()):
        raise NotFinite(source.name, "a layer")
    return scored(states, score)


def _met(reference: HeadLogits, model: HeadLogits, chunks: Chunks, score: Score) -> Divergence:
    n_vocab = model.source.config.n_vocab
    with track("head", n_vocab / 1e3, "ktokens of vocabulary") as advance:
        return diverge(reference, model, scored_targets(chunks.targets, score), n_vocab, lambda k: advance(k / 1e3))


def _check_finite(found: Divergence, reference: Source, source: Source) -> None:
    """NotFinite of the side whose logits are no numbers: its states are some."""
    for side, values in ((reference, [found.nll_reference]), (source, [found.nll, found.kld])):
        if not all(bool(value.isfinite().all()) for value in values):
            raise NotFinite(side.name, "the output matrix")


def _scored_states(
    source: GGUFSource, reference: Source, chunks: Chunks, score: Score, ram: int | None, known: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, list[LayerError]]:
    """`scored` states of the reference and of the file, and the errors of its layers (none if `known`)."""
    n_tokens, n_streams = chunks.tokens.numel(), 2 if known is None else 1
    dtype = checked_dtype(reference, n_tokens, ram)
    with track("verify", n_streams * reference.config.n_layer * n_tokens / 1e3, "ktoken-layers") as advance:
        if known is not None:
            return known, _alone(source, chunks, score, dtype, advance), []
        both = SideBySide(reference, source, chunks.tokens, dtype)
        theirs, ours = both.run(advance)
        return scored(theirs, score), scored(ours, score), both.errors


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
    choose_place(need, n_tokens, "device", limit // 2, f"half of {option}", limit, on_gpu)
    return torch.bfloat16


def check_target(file: GGUFFile, target: str) -> None:
    """Refuse types and layouts that the target cannot compute."""
    targets.check_mla(mla_of(file.as_stored), target)
    targets.check_forms(target, file.as_stored)
    for tensor in file.tensors.values():
        targets.check(target, tensor.name, tensor.shape, tensor.qtype)
