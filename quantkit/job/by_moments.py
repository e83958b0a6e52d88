"""`quantkit quantize --moments`: encode by second moments that lie on disk (`encoding.saved`), to the bytes that `make`
chooses, without its pass."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path

import torch

from quantkit import ranks
from quantkit.encoding.hessian import Hessian
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerEncoder, LayerOptions
from quantkit.encoding.moments import Moments
from quantkit.encoding.saved import ROWS, experts_path, floats, moments_path, of_tokens
from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.byte_source import read_text
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_writer import GGUFWriter
from quantkit.formats.imatrix import imatrix_digest, load_imatrix
from quantkit.formats.lock import locked
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.whole_file import write_json
from quantkit.job.stages import QuantizeOptions, output_of, quantize_model, source_of
from quantkit.machine import chosen_device
from quantkit.models import family
from quantkit.models.open import see_like
from quantkit.planning.plan import Plan
from quantkit.progress import say, say_once, track
from quantkit.runtime.ahead import read_ahead
from quantkit.runtime.experts.streamed import inner
from quantkit.runtime.products import fast_products, rounded_up
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.watch import ExpertVisit, Projections
from quantkit.tensors import Imatrix

NOTE = "moments.json"  # beside the moments: what was measured with them


def check_moments(folder: Path, source: CheckpointSource) -> str:
    """The identity of the moments in a folder. QuantkitError, naming what is wrong, if they are not of this model on
    this kind of device, or not all of them are there. Reads headers only."""
    if ranks.count() > 1:
        raise QuantkitError(f"{folder}: one process encodes by moments; run it without other ranks")
    jobs = set()
    for layer in range(source.config.n_block):
        experts = [experts_path(folder, layer)] if source.config.is_moe(layer) else []
        for path in (moments_path(folder, layer), *experts):
            if not path.is_file():
                raise QuantkitError(f"{path}: no such file; `quantkit calibrate --moments {folder}` makes it")
            about = sealed.head(path)
            if about.get("of") != of_tokens(source):
                raise QuantkitError(
                    f"{path}: moments of another model, device or version of quantkit; calibrate again (--moments)"
                )
            jobs.add(about.get("job", ""))
    if len(jobs) > 1:
        raise QuantkitError(f"{folder}: holds moments of two passes; remove it and calibrate again (--moments)")
    return jobs.pop()


def check_quantize(checkpoint: Checkpoint, plan: Plan, imatrix: Path, how: QuantizeOptions) -> CheckpointSource:
    """Where `quantize_file` would compute; QuantkitError for what it would refuse before it writes."""
    see_like(checkpoint, plan.by_name)
    source = source_of(checkpoint, chosen_device(how.device) if how.by_moments else "cpu")
    plan.check_model(family.specs(source.config, plan.mla))
    loaded = load_imatrix(imatrix)[0]
    fit_importance(plan, loaded)
    if how.by_moments:
        check_moments(how.by_moments, source)
        if why := _untied(how.by_moments, imatrix_digest(loaded)):
            say_once(f"warning: {imatrix}: {why}; what ggml encodes, and what the file says of its text, goes by it")
    return source


def tie(moments: Path, imatrix: Path) -> None:
    """Note which importance was measured in the pass that left the moments."""
    write_json(moments / NOTE, {"imatrix_sha256": imatrix_digest(load_imatrix(imatrix)[0])})


def _untied(moments: Path, digest: str) -> str | None:
    """Why an imatrix may be of another text than the moments; None if one pass measured both."""
    try:
        noted = load_object(read_text(moments / NOTE, "record").encode(), str(moments / NOTE))
    except QuantkitError:
        return f"{moments} does not say which imatrix was measured with it"
    return None if noted.get("imatrix_sha256") == digest else f"not the one that was measured with {moments}"


def quantize_file(checkpoint: Checkpoint, plan: Plan, imatrix: Path, out: Path, how: QuantizeOptions) -> list[Path]:
    """Encode every tensor of the plan, by moments with our encoder or else with ggml's, and write the GGUF file(s);
    resumes."""
    if how.by_moments is None:
        return quantize_model(checkpoint, plan, imatrix, out, how, why="")  # said before
    source = check_quantize(checkpoint, plan, imatrix, how)
    fitted, output = output_of(checkpoint, plan, imatrix, out, how)
    with locked(out.parent), locked(how.by_moments, shared=True):  # nobody calibrates there meanwhile
        known = {"moments": check_moments(how.by_moments, source), "encoder": f"quantkit {how.effort}"}
        output = replace(output, fingerprint={**output.fingerprint, **known})
        return quantize_by_moments(source, plan, fitted, how.by_moments, output, how.effort)


@torch.inference_mode()
def quantize_by_moments(
    source: CheckpointSource, plan: Plan, imatrix: Imatrix, moments: Path, output: Output, effort: str
) -> list[Path]:
    """Write the planned file with our encoders and return its path(s); ggml takes what they leave. Resumes.

    imatrix: as `fit_importance` returns it for this plan. moments: a folder that `check_moments` took.
    """
    with open_writer(source.checkpoint, plan, output) as out:
        encoder = FileEncoder(source, plan, out, LayerOptions(EncoderOptions(effort)))
        with track("quantize", sum(source.layer_bytes()), "B") as advance, encoder:
            for layer, n_bytes in enumerate(source.layer_bytes()):
                done = _is_done(plan, out, layer)
                if not done:
                    with fast_products():
                        _layer(encoder, layer, moments)
                    encoder.leave_to_ggml(layer, imatrix)
                advance(n_bytes, f"layer {layer + 1} of {source.config.n_block}", done)
        say("matrices encoded with " + ", ".join(f"{kind} moments: {n:,}" for kind, n in encoder.used_by_all().items()))
        encode_pending(source.checkpoint, plan, imatrix, out, GgmlEncoder())
    return out.files


def _is_done(plan: Plan, out: GGUFWriter, layer: int) -> bool:
    return all(out.done(t.name, 0, prod(t.shape[:-1])) for t in plan.tensors if t.layer == layer)


def _layer(file: FileEncoder, layer: int, folder: Path) -> None:
    """One layer as `make` encodes it: its experts in order, then the rest."""
    source, device = file.source, file.source.device
    assert file.how.ours
    encoder = LayerEncoder(layer, file, file.how.ours)
    with sealed.reading(moments_path(folder, layer)) as found:
        for name in found.keys():
            kind, _, role = name.partition(".")
            if kind == "matrix":
                total, squares = floats(found.get_tensor(f"sums.{role}"))
                encoder.moments[role] = Moments(found.get_tensor(name).to(device), total, squares)
    if source.config.is_moe(layer):
        with sealed.reading(experts_path(folder, layer)) as found:
            tensors = {name: found.get_tensor(name) for name in found.keys()}
            form = found.metadata()["form"]
        read = _rows if form == ROWS else _matrices
        for take in read(encoder, tensors, partial(source.expert, layer), device):
            take()
    encoder.finish()


Take = Callable[[], None]


def _rows(
    encoder: LayerEncoder, found: dict[str, torch.Tensor], read: Callable[[int], Projections], device: torch.device
) -> Iterator[Take]:
    """The experts' visits again: their inputs are there, what goes into down is computed from them."""
    counts: list[int] = found["counts"].tolist()
    tokens, shares = (found[name].split(counts) for name in ("tokens", "shares"))
    encoder.weights = [found["weights"].to(device)]
    used = [expert for expert, n in enumerate(counts) if n]
    for expert, matrices in zip(used, read_ahead(read, used, encoder.group), strict=True):
        mine = tokens[expert].long()
        rows = rounded_up(found["inputs"][mine].to(device))
        hidden, n = inner(rows, matrices, encoder.source.config.limit), counts[expert]
        share = shares[expert].to(device)
        visit = ExpertVisit(expert, mine.to(device), rows[:n], hidden[:n], share, matrices)
        yield partial(encoder.observe_expert, visit)


def _matrices(
    encoder: LayerEncoder, found: dict[str, torch.Tensor], read: Callable[[int], Projections], device: torch.device
) -> Iterator[Take]:
    """The moments of each expert as they lie there."""

    def hessian(name: str, expert: int, tokens: float) -> Hessian:
        if not tokens:
            return Hessian()
        matrix = found[name][expert].to(device)
        return Hessian(matrix, matrix.diagonal().clone(), tokens)

    used = found["counts"].nonzero().flatten().tolist()
    for expert, matrices in zip(used, read_ahead(read, used, encoder.group), strict=True):
        effective = floats(found["effective"][expert])
        own, down = (hessian(*of) for of in zip(("inputs", "hidden"), (expert, expert), effective, strict=True))
        yield partial(encoder.take, expert, matrices, own, down)
