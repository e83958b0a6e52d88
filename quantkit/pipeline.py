"""The whole story, stage by stage and file to file: checkpoint -> imatrix -> plan -> GGUF -> scores."""

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit import __version__, bundle, onepass
from quantkit.arch import deepseek, tokenizer
from quantkit.arch.config import DeepseekConfig
from quantkit.calibration import coverage, sensitivity
from quantkit.calibration.corpus import TextChoice, overlap
from quantkit.calibration.measure import (
    Calibration,
    Steps,
    calibrate,
    chosen_room,
    cut,
    job_of,
    report_coverage,
)
from quantkit.calibration.state import PassState
from quantkit.encoding import GgmlEncoder
from quantkit.errors import QuantkitError
from quantkit.evaluation.verify import verify
from quantkit.formats.checkpoint import Checkpoint, open_source
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_encode import U32
from quantkit.formats.imatrix import fit, load_imatrix, save_imatrix
from quantkit.formats.resume import discard
from quantkit.planning.plan import Plan, make_plan
from quantkit.planning.recipe import Recipe
from quantkit.progress import say, track
from quantkit.quantize import encode_pending, fit_importance, open_writer, quantize
from quantkit.runtime.sources import CheckpointSource, GGUFSource, Source
from quantkit.tensors import Imatrix

DEFAULT_MODEL = "tiny-r1"
SMALL_WEIGHTS = 200_000_000  # what our encoders do on a CPU in minutes
MOST_OVERLAP = 0.05  # of evaluation lines: separators, licences and boilerplate recur in unrelated texts
IMATRIX, PLAN, VERIFY, PROVENANCE = "imatrix.gguf", "plan.json", "verify.json", "provenance.json"


def resolve_model(model: str | Path) -> Path:
    """A folder, or the name of a bundled model."""
    path = Path(model)
    if path.is_dir():
        return path
    if str(model) in bundle.model_names():
        return bundle.models_dir() / str(model)
    names = ", ".join(bundle.model_names())
    raise QuantkitError(f"{model}: no such folder, and not one of the bundled models ({names})")


def open_weights(model: str | Path) -> Checkpoint:
    """The model as a checkpoint with weights; a bare description is refused."""
    found = open_source(resolve_model(model))
    if isinstance(found, Geometry):
        raise QuantkitError(f"{model} is a description without weights: it can be inspected and planned, not quantized")
    return found


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def source_of(checkpoint: Checkpoint, device: str) -> CheckpointSource:
    """float32 on the CPU, bfloat16 on a GPU."""
    return CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)


def open_model(model: str | Path, device: str) -> Source:
    """What calibration can run: a checkpoint folder, a bundled name, or a GGUF file (dequantized layer by layer)."""
    if Path(model).suffix == ".gguf":
        return GGUFSource(model, device, hybrid=False)
    return source_of(open_weights(model), device)


def plan_model(model: str | Path, recipe: str | Path, target: str | None = None, mla: str | None = None) -> Plan:
    """A type for every tensor. Needs no weights: bundled descriptions will do."""
    path = resolve_model(model)
    rules = Recipe.load(recipe)
    config = DeepseekConfig.from_hf(open_source(path).config)
    specs = deepseek.specs(config, mla or rules.mla)
    return make_plan(specs, rules, target, model=path.name)


def imatrix_digest(imatrix: Imatrix) -> str:
    """sha256 of all sums and counts, whatever file they came from."""
    whole = hashlib.sha256()
    for name in sorted(imatrix):
        entry = imatrix[name]
        for array in (entry.in_sum2, entry.counts):
            whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def quantize_model(checkpoint: Checkpoint, plan: Plan, imatrix_path: Path, out: Path, *, workers: int | None = None,
                   split_max_bytes: int | None = None, restart: bool = False,
                   overwrite: bool = False) -> list[Path]:  # fmt: skip
    """Encode every tensor of the plan with ggml and write the GGUF file(s); resumes."""
    loaded, info = load_imatrix(imatrix_path)
    imatrix = fit_importance(plan, loaded)
    fingerprint = {"checkpoint": checkpoint.fingerprint(), "plan": plan.digest(), "imatrix": imatrix_digest(imatrix)}
    extra = {
        "quantize.imatrix.file": imatrix_path.name,
        "quantize.imatrix.entries_count": U32(len(imatrix)),
        "quantize.imatrix.chunks_count": U32(info.chunk_count),
    } | ({"quantize.imatrix.dataset": info.datasets[0]} if info.datasets else {})
    return quantize(
        checkpoint, plan, imatrix, out, GgmlEncoder(), fingerprint=fingerprint, extra_metadata=extra,
        workers=workers, split_max_bytes=split_max_bytes, restart=restart, overwrite=overwrite,
    )  # fmt: skip


def measure_sensitivity(source: CheckpointSource, imatrix_path: Path, choice: TextChoice, folder: Path, *,
                        tier: sensitivity.Tier | None = None, budget: int = 1 << 21,
                        routed: Sequence[str] = sensitivity.ROUTED_TYPES,
                        others: Sequence[str] = sensitivity.OTHER_TYPES) -> sensitivity.Sensitivity:  # fmt: skip
    """Write sensitivity.json and its heat map. Measured on calibration text: the evaluation text stays unseen."""
    imatrix, _ = load_imatrix(imatrix_path)
    plan_all = {spec.name: spec for spec in deepseek.specs(source.config)}
    fitted = {name: fit(imatrix[name], spec.n_matrices, spec.n_in, name)
              for name, spec in plan_all.items() if name in imatrix and len(spec.shape) > 1}  # fmt: skip
    chunks = cut(choice.corpus("calibration"), source, choice)
    chosen, n_chunk = sensitivity.choose_tier(source, chunks.tokens, routed, others, budget)
    say(f"{tier or chosen} tier, {n_chunk * choice.chunk:,} tokens a fork")
    with track("sensitivity", source.config.n_layer, "layers") as advance:
        found = sensitivity.measure(source, fitted, chunks.tokens, tier=tier, routed=routed, others=others,
                                    budget=budget, progress=lambda _: advance(1))  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "sensitivity.json.part"
    part.write_text(found.to_json(), encoding="utf-8")
    os.replace(part, folder / "sensitivity.json")
    sensitivity.heat_map(found, folder / "sensitivity.png")
    return found


@torch.inference_mode()
def verify_file(path: Path, reference: Checkpoint, choice: TextChoice, device: str, target: str | None = None,
                out: Path | None = None) -> dict[str, Any]:  # fmt: skip
    """Perplexity and divergence of a file from the original, on text that calibration never uses."""
    original, quantized = source_of(reference, device), GGUFSource(path, device, hybrid=False)
    text = choice.corpus("evaluation")
    chunks = cut(text, original, choice)
    sample = text.documents[0].text[:4096]
    if tokenizer.encode(original.tokenizer(), sample) != tokenizer.encode(quantized.tokenizer(), sample):
        raise QuantkitError(f"{path}: its tokenizer cuts text differently from {original.name}'s")
    result = verify(quantized, original, chunks, target) | {"text": text.name, "text_sha256": text.digest}
    if out:
        write_json(out, result)
    return result


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written whole and durably, or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write ({error.strerror})") from None


@dataclass(frozen=True)
class MakeOptions:
    """Everything `make` can be told; the defaults are what a person gets who tells it nothing."""

    recipe: str = "1.58bit"
    target: str | None = None
    mla: str | None = None
    calibration: Calibration = field(default_factory=Calibration)
    evaluation: TextChoice = field(default_factory=lambda: TextChoice(n_tokens=32768))
    imatrix: Path | None = None
    encoder: str = "auto"
    effort: str = "normal"
    device: str | None = None
    workers: int | None = None
    split_max_bytes: int | None = None
    restart: bool = False
    verify: bool = True


def make(model: str | Path, folder: Path, options: MakeOptions) -> tuple[list[Path], dict[str, Any] | None]:
    """The main job. Leaves the GGUF(s), imatrix.gguf, plan.json, verify.json and provenance.json in `folder`.

    What an earlier, interrupted run of the same job left there is used; that of another job is refused.
    """
    device = options.device or default_device()
    plan = plan_model(model, options.recipe, options.target, options.mla)
    checkpoint = open_weights(model)
    if options.verify and not options.imatrix:
        check_disjoint(options.calibration.text, options.evaluation)
    folder.mkdir(parents=True, exist_ok=True)
    identity = _identity(checkpoint, plan, options)
    _claim(folder, identity, options.restart)
    write_json(folder / PROVENANCE, identity)
    write_text(folder / PLAN, plan.to_json())
    out = folder / f"{plan.model}-{plan.recipe}.gguf"
    if (files := finished_files(out)) and not options.restart:
        say(f"using {files[0]} from an earlier run")
        PassState(out.with_name(out.name + ".state"), "").remove()  # if that run was stopped just before its end
    elif choose_encoder(options, plan, device) == "quantkit":
        files = make_in_one_pass(source_of(checkpoint, device), plan, out, folder / IMATRIX, options)
    else:
        files = make_in_two_steps(checkpoint, plan, out, folder / IMATRIX, options, device)
    if not options.verify:
        return files, None
    return files, verify_file(files[0], checkpoint, options.evaluation, device, plan.target, folder / VERIFY)


def make_in_two_steps(checkpoint: Checkpoint, plan: Plan, out: Path, imatrix: Path, options: MakeOptions,
                      device: str) -> list[Path]:  # fmt: skip
    """Calibrate (or take an imatrix that is there), then encode with ggml."""
    if options.imatrix:
        imatrix = options.imatrix
    elif imatrix.exists():
        say(f"using {imatrix} from an earlier run")
    else:
        calibrate(source_of(checkpoint, device), options.calibration, imatrix, options.restart)
    return quantize_model(checkpoint, plan, imatrix, out, workers=options.workers,
                          split_max_bytes=options.split_max_bytes, restart=options.restart, overwrite=True)  # fmt: skip


@torch.inference_mode()
def make_in_one_pass(source: CheckpointSource, plan: Plan, out: Path, imatrix_path: Path,
                     options: MakeOptions) -> list[Path]:  # fmt: skip
    """Each layer is calibrated and encoded in one visit with our encoders; ggml writes what is left."""
    how = options.calibration
    text = how.text.corpus("calibration")
    chunks = cut(text, source, how.text)
    n_tokens, n_layer = chunks.tokens.numel(), source.config.n_layer
    hidden_dtype, room = chosen_room(source, n_tokens, how, out.parent)
    state = PassState(out.with_name(out.name + ".state"), job_of(source, chunks) + options.effort)
    if options.restart:
        state.remove()
    fingerprint = {"checkpoint": source.checkpoint.fingerprint(), "plan": plan.digest(), "calibration": state.job,
                   "encoder": f"quantkit {options.effort}"}  # fmt: skip
    extra = {
        "quantize.imatrix.file": imatrix_path.name,
        "quantize.imatrix.dataset": text.name,
        "quantize.imatrix.chunks_count": U32(len(chunks.tokens)),
    }
    say(f"calibrating and encoding on {n_tokens:,} tokens of {text.name}")
    with open_writer(source.checkpoint, plan, out, fingerprint=fingerprint, extra_metadata=extra, overwrite=True,
                     split_max_bytes=options.split_max_bytes, restart=options.restart) as writer:  # fmt: skip
        with track("layers", n_layer, "layers") as advance:
            progress = Steps(advance)
            measured, used = onepass.run(source, plan, chunks.tokens, writer, onepass.EncoderOptions(options.effort),
                                         state, hidden_dtype=hidden_dtype, room=room, progress=progress)  # fmt: skip
        if used:
            say("matrices encoded with " + ", ".join(f"{kind} moments: {count:,}" for kind, count in used.items()))
        report_coverage(measured, n_tokens, how.min_expert_tokens)
        measured = coverage.shrink(measured, how.min_expert_tokens)
        save_imatrix(imatrix_path, measured, datasets=[text.name], chunk_count=len(chunks.tokens),
                     chunk_size=how.text.chunk)  # fmt: skip
        encode_pending(source.checkpoint, plan, fit_importance(plan, measured), writer, GgmlEncoder(), options.workers)
    state.remove()
    return writer.files


def choose_encoder(options: MakeOptions, plan: Plan, device: str) -> str:
    """`auto`: our encoders on a GPU and for small models; on a CPU a large model would take days."""
    if options.encoder not in ("auto", "quantkit", "ggml"):
        raise QuantkitError(f"--encoder {options.encoder}: unknown; choose auto, quantkit or ggml")
    if options.imatrix:
        if options.encoder == "quantkit":
            raise QuantkitError("--imatrix holds no second moments: quantkit's encoders need the text (leave it out)")
        return "ggml"
    if options.encoder != "auto":
        return options.encoder
    small = sum(tensor.n_weights for tensor in plan.tensors) <= SMALL_WEIGHTS
    return "quantkit" if small or device != "cpu" else "ggml"


def check_disjoint(calibration: TextChoice, evaluation: TextChoice) -> None:
    """Figures measured on text that was calibrated on would flatter; refuse them."""
    share = overlap(calibration.corpus("calibration"), evaluation.corpus("evaluation"))
    if share > MOST_OVERLAP:
        raise QuantkitError(f"{share:.0%} of the evaluation text's long lines also stand in the calibration text; "
                            "choose other text with --eval-data")  # fmt: skip


def finished_files(path: Path) -> list[Path]:
    """The complete file or splits under this name; they carry their final name only when they are complete."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9]*-of-[0-9]*.gguf"))


def _identity(checkpoint: Checkpoint, plan: Plan, options: MakeOptions) -> dict[str, Any]:
    """What the imatrix and the file of this run depend on, and nothing that may change between reruns."""
    text = {"imatrix": str(options.imatrix)} if options.imatrix else json.loads(json.dumps(asdict(options.calibration)))
    for where in ("ram", "hidden"):
        text.pop(where, None)
    return {
        "quantkit": __version__,
        "checkpoint": checkpoint.fingerprint(),
        "recipe": plan.recipe,
        "target": plan.target,
        "mla": plan.mla,
        "plan": plan.digest(),
        "calibration": text,
        "encoder": options.encoder,
        "effort": options.effort,
    }


def _claim(folder: Path, identity: Mapping[str, Any], restart: bool) -> None:
    """The folder is ours if it is new or holds the same job; `restart` clears what another job left."""
    record = folder / PROVENANCE
    if not record.exists():
        return
    try:
        old = json.loads(record.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        old = None
    if not isinstance(old, dict):
        old = {}
    changed = [key for key, value in identity.items() if old.get(key) != value]
    if not changed:
        return
    if not restart:
        key, was, now = _difference(changed[0], old.get(changed[0]), identity[changed[0]])
        raise QuantkitError(f"{folder} holds another job: {key} was {was}, now {now}; "
                            "choose another --output, or --restart")  # fmt: skip
    for ledger in folder.glob("*.gguf.part.ledger"):
        discard(ledger.with_name(ledger.name.removesuffix(".part.ledger")))
    for state in folder.glob("*.gguf.state*"):
        shutil.rmtree(state, ignore_errors=True)
    for name in (IMATRIX, VERIFY):
        (folder / name).unlink(missing_ok=True)


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The first value that differs, by its path in nested tables: `calibration.text.n_tokens`, 8192, 4096."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in now:
            if was.get(inner) != now[inner]:
                return _difference(f"{key}.{inner}", was.get(inner), now[inner])
    return key, was, now
