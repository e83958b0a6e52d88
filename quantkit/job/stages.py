"""The stages of `make` that are commands too, each by itself and file to file."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from quantkit import ranks
from quantkit.calibration import sensitivity
from quantkit.calibration.corpus import Corpus, TextChoice, cut
from quantkit.calibration.options import sized
from quantkit.calibration.variants import DEFAULT, EVERY, Candidates
from quantkit.encoding.estimate import estimate
from quantkit.encoding.jobs import GgmlEncoder, Output, fit_importance, quantize
from quantkit.errors import QuantkitError, needs
from quantkit.evaluation import configuration, generation
from quantkit.evaluation.divergence import Score
from quantkit.evaluation.reference import ReferencePass
from quantkit.evaluation.runtime_mode import runtime_mode
from quantkit.evaluation.verify import verify
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_values import U32
from quantkit.formats.imatrix import fit, imatrix_digest, load_imatrix
from quantkit.formats.lock import locked
from quantkit.formats.sensitivity import Sensitivity, Tier
from quantkit.formats.whole_file import make_folders, write_json, write_text
from quantkit.job.asked import check_moments
from quantkit.job.folder import IMATRIX, SENSITIVITY
from quantkit.models import family
from quantkit.models.open import see_like
from quantkit.models.tokenizer import tokenize
from quantkit.planning.plan import Plan
from quantkit.progress import say, track
from quantkit.runtime.generate import Opener
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import Source
from quantkit.tensors import Importance

WORSE = (
    "an imatrix holds no second moments, by which quantkit's encoder halves the KLD in the same bytes: --moments DIR "
    "of `calibrate --moments DIR`, or `make`"
)
BASELINE_WHY = "the baseline, of the same types, which is judged alike and then removed"
FORKED_TOKENS = 8192  # of `sensitivity` with forks, at most


def source_of(checkpoint: Checkpoint, device: str) -> CheckpointSource:
    """float32 on the CPU, bfloat16 on a GPU."""
    return CheckpointSource(checkpoint, device, torch.float32 if device == "cpu" else torch.bfloat16)


@dataclass(frozen=True)
class QuantizeOptions:
    """How `quantize` writes: bytes of one file (default any), whether to discard
    what an interrupted run left, and whether to replace a finished file; keep_ledger as in `GGUFWriter.open`.

    encoder: quantkit, by the moments in a folder of `calibrate --moments`; ggml; or auto: quantkit where there are
    moments. effort: fast, normal or best; device: cpu or cuda, default a GPU if there is one; both for quantkit's."""

    split_max_bytes: int | None = None
    restart: bool = False
    overwrite: bool = False
    keep_ledger: bool = False
    encoder: str = "auto"
    moments: Path | None = None
    effort: str = "normal"
    device: str | None = None

    @property
    def by_moments(self) -> Path | None:
        """The folder to encode by with quantkit's encoder; None: with ggml's. QuantkitError if it is not given."""
        check_moments(self.encoder, self.moments)
        return None if self.encoder == "ggml" else self.moments

    @property
    def reason(self) -> str:
        """Which encoder it takes, and why."""
        if folder := self.by_moments:
            return f"quantkit, effort {self.effort}, by the moments in {folder}"
        why = "as asked, and" if self.encoder == "ggml" else "for"
        return f"ggml, {why} {WORSE}"


def quantize_model(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix_path: Path,
    out: Path,
    how: QuantizeOptions = QuantizeOptions(),
    after_layer: Callable[[int], None] | None = None,
    why: str = WORSE,
) -> list[Path]:
    """Encode every tensor of the plan with ggml and write the GGUF file(s); resumes. after_layer: as in `quantize`.
    With quantkit's encoder: `job.by_moments`. why: what is said of ggml's, if anything."""
    if why:
        say(f"encoding with ggml, byte for byte as llama-quantize: {why}")
    see_like(checkpoint, plan.by_name)
    imatrix, output = output_of(checkpoint, plan, imatrix_path, out, how)
    with locked(out.parent):
        return quantize(checkpoint, plan, imatrix, output, GgmlEncoder(), after_layer=after_layer)


def output_of(
    checkpoint: Checkpoint, plan: Plan, imatrix_path: Path, out: Path, how: QuantizeOptions
) -> tuple[dict[str, Importance], Output]:
    """The importance for a plan, and the file that is to be written by it."""
    loaded, info = load_imatrix(imatrix_path)
    imatrix = fit_importance(plan, loaded)
    fingerprint = {"checkpoint": checkpoint.fingerprint(), "plan": plan.digest(), "imatrix": imatrix_digest(imatrix)}
    extra = imatrix_metadata(len(imatrix), info.chunk_count, info.datasets[0] if info.datasets else None)
    return imatrix, Output(out, fingerprint, extra, how.split_max_bytes, how.restart, how.overwrite, how.keep_ledger)


def imatrix_metadata(n_entries: int, n_chunks: int, dataset: str | None) -> dict[str, Any]:
    """The keys that llama-quantize writes too. The name is the one in the folder of `make`, wherever the file lies."""
    named = {
        "quantize.imatrix.file": IMATRIX,
        "quantize.imatrix.entries_count": U32(n_entries),
        "quantize.imatrix.chunks_count": U32(n_chunks),
    }
    return named | ({"quantize.imatrix.dataset": dataset} if dataset else {})


@dataclass(frozen=True)
class SensitivityOptions:
    """What `sensitivity` measures. text: of no given size, FORKED_TOKENS, or with gradients those of a calibration.
    budget: tokens times forks carried through the layers; tier None: full if it allows that; types: to try,
    default DEFAULT, or with gradients EVERY; memory: bytes for an estimate's pass."""

    text: TextChoice = field(default_factory=TextChoice)
    tier: Tier | None = None
    budget: int = 1 << 21
    types: Candidates | None = None
    memory: int | None = None


def measure_sensitivity(
    source: CheckpointSource, basis: Path, folder: Path, how: SensitivityOptions = SensitivityOptions()
) -> Sensitivity:
    """Write sensitivity.json and its heat map. basis: an imatrix, to encode with ggml and measure; or a folder of
    gradients, to estimate for our own encoder. On calibration text: the evaluation text stays unseen."""
    with needs("plots"):
        import matplotlib  # noqa: F401  (missing, it is missed before the long work)
    measured = estimate_damage if basis.is_dir() else _forked
    with locked(folder):
        found = measured(source, basis, how)
        if ranks.index() == 0:
            write_text(folder / SENSITIVITY, found.to_json())
            sensitivity.heat_map(found, folder / "sensitivity.png")
    return found


def estimate_damage(source: CheckpointSource, gradients: Path, how: SensitivityOptions) -> Sensitivity:
    """From a backward pass, in one pass more."""
    text = sized(how.text, source.config, source.device, how.memory)
    tokens = cut(text.corpus("calibration"), source, text).tokens
    with track("estimate", source.config.n_layer, "layers") as advance:
        return estimate(source, gradients, tokens, how.types or EVERY, how.memory, lambda _: advance(1))


def _forked(source: CheckpointSource, imatrix_path: Path, how: SensitivityOptions) -> Sensitivity:
    imatrix, _ = load_imatrix(imatrix_path)
    plan_all = {spec.name: spec for spec in family.specs(source.config)}
    fitted = {
        name: fit(imatrix[name], spec.n_matrices, spec.n_in, name)
        for name, spec in plan_all.items()
        if name in imatrix and len(spec.shape) > 1
    }
    text = how.text if how.text.n_tokens else replace(how.text, n_tokens=FORKED_TOKENS)
    tokens = cut(text.corpus("calibration"), source, text).tokens
    types = how.types or DEFAULT
    chosen, n_chunk = sensitivity.choose_tier(source, tokens, types, how.budget)
    say(f"{how.tier or chosen} tier, {n_chunk * text.chunk:,} tokens a fork")
    with track("sensitivity", source.config.n_layer, "layers") as advance:
        return sensitivity.measure(
            source,
            fitted,
            tokens,
            types,
            tier=how.tier,
            budget=how.budget,
            progress=lambda _: advance(1),
        )


@dataclass(frozen=True)
class VerifyOptions:
    """What `verify` measures. target: refuse types that it cannot compute. score, runtime_tokens, prompts: as in
    `evaluation.verify`. ram: bytes that the streams may use, default what the machine has. configuration: also ask
    transformers whether the original's config.json is read rightly (seconds; `evaluation.configuration`)."""

    text: TextChoice = field(default_factory=lambda: TextChoice(n_tokens=32768))
    target: str | None = None
    score: Score = "half"
    runtime_tokens: int = 0
    prompts: int = 0
    ram: int | None = None
    configuration: bool = False


@torch.inference_mode()
def verify_file(
    path: Path,
    reference: Checkpoint,
    device: str,
    how: VerifyOptions = VerifyOptions(),
    out: Path | None = None,
    passed: ReferencePass | None = None,
    runtime: Opener | None = None,
) -> dict[str, Any]:
    """Perplexity and divergence of a file from the original, on text that calibration never uses. See `verify`.

    out: where to write the figures too. passed: the original's side, if it has run along with another pass.
    runtime: opens the file as a person runs it, for what `how` asks of that.
    """
    original, quantized = source_of(reference, device), open_source(path, device)
    text = how.text.corpus("evaluation")
    chunks = cut(text, original, how.text)
    check_cut_alike(quantized, original, text, path)
    independent = configuration.check(reference.config) if how.configuration else None
    known = passed.scored() if passed else None
    made = verify(quantized, original, chunks, how.target, score=how.score, ram=how.ram, known=known)
    result = made.figures
    if runtime and how.runtime_tokens:
        result["runtime"] = runtime_mode(runtime, made.heads, chunks, how.score, how.runtime_tokens)
    if runtime and how.prompts:
        result["generation"] = generation.check(runtime, original, chunks, how.prompts)
    if independent:
        result["configuration"] = {"status": independent.status, "detail": independent.detail}
    result |= {"text": text.name, "text_sha256": text.digest}
    if out:
        make_folders(out.parent)
        write_json(out, result)
    return result


def check_cut_alike(source: Source, other: Source, text: Corpus, path: Path) -> None:
    """QuantkitError, naming the file of the first, unless both make the same tokens of the text's beginning."""
    sample = text.documents[0].text[:4096]
    if tokenize(other.tokenizer(), sample) != tokenize(source.tokenizer(), sample):
        raise QuantkitError(f"{path}: its tokenizer cuts text differently from {other.name}'s")


def score_by_ggml(
    checkpoint: Checkpoint,
    plan: Plan,
    imatrix_path: Path,
    out: Path,
    device: str,
    evaluation: TextChoice,
    passed: ReferencePass | None = None,
) -> dict[str, Any]:
    """What quantkit's encoder is compared with: the figures of a file of the same types by ggml, which is removed with
    its folder afterwards. Resumes; what is encoded already is not encoded again. passed: as in `verify_file`."""
    out.parent.mkdir(exist_ok=True)
    how = QuantizeOptions(overwrite=True, keep_ledger=True)  # by which a finished file is known again
    files = quantize_model(checkpoint, plan, imatrix_path, out, how, why=BASELINE_WHY)
    scores = verify_file(files[0], checkpoint, device, VerifyOptions(evaluation, plan.target), passed=passed)
    shutil.rmtree(out.parent)
    return scores
