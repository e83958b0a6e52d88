"""The whole story, stage by stage and file to file: checkpoint -> imatrix -> plan -> GGUF -> scores."""

import glob
import hashlib
import json
import shlex
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit import __version__, ranks
from quantkit.calibration import coverage, sensitivity
from quantkit.calibration.collect import Steps, collect
from quantkit.calibration.corpus import TextChoice, cut, overlap
from quantkit.calibration.measure import Calibration, calibrate
from quantkit.calibration.state import PassState
from quantkit.encoding.jobs import GgmlEncoder, Output, encode_pending, fit_importance, open_writer, quantize
from quantkit.encoding.layer import EncoderOptions, FileEncoder, LayerOptions
from quantkit.errors import QuantkitError
from quantkit.evaluation import generation
from quantkit.evaluation.certificate import Certificate
from quantkit.evaluation.certify import certify
from quantkit.evaluation.divergence import Score
from quantkit.evaluation.reference import ReferencePass
from quantkit.evaluation.runtime_mode import runtime_mode
from quantkit.evaluation.verify import verify
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_encode import U32
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import fit, load_imatrix, save_imatrix
from quantkit.formats.resume import discard
from quantkit.formats.sensitivity import Sensitivity, Tier
from quantkit.formats.whole_file import write_whole
from quantkit.job import recovery
from quantkit.job.plan import BudgetOptions, plan_model, recipe_text
from quantkit.models import family, tokenizer
from quantkit.models.open import ModelRef, open_model, open_weights
from quantkit.planning.plan import Plan
from quantkit.progress import say, track
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.memory import Limits, room_for
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.sources.weights import open_gguf
from quantkit.runtime.stream import Source, job_of
from quantkit.tensors import Imatrix

DEFAULT_MODEL = "tiny-r1"
SMALL_WEIGHTS = 200_000_000  # what our encoders do on a CPU in minutes
MOST_OVERLAP = 0.05  # of evaluation lines: separators, licences and boilerplate recur in unrelated texts
IMATRIX, PLAN, RECIPE = "imatrix.gguf", "plan.json", "recipe.toml"
BASE = "base"  # folder of the file that recovery starts from
VERIFY, PROVENANCE, RECOVERY, CERTIFY = "verify.json", "provenance.json", "recovery.json", "certify.json"


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def source_of(checkpoint: Checkpoint, device: str) -> CheckpointSource:
    """float32 on the CPU, bfloat16 on a GPU."""
    return CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)


def open_for_calibration(model: str | Path, device: str) -> Source:
    """What calibration can run: a checkpoint (folder, bundled name, Hub id), or a GGUF file layer by layer."""
    if Path(model).suffix == ".gguf":
        return open_source(model, device)
    return source_of(open_weights(model), device)


def imatrix_digest(imatrix: Imatrix) -> str:
    """sha256 of all sums and counts, whatever file they came from."""
    whole = hashlib.sha256()
    for name in sorted(imatrix):
        entry = imatrix[name]
        for array in (entry.in_sum2, entry.counts):
            whole.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return whole.hexdigest()


def quantize_model(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix_path: Path,
    out: Path,
    *,
    workers: int | None = None,
    split_max_bytes: int | None = None,
    restart: bool = False,
    overwrite: bool = False,
    after_layer: Callable[[int], None] | None = None,
) -> list[Path]:
    """Encode every tensor of the plan with ggml and write the GGUF file(s); resumes."""
    loaded, info = load_imatrix(imatrix_path)
    imatrix = fit_importance(plan, loaded)
    fingerprint = {"checkpoint": checkpoint.fingerprint(), "plan": plan.digest(), "imatrix": imatrix_digest(imatrix)}
    extra = imatrix_metadata(len(imatrix), info.chunk_count, info.datasets[0] if info.datasets else None)
    return quantize(
        checkpoint,
        plan,
        imatrix,
        Output(out, fingerprint, extra, split_max_bytes, restart, overwrite),
        GgmlEncoder(),
        workers=workers,
        after_layer=after_layer,
    )


def imatrix_metadata(n_entries: int, n_chunks: int, dataset: str | None) -> dict[str, Any]:
    """The keys that llama-quantize writes too. The name is the one in the folder of `make`, wherever the file lies."""
    named = {
        "quantize.imatrix.file": IMATRIX,
        "quantize.imatrix.entries_count": U32(n_entries),
        "quantize.imatrix.chunks_count": U32(n_chunks),
    }
    return named | ({"quantize.imatrix.dataset": dataset} if dataset else {})


def measure_sensitivity(
    source: CheckpointSource,
    imatrix_path: Path,
    choice: TextChoice,
    folder: Path,
    *,
    types: sensitivity.Candidates = sensitivity.DEFAULT,
    tier: Tier | None = None,
    budget: int = 1 << 21,
) -> Sensitivity:
    """Write sensitivity.json and its heat map. Measured on calibration text: the evaluation text stays unseen."""
    imatrix, _ = load_imatrix(imatrix_path)
    plan_all = {spec.name: spec for spec in family.specs(source.config)}
    fitted = {
        name: fit(imatrix[name], spec.n_matrices, spec.n_in, name)
        for name, spec in plan_all.items()
        if name in imatrix and len(spec.shape) > 1
    }
    chunks = cut(choice.corpus("calibration"), source, choice)
    chosen, n_chunk = sensitivity.choose_tier(source, chunks.tokens, types, budget)
    say(f"{tier or chosen} tier, {n_chunk * choice.chunk:,} tokens a fork")
    with track("sensitivity", source.config.n_layer, "layers") as advance:
        found = sensitivity.measure(
            source,
            fitted,
            chunks.tokens,
            types,
            tier=tier,
            budget=budget,
            progress=lambda _: advance(1),
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "sensitivity.json", found.to_json())
    sensitivity.heat_map(found, folder / "sensitivity.png")
    return found


@torch.inference_mode()
def verify_file(
    path: Path,
    reference: Checkpoint,
    choice: TextChoice,
    device: str,
    target: str | None = None,
    out: Path | None = None,
    *,
    score: Score = "half",
    runtime_tokens: int = 0,
    prompts: int = 0,
    ram: int | None = None,
    passed: ReferencePass | None = None,
) -> dict[str, Any]:
    """Perplexity and divergence of a file from the original, on text that calibration never uses. See `verify`.

    passed: the original's side, if it has run along with another pass.
    """
    original, quantized = source_of(reference, device), open_source(path, device)
    text = choice.corpus("evaluation")
    chunks = cut(text, original, choice)
    sample = text.documents[0].text[:4096]
    if tokenizer.tokenize(original.tokenizer(), sample) != tokenizer.tokenize(quantized.tokenizer(), sample):
        raise QuantkitError(f"{path}: its tokenizer cuts text differently from {original.name}'s")
    runtime = partial(open_engine, open_gguf(path, device), 1) if runtime_tokens or prompts else None
    known = passed.scored() if passed else None
    made = verify(quantized, original, chunks, target, score=score, ram=ram, known=known)
    result = made.figures
    if runtime is not None and runtime_tokens:
        result["runtime"] = runtime_mode(runtime, made.heads, chunks, score, runtime_tokens)
    if runtime is not None and prompts:
        result["generation"] = generation.check(runtime, original, chunks, prompts)
    result |= {"text": text.name, "text_sha256": text.digest}
    if out:
        write_json(out, result)
    return result


@torch.inference_mode()
def certify_file(
    path: Path,
    target: str,
    reference: str | Path | None,
    imatrix: Path | None,
    out: Path,
    *,
    engine: bool = True,
    values: bool = True,
    device: str = "cpu",
) -> Certificate:
    """All checks of a file for a target; writes certify.json, passed or not."""
    original = open_model(reference) if reference else None
    importance = load_imatrix(imatrix)[0] if imatrix else None
    made = certify(path, target, original, importance, engine=engine, values=values, device=device)
    write_json(out, made.to_dict())
    return made


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Written whole or not at all."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written whole or not at all."""
    try:
        write_whole(path, text.encode())
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write ({error.strerror})") from None


@dataclass(frozen=True)
class MakeOptions:
    """Everything `make` can be told; the defaults are what a person gets who tells it nothing."""

    recipe: str | None = None
    target: str | None = None
    budget: BudgetOptions = field(default_factory=BudgetOptions)
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
    recover: bool = False


def make(model: ModelRef | Path | str, folder: Path, options: MakeOptions) -> tuple[list[Path], dict[str, Any] | None]:
    """The main job. Leaves GGUF(s), imatrix.gguf, plan.json, recipe.toml, verify.json, provenance.json in `folder`.

    What an earlier, interrupted run of the same job left there is used; that of another job is refused. Ranks calibrate
    and encode together; then rank 0 alone recovers and verifies, and the others return without a result.
    """
    device = options.device or default_device()
    plan = plan_model(model, options.recipe, options.target, options.budget, options.split_max_bytes)
    checkpoint = open_weights(model)
    check_ranks(checkpoint, device)
    ranks.same(plan.digest(), "plan")
    if options.verify and not options.imatrix:
        check_disjoint(options.calibration.text, options.evaluation)
    identity = _identity(checkpoint, plan, options)
    out = folder / f"{plan.model}-{plan.recipe}.gguf"

    def begin() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        _claim(folder, identity, options.restart)
        write_json(folder / PROVENANCE, identity | _circumstances(checkpoint, plan, options, device))
        write_text(folder / PLAN, plan.to_json())
        if (rules := recipe_text(options.recipe, options.budget)) is not None:
            write_text(folder / RECIPE, rules)
        if options.restart:
            for left in ("reference.state", BASE):
                shutil.rmtree(folder / left, ignore_errors=True)

    ranks.agree(begin)
    # A local original is read once more to compare every layer; one on a Hub is downloaded once, for both.
    reference = reference_pass(checkpoint, options, folder, device) if options.verify and checkpoint.origin else None
    if (files := agreed_files(out)) and not options.restart:
        say(f"using {files[0]} from an earlier run")
        PassState(out.with_name(out.name + ".state"), "").remove()  # if that run was stopped just before its end
    elif options.recover:
        files = make_and_recover(checkpoint, plan, out, options, device, reference)
    else:
        files = make_file(checkpoint, plan, out, folder / IMATRIX, options, device, reference)
    ranks.leave()
    result = None
    if options.verify and ranks.index() == 0:
        result = verify_file(
            files[0], checkpoint, options.evaluation, device, plan.target, folder / VERIFY, passed=reference
        )
    if reference:
        reference.state.remove()
    checkpoint.close()
    return files, result


def reference_pass(checkpoint: Checkpoint, options: MakeOptions, folder: Path, device: str) -> ReferencePass:
    """The evaluation's half that can run while the original is being read anyway."""
    source, text = source_of(checkpoint, device), options.evaluation
    return ReferencePass(source, cut(text.corpus("evaluation"), source, text), folder / "reference.state")


def make_file(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    imatrix: Path,
    options: MakeOptions,
    device: str,
    reference: ReferencePass | None,
) -> list[Path]:
    """One pass over the layers, unless an imatrix is there already or takes more than one."""
    encoder = choose_encoder(options, plan, device)
    repeated = ranks.agree(imatrix.exists) or options.calibration.expert_tokens
    if options.imatrix or (encoder == "ggml" and repeated):
        return make_in_two_steps(checkpoint, plan, out, imatrix, options, device, reference)
    return make_in_one_pass(source_of(checkpoint, device), plan, out, imatrix, options, encoder, reference)


def make_and_recover(
    checkpoint: Checkpoint, plan: Plan, out: Path, options: MakeOptions, device: str, reference: ReferencePass | None
) -> list[Path]:
    """Make the file in a folder of its own, then its recovered twin on the same calibration text."""
    choice = options.calibration.text
    source = recovery.open_original(checkpoint, plan, device, choice.n_tokens, options.calibration.memory)
    folder = out.parent / BASE
    folder.mkdir(exist_ok=True)
    base = folder / out.name
    if (files := agreed_files(base)) and not options.restart:
        say(f"using {files[0]} from an earlier run")
    else:
        files = make_file(checkpoint, plan, base, out.parent / IMATRIX, options, device, reference)
    ranks.leave()
    if ranks.index():
        return []
    chunks = cut(choice.corpus("calibration"), source, choice)
    facts = job_of(source, chunks.tokens), GGUFFile.open(files[0]).fingerprint()
    job = hashlib.sha256(repr(facts).encode()).hexdigest()
    files, gained = recovery.recover(files[0], out.parent, source, plan, chunks.tokens, job)
    write_json(out.parent / RECOVERY, gained)
    shutil.rmtree(folder)
    return files


def make_in_two_steps(
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    imatrix: Path,
    options: MakeOptions,
    device: str,
    reference: ReferencePass | None = None,
) -> list[Path]:
    """Calibrate (or take an imatrix that is there), then encode with ggml."""
    if options.imatrix:
        imatrix = options.imatrix
    elif ranks.agree(imatrix.exists):
        say(f"using {imatrix} from an earlier run")
    else:
        calibrate(source_of(checkpoint, device), options.calibration, imatrix, options.restart)
    return quantize_model(
        checkpoint,
        plan,
        imatrix,
        out,
        workers=options.workers,
        split_max_bytes=options.split_max_bytes,
        restart=options.restart,
        overwrite=True,
        after_layer=reference.advance if reference else None,
    )


@torch.inference_mode()
def make_in_one_pass(
    source: CheckpointSource,
    plan: Plan,
    out: Path,
    imatrix_path: Path,
    options: MakeOptions,
    encoder: str = "quantkit",
    reference: ReferencePass | None = None,
) -> list[Path]:
    """Each layer is calibrated and encoded in one visit: with our encoders and ggml for the rest, or all with ggml."""
    how = options.calibration
    text = how.text.corpus("calibration")
    chunks = cut(text, source, how.text)
    n_tokens, n_layer = chunks.tokens.numel(), source.config.n_layer
    beside = reference.tokens.numel() if reference else 0
    room = room_for(source, n_tokens, Limits(how.memory, how.hidden, out.parent, beside))
    effort = options.effort if encoder == "quantkit" else encoder
    state = PassState(out.with_name(out.name + ".state"), job_of(source, chunks.tokens) + effort)
    if options.restart:
        state.remove()
    fingerprint = {
        "checkpoint": source.checkpoint.fingerprint(),
        "plan": plan.digest(),
        "calibration": state.job,
        "encoder": f"{encoder} {options.effort}",
        "min_expert_tokens": str(how.min_expert_tokens),
    }
    n_entries = sum(tensor.layer is not None and len(tensor.shape) > 1 for tensor in plan.tensors)
    extra = imatrix_metadata(n_entries, len(chunks.tokens), text.name)
    ours = EncoderOptions(options.effort) if encoder == "quantkit" else None
    output = Output(out, fingerprint, extra, options.split_max_bytes, options.restart, overwrite=True)
    say(f"calibrating and encoding on {n_tokens:,} tokens of {text.name}")
    with open_writer(source.checkpoint, plan, output) as writer:
        layers = FileEncoder(source, plan, writer, LayerOptions(ours, how.min_expert_tokens, options.workers))
        with track("layers", n_layer, "layers") as advance:
            steps = Steps(advance)

            def progress(done: int) -> None:
                if reference:
                    reference.advance(done)
                steps(done)

            measured = collect(
                source, chunks.tokens, state, room=room, turns=layers.turns, watch=layers.watch, progress=progress
            )
        if used := layers.used_by_all():
            say("matrices encoded with " + ", ".join(f"{kind} moments: {count:,}" for kind, count in used.items()))
        coverage.report(measured, n_tokens, how.min_expert_tokens)
        measured = coverage.shrink(measured, how.min_expert_tokens)
        if ranks.index() == 0:
            save_imatrix(
                imatrix_path, measured, datasets=[text.name], chunk_count=len(chunks.tokens), chunk_size=how.text.chunk
            )
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
        raise QuantkitError(
            f"{share:.0%} of the evaluation text's long lines also stand in the calibration text; "
            "choose other text with --eval-data"
        )


def check_ranks(checkpoint: Checkpoint, device: str) -> None:
    """Refuse, before any work, ranks that cannot do one job together."""
    if ranks.count() == 1:
        return
    if checkpoint.origin:
        raise QuantkitError(
            f"{checkpoint.path}: several ranks read a model from a folder that they all see; download "
            "it first (hf download)"
        )
    ranks.same(checkpoint.fingerprint(), "checkpoint")
    ranks.same(device, "device")
    ranks.same(__version__, "version of quantkit")


def agreed_files(path: Path) -> list[Path]:
    """`finished_files`, as rank 0 finds them."""
    return [path.with_name(name) for name in ranks.agree(lambda: [file.name for file in finished_files(path)])]


def finished_files(path: Path) -> list[Path]:
    """The complete file or splits under this name; they carry their final name only when they are complete."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9]*-of-[0-9]*.gguf"))


def _identity(checkpoint: Checkpoint, plan: Plan, options: MakeOptions) -> dict[str, Any]:
    """What the imatrix and the file of this run depend on, and nothing that may change between reruns."""
    text = {"imatrix": str(options.imatrix)} if options.imatrix else json.loads(json.dumps(asdict(options.calibration)))
    for where in ("memory", "hidden"):
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
        "recover": options.recover,
    } | ({"weights": checkpoint.origin["weights"]} if checkpoint.origin else {})


def _circumstances(checkpoint: Checkpoint, plan: Plan, options: MakeOptions, device: str) -> dict[str, Any]:
    """What a reader wants to know, or needs to make the same again, besides the identity."""
    facts = {
        "command": shlex.join(["quantkit", *sys.argv[1:]]),
        "model": checkpoint.path.name,
        "source": checkpoint.origin,
        "revision": source_revision(Path(checkpoint.path)),
        "packed_by": choose_encoder(options, plan, device),
        "calibration_sha256": None if options.imatrix else options.calibration.text.corpus("calibration").digest,
        "evaluation": json.loads(json.dumps(asdict(options.evaluation))) if options.verify else None,
        "split_max_bytes": options.split_max_bytes,
        "device": device,
        "ranks": ranks.count() if ranks.count() > 1 else None,
    }
    return {key: value for key, value in facts.items() if value is not None}


def source_revision(folder: Path) -> str | None:
    """The commit on the hub that a downloaded folder is, from where huggingface_hub notes it."""
    if folder.resolve().parent.name == "snapshots":
        return folder.resolve().name
    note = folder / ".cache" / "huggingface" / "download" / "config.json.metadata"
    return note.read_text(encoding="utf-8").split("\n", 1)[0] if note.is_file() else None


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
        raise QuantkitError(
            f"{folder} holds another job: {key} was {was}, now {now}; choose another --output, or --restart"
        )
    for ledger in folder.glob("*.gguf.part.ledger"):
        discard(ledger.with_name(ledger.name.removesuffix(".part.ledger")))
    for state in folder.glob("*.gguf.state*"):
        shutil.rmtree(state, ignore_errors=True)
    for name in (IMATRIX, VERIFY, RECOVERY):
        (folder / name).unlink(missing_ok=True)


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The first value that differs, by its path in nested tables: `calibration.text.n_tokens`, 8192, 4096."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in now:
            if was.get(inner) != now[inner]:
                return _difference(f"{key}.{inner}", was.get(inner), now[inner])
    return key, was, now
