"""`quantkit certify`: is this file right for that target?

Structure and metadata are judged by rule, weights by comparison with the original, and what computes the file by
running it. Every check ends in pass, fail, warn or skip, with its reason; the certificate has passed if
nothing failed and a program has run the file.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from quantkit.errors import QuantkitError, out_of_memory
from quantkit.evaluation import configuration, oracle_checks, structure, vocabulary
from quantkit.evaluation.certificate import Certificate, Check
from quantkit.evaluation.weights import WeightCheck
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.checksums import RunningChecksums
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.tensor_table import TensorTable
from quantkit.models.config import ModelConfig
from quantkit.planning import targets
from quantkit.progress import say
from quantkit.sizes import both_units
from quantkit.tensors import Imatrix, TensorSpec

UNCOMPARED = "weights and tokenizer were not compared with the original"
MISHAPS = (QuantkitError, RuntimeError, OSError, ValueError, KeyError)  # of a computation, by whatever the file holds
SHOWN = 6  # problems spelled out for each check


def certify(
    path: Path,
    target: str,
    reference: TensorTable | None = None,
    imatrix: Imatrix | None = None,
    *,
    oracle: bool = True,
    values: bool = True,
    device: str = "cpu",
) -> Certificate:
    """Run every check that can run. A file that cannot be opened fails the first one, and that is the result.

    reference: the original; without it, a bundled description of the same geometry stands in for its metadata.
    oracle: load and run the file in what the target computes with, where that is installed. values: decode every
    tensor. QuantkitError for an unknown target, or before hours for a QUANTKIT_LLAMA_BIN without llama.cpp, only.
    """
    targets.get(target)
    try:
        file = GGUFFile.open(path)
    except QuantkitError as error:
        size = path.stat().st_size if path.is_file() else 0
        return Certificate(target, {path.name: size}, [Check("files", "fail", str(error))])
    made = Certificate(target, {part.name: part.stat().st_size for part in file.files})
    known, where = structure.known_config(file, reference)
    made.checks += _by_rule(file, target, reference, known, where)
    config = structure.own_config(file)
    checkpoint = reference if isinstance(reference, Checkpoint) else None
    reading = _Reading(file, target, device, begin=oracle and not made.failed(but="types"))
    for line in reading.forecast(values and config is not None, checkpoint):
        say(line)
    crc32 = None
    if config and values:
        check, crc32 = _by_value(made, WeightCheck(file, known or config, checkpoint, imatrix, device), reading)
        made.checks.append(check)
    elif config:
        made.checks.append(Check("weights", "skip", "not asked for (--no-values)"))
    if checkpoint is None:
        made.checks.append(Check("original", "skip", f"{UNCOMPARED}: --reference MODEL, with weights"))
    if made.failed(but="types"):
        made.checks.append(Check("oracle", "skip", "the file has failed already"))
    elif not oracle:
        made.checks.append(Check("oracle", "skip", "not asked for (--no-oracle)"))
    else:
        made.checks += _by_running(path, file, reading)
    if reference is not None and oracle:
        made.checks.append(configuration.check(reference.config))
    made.crc32 = None if made.failed() else crc32
    return made


class _Reading:
    """What one reading of a file is for, besides its weights. begin: the sample that llama.cpp's numbers are compared
    with goes through each layer when its weights have been looked at."""

    def __init__(self, file: GGUFFile, target: str, device: str, begin: bool) -> None:
        self.file, self.target, self.device = file, target, device
        asked = begin and targets.runs_llama_cpp(target)
        self.programs = oracle_checks.Programs.found() if asked else None
        self.n_programs = self.programs.n if self.programs else 0
        self.sample: oracle_checks.SamplePass | None = None
        self.error: BaseException | None = None

    def forecast(self, values: bool, checkpoint: Checkpoint | None) -> Iterator[str]:
        """How much will be read, in lines."""
        uses = ["weights", "checksums"] * values + ["a sample of text"] * bool(self.n_programs)
        if uses:
            beside = f"; beside the weights what {checkpoint.name} has of them" if values and checkpoint else ""
            said = " and ".join(filter(None, [", ".join(uses[:-1]), uses[-1]]))
            yield f"reads {both_units(self.file.n_bytes)} once, for {said}{beside}"
        if self.n_programs:
            yield (
                f"then so does {'each of two programs' if self.n_programs > 1 else 'one program'} of llama.cpp; twice "
                "where the model needs flags, or it fails by its defaults"
            )

    def advance(self, n_layers: int) -> None:
        """The sample is through so many layers. What is wrong with it is said when it is needed."""
        if not self.n_programs or self.error:
            return
        try:
            self.sample = self.sample or oracle_checks.SamplePass(self.file, self.device)
            self.sample.advance(n_layers)
        except (*MISHAPS, MemoryError) as error:
            self.error = error

    def begun(self) -> oracle_checks.Begun | None:
        """What the checks by running need not find again; raises the error that ended the sample's pass."""
        if self.error:
            raise self.error
        return oracle_checks.Begun(self.programs, self.sample) if self.programs else None


def _by_rule(
    file: GGUFFile, target: str, reference: TensorTable | None, known: ModelConfig | None, where: str
) -> Iterator[Check]:
    """known: the numbers that the file must have; where: whose they are."""
    whole = f"{len(file.files)} file(s), {len(file.tensors)} tensors, nothing truncated"
    yield _check("files", structure.files(file), whole)
    if warning := structure.beside(file, target):
        yield Check("folder", "warn", warning)
    compared = f"as in {where}" if known else "consistent; not compared with the original (--reference)"
    yield _check("metadata", structure.metadata(file, known), compared)
    yield _check("tensors", structure.tensors(file, known), "names, shapes and fixed types")
    config = known or structure.own_config(file)
    for caveat in targets.caveats(target, config) if config else ():
        yield Check("target", "warn", caveat)
    if targets.runs_llama_cpp(target) and (
        caveat := targets.aborts_on_amx((t.name, t.qtype) for t in file.tensors.values())
    ):
        told = f"; that is `{targets.AS_OLLAMA} ollama serve`" if target == targets.OLLAMA.name else ""
        yield Check("start", "warn", caveat + told)
    yield _check("types", structure.types(file, target), f"{target} computes all of them, by its table")
    folder = vocabulary.folder_of(reference)
    compared = "consistent" if folder is None else "the original's vocabulary, merges and ids"
    yield _check("tokenizer", vocabulary.tokenizer(file, folder), compared)


def _by_value(made: Certificate, weights: WeightCheck, reading: _Reading) -> tuple[Check, dict[str, int] | None]:
    """Every weight decoded, and what else that reading of the file is for; the figures are left in `made`, also those
    of a reading that memory ended. And checksums, if all of it could be read."""
    file, seen = weights.file, 0

    def visited(spec: TensorSpec, whole: bool) -> None:
        nonlocal seen
        tensor, seen = file.tensors[spec.name], seen + 1
        sums.upto(tensor.file, tensor.offset + tensor.n_bytes)
        if whole and spec.layer is not None and not weights.problems:
            reading.advance(spec.layer + 1)

    try:
        with RunningChecksums(file.files) as sums:
            weights.run(visited)
            crc32 = dict(zip(made.files, sums.finish(), strict=True))
    except QuantkitError as error:
        return Check("weights", "fail", str(error)), None
    except (RuntimeError, MemoryError) as error:
        if not (lacking := out_of_memory(error)):
            raise
        made.weights = weights.report()
        left = f"too little {lacking} after {seen} of {len(weights.specs)} tensors"
        if weights.problems:
            return _check("weights", [*map(str, weights.problems[: SHOWN - 1]), left], ""), None
        return Check("weights", "skip", f"{oracle_checks.NOT_RUN}{left}"), None
    made.weights = weights.report()
    otherwise = "finite, no empty and no doubled matrix; not compared with the original (--reference)"
    if weights.checkpoint is not None:
        otherwise = f"{len(weights.errors)} tensors are the original's within what their types cost"
    return _check("weights", map(str, weights.problems), otherwise), crc32


def _by_running(path: Path, file: GGUFFile, reading: _Reading) -> Iterator[Check]:
    """What was found before an error counts."""
    try:
        yield from oracle_checks.run(path, file, reading.target, reading.device, reading.begun())
    except (*MISHAPS, MemoryError) as error:
        if lacking := out_of_memory(error):
            yield Check("oracle", "skip", f"not run: too little {lacking} for this file's numbers, to compare with")
        else:
            yield Check("oracle", "fail", f"{type(error).__name__}: {error}")


def _check(name: str, problems: Iterable[str], otherwise: str) -> Check:
    """Pass with `otherwise`, or fail with the problems."""
    try:
        found = list(problems)
    except MemoryError:
        return Check(name, "skip", f"{oracle_checks.NOT_RUN}too little memory")
    except QuantkitError as error:
        found = [str(error)]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        found = [f"metadata of the wrong kind: {type(error).__name__}: {error}"]  # anyone may have written the file
    if not found:
        return Check(name, "pass", otherwise)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(name, "fail", "; ".join(found[:SHOWN]) + more)
