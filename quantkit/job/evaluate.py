"""`evaluate`: what a file writes beside its original, side after side, so that only one of them is in memory."""

import gc
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from quantkit import machine
from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
from quantkit.errors import QuantkitError
from quantkit.evaluation.behaviour.compare import findings, rates, words
from quantkit.evaluation.behaviour.items import Amount, Item
from quantkit.evaluation.behaviour.tasks import Tasks
from quantkit.evaluation.behaviour.writing import Notes, announce, score, write
from quantkit.evaluation.weights import ALIKE, SAMPLE_ROWS, WeightCheck
from quantkit.formats.byte_source import open_regular
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.model_names import is_gguf
from quantkit.formats.whole_file import check_writable, write_json
from quantkit.job.asked import check_evaluation_output
from quantkit.job.finished import place_of
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.progress import say
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.tensors import TensorSpec

LARGEST = 8 << 30  # bytes of an original as float32, up to which it is written as a file and generates here
EVALUATE = "evaluate.json"
MOST_OF_HEAD = 1 << 16  # bytes of the line that says what continuations are of
LOWER = 0.3  # of scores between 0 and 1, by which a bias keeps an expert from being chosen
EXACT = (
    'name = "f32"\ndescription = "the original"\ntarget = "llama.cpp"\nmla = "split"\n'
    '[[rules]]\nmatch = "*"\nqtype = "F32"\nwhy = "nothing is rounded"\n'
)


@dataclass(frozen=True)
class EvaluateOptions:
    """How much is written; where the models run, and in how many bytes of RAM. engine: opens one for sequences of so
    many tokens."""

    engine: Callable[[GGUFWeights, int], Engine]
    amount: Amount = field(default_factory=Amount)
    device: str = "cpu"
    ram: int | None = None


def evaluate(path: Path, reference: str, how: EvaluateOptions, out: Path) -> dict[str, Any]:
    """evaluate.json's content, written to `out`; continuations lie beside it, so that a stopped run goes on.
    QuantkitError if the two are not one model, or the original cannot generate here."""
    check_writable(out)
    checkpoint = None if is_gguf(reference) else open_weights(reference)
    weights = open_gguf(path, how.device, ram=how.ram)
    file, config, tokenizer = weights.file, weights.config, weights.tokenizer()
    _check_alike(path, reference, config.n_vocab, config.d, checkpoint)
    amount = Amount(how.amount.continuations, how.amount.n_tokens, min(how.amount.context, config.n_context))
    items = Tasks(file.metadata, tokenizer, config.bos, amount).items()
    capacity = max(len(item.prompt) + item.n_tokens for item in items) + 1
    _check_room(capacity, config.n_context, how.amount, out)
    whose = checkpoint.fingerprint() if checkpoint else GGUFFile.open(Path(reference)).fingerprint()
    asked = hashlib.sha256(repr(items).encode()).hexdigest()  # another chat template or version asks something else
    about = {"original": whose, "amount": asdict(amount), "asked": asked}
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8]
    theirs = Notes(out.with_name(f"evaluate-original-{name}.jsonl"), about)  # other files are compared with the same
    ours = Notes(out.with_suffix(".jsonl"), about | {"file": file.fingerprint()}, alone=True)
    long = [item for item in items if item.kind in ("text", "chat", "code")]
    if _left(items, theirs):
        with _original(reference, checkpoint, how, capacity) as engine:
            _write("original", engine, items, theirs)
        gc.collect()  # before the other one is opened
    unread = [item for item in long if f"nll/{item.key}" not in ours.found and theirs.written(item).tokens]
    if _left(items, ours) or unread:
        engine = how.engine(weights, capacity)
        _write("file", engine, items, ours, sum(len(theirs.written(item).tokens) for item in unread))
        score(engine, long, theirs, ours)
    found, nll = rates(items, theirs, ours, tokenizer), words(long, theirs, ours)
    dropped = dropped_experts(file, checkpoint)
    result = {
        "file": path.name,
        "reference": Path(reference).name,
        **asdict(amount),
        "findings": findings(found, nll, dropped),
        "words": nll,
        "rates": [rate.figures() for rate in found],
    }
    write_json(out, result)
    return result


def place_of_evaluation(file: Path) -> Path:
    """evaluate.json beside a model; evaluate-NAME.json if that, or what a stopped run left of it, is of another."""
    place = place_of(EVALUATE, file)
    if place.name == EVALUATE and not place.exists() and (left := place.with_suffix(".jsonl")).exists():
        with os.fdopen(open_regular(left), "rb") as notes:
            if f'"file": "{GGUFFile.open(file).fingerprint()}"'.encode() not in notes.readline(MOST_OF_HEAD):
                return place.with_name(f"{place.stem}-{file.stem}.json")
    return place


def _left(items: Sequence[Item], notes: Notes) -> list[Item]:
    return [item for item in items if item.key not in notes.found]


def _write(side: str, engine: Engine, items: Sequence[Item], notes: Notes, n_read: int = 0) -> None:
    if left := _left(items, notes):
        if len(left) < len(items):
            say(f"{side}: {len(items) - len(left):,} of {len(items):,} continuations are there already")
        announce(side, engine, left, n_read)
        write(side, engine, items, notes)


def _check_room(capacity: int, n_context: int, amount: Amount, out: Path) -> None:
    if capacity > n_context:
        raise QuantkitError(
            f"--tokens {amount.n_tokens} --context {amount.context}: a prompt and its continuation take {capacity:,} "
            f"tokens, more than the {n_context:,} that the model was made for"
        )
    check_evaluation_output(out)


def _check_alike(path: Path, reference: str, n_vocab: int, d: int, checkpoint: Checkpoint | None) -> None:
    theirs = (
        family.from_hf(checkpoint.config) if checkpoint else family.from_gguf(GGUFFile.open(Path(reference)).metadata)
    )
    if (theirs.n_vocab, theirs.d) != (n_vocab, d):
        raise QuantkitError(
            f"{path.name} has {n_vocab} tokens and width {d}, {reference} {theirs.n_vocab} and {theirs.d}: they are "
            "not one model; give --reference the original"
        )


@contextmanager
def _original(reference: str, checkpoint: Checkpoint | None, how: EvaluateOptions, capacity: int) -> Iterator[Engine]:
    """An engine of the original: a GGUF as it is, a small checkpoint as a float32 file that is removed afterwards."""
    if checkpoint is None:
        weights = open_gguf(Path(reference), how.device, ram=how.ram)
        yield how.engine(weights, capacity)
        return
    specs = family.specs(family.from_hf(checkpoint.config))
    size = 4 * sum(spec.n_weights for spec in specs)
    if size > LARGEST:
        raise QuantkitError(
            f"--reference {reference}: {size / 1e9:,.0f} GB as float32, too large to generate with here; give a GGUF "
            "of it, like R1-Q8_0.gguf, or one of those that you compare with"
        )
    with tempfile.TemporaryDirectory(prefix="quantkit-original-") as folder:
        recipe = Path(folder, "f32.toml")
        recipe.write_text(EXACT)
        plan = make_plan(specs, Recipe.load(recipe), model="original")
        files = quantize(
            checkpoint, plan, {}, Output(Path(folder, "f32.gguf")), GgmlEncoder(), workers=machine.threads()
        )
        yield how.engine(open_gguf(files[0], how.device), capacity)


def dropped_experts(file: GGUFFile, checkpoint: Checkpoint | None) -> list[str]:
    """Experts that are not there, or that the router cannot reach as it reaches the original's: by name. Reads a few
    rows of each, and routers whole."""
    check = WeightCheck(file, family.from_gguf(file.metadata))
    out = []
    for spec in check.specs:
        if not spec.role.endswith("_exps"):
            continue
        rows = spec.n_rows // spec.n_matrices
        for i in range(spec.n_matrices):
            part = check.decoded(spec, i * rows, i * rows + min(SAMPLE_ROWS, rows))
            if not bool(part.any()):
                out.append(f"{spec.name} expert {i}: all zeros: the expert is dropped")
    if checkpoint is not None:
        routers = WeightCheck(file, family.from_gguf(file.metadata), checkpoint)
        out += [line for spec in routers.specs for line in _unreachable(routers, spec)]
    return out


def _unreachable(check: WeightCheck, spec: TensorSpec) -> list[str]:
    """Of one tensor of a router. Tuning moves it a little."""
    if spec.role not in ("ffn_gate_inp", "exp_probs_b"):
        return []
    parts = list(family.slices(spec))
    ours = torch.cat([check.decoded(spec, *part).flatten() for part in parts])
    theirs = torch.cat([check.original(spec, *part).flatten() for part in parts])
    if spec.role == "exp_probs_b":
        bad = ((theirs - ours) > LOWER) | ~ours.isfinite()
        what = "biased against by {:.2f} more than in the original: the router drops it"
        told = theirs - ours
    else:
        told = torch.nn.functional.cosine_similarity(ours.reshape(-1, spec.n_in), theirs.reshape(-1, spec.n_in))
        bad = ~(told > ALIKE)
        what = "its row of the router is another one (cosine {:.2f}): the router does not find it"
    return [f"{spec.name} expert {i}: {what.format(float(told[i]))}" for i in bad.nonzero().flatten().tolist()]
