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
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.tensor_table import TensorTable
from quantkit.models.config import ModelConfig
from quantkit.planning import targets
from quantkit.tensors import Imatrix

UNCOMPARED = "weights and tokenizer were not compared with the original"
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
    tensor. QuantkitError for an unknown target only.
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
    if config and values:
        made.checks.append(_by_value(made, WeightCheck(file, known or config, checkpoint, imatrix, device)))
    elif config:
        made.checks.append(Check("weights", "skip", "not asked for (--no-values)"))
    if checkpoint is None:
        made.checks.append(Check("original", "skip", f"{UNCOMPARED}: --reference MODEL, with weights"))
    if made.failed(but="types"):
        made.checks.append(Check("oracle", "skip", "the file has failed already"))
    elif not oracle:
        made.checks.append(Check("oracle", "skip", "not asked for (--no-oracle)"))
    else:
        made.checks += _by_running(path, file, target, device)
    if reference is not None and oracle:
        made.checks.append(configuration.check(reference.config))
    return made


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


def _by_value(made: Certificate, weights: WeightCheck) -> Check:
    """Every weight decoded; the figures are left in `made`."""
    try:
        found = weights.run()
    except QuantkitError as error:
        return Check("weights", "fail", str(error))
    made.weights = found.report()
    otherwise = "finite, no empty and no doubled matrix; not compared with the original (--reference)"
    if found.checkpoint is not None:
        otherwise = f"{len(found.errors)} tensors are the original's within what their types cost"
    return _check("weights", map(str, found.problems), otherwise)


def _by_running(path: Path, file: GGUFFile, target: str, device: str) -> Iterator[Check]:
    """What was found before an error counts."""
    try:
        yield from oracle_checks.run(path, file, target, device)
    except (QuantkitError, RuntimeError, OSError, ValueError, KeyError, MemoryError) as error:
        if lacking := out_of_memory(error):
            yield Check("oracle", "skip", f"not run: too little {lacking} for this file's numbers, to compare with")
        else:
            yield Check("oracle", "fail", f"{type(error).__name__}: {error}")


def _check(name: str, problems: Iterable[str], otherwise: str) -> Check:
    """Pass with `otherwise`, or fail with the problems."""
    try:
        found = list(problems)
    except QuantkitError as error:
        found = [str(error)]
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        found = [f"metadata of the wrong kind: {type(error).__name__}: {error}"]  # anyone may have written the file
    if not found:
        return Check(name, "pass", otherwise)
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return Check(name, "fail", "; ".join(found[:SHOWN]) + more)
