"""Commands that judge finished files: verify, certify, evaluate, compare."""

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from quantkit.cli import options, streams
from quantkit.cli.options import Shared
from quantkit.cli.values import IMATRIX, MODEL, MODEL_FILE, OUT, OUT_FOLDER, WEIGHTS
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.calibration.corpus import TextChoice
    from quantkit.job.certify import CertifyOptions
    from quantkit.job.evaluate import EvaluateOptions
    from quantkit.job.stages import VerifyOptions
    from quantkit.runtime.generate import Engine
    from quantkit.runtime.sources.gguf import GGUFWeights


def _verify_options(target: str | None, memory: int | None, **rest: Any) -> "VerifyOptions":
    """rest: fields of VerifyOptions, by their names."""
    from quantkit.job.stages import VerifyOptions
    from quantkit.planning import targets

    name = targets.parse(target).name if target else None
    return VerifyOptions(target=name, ram=memory, configuration=True, **rest)


@click.command()
@click.argument("file", type=MODEL_FILE)
@click.option("--reference", type=WEIGHTS, default="tiny-r1", show_default=True, metavar="MODEL", help="The original.")
@Shared(
    (
        options.text(32768, "evaluation"),
        options.target,
        click.option(
            "--score",
            type=click.Choice(["half", "all"]),
            default="half",
            show_default=True,
            help="half: the second half of each chunk, as llama-perplexity.",
        ),
        click.option(
            "--runtime-tokens",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Also compute this many tokens one by one, as `run` does, and compare.",
        ),
        click.option(
            "--prompts",
            default=0,
            show_default=True,
            type=click.IntRange(0),
            help="Also continue this many texts: greedy agreement with the original, and loops.",
        ),
        options.memory,
    ),
    "how",
    _verify_options,
)
@click.option(
    "--json",
    "out",
    type=OUT,
    default=None,
    help="Where to write the figures. Default: verify.json beside FILE; verify-FILE.json if that is of another file or "
    "original.",
)
@options.device
@options.threads
def verify(file: Path, reference: str, how: "VerifyOptions", out: Path | None, device: str | None) -> None:
    """Measure perplexity and KL divergence of a GGUF from the original, both streamed layer by layer side by side.

    FILE may be the folder that `make` left. The figures also go to verify.json, from which `report` draws."""
    from quantkit.evaluation.summary import short_table
    from quantkit.formats.lock import locked
    from quantkit.formats.whole_file import check_writable
    from quantkit.job import finished, stages
    from quantkit.machine import chosen_device
    from quantkit.models.open import open_weights
    from quantkit.runtime.engines.open import opener
    from quantkit.runtime.sources.gguf import open_gguf

    device = chosen_device(device)
    original = open_weights(reference)
    runtime = opener(open_gguf(file, device)) if how.runtime_tokens or how.prompts else None
    if out:
        check_writable(out)
    out = out or finished.place_of_scores(file, original.fingerprint())
    with locked(out.parent, shared=True) if out else nullcontext():
        result = stages.verify_file(file, original, device, how, runtime=runtime)
        if out:
            finished.keep_scores(out, result, how.text, original.fingerprint())
    streams.show(short_table(result, file) + (f"\nfigures     {out}" if out else ""))
    if result["configuration"]["status"] == "fail":  # then the scores are of another model
        sys.exit(1)


def _certify_options(**given: Any) -> "CertifyOptions":
    """given: fields of CertifyOptions, by their names."""
    from quantkit.job.certify import CertifyOptions

    return CertifyOptions(**given)


@click.command()
@click.argument("file", type=MODEL_FILE)
@Shared(
    (
        click.option(
            "--target",
            default=None,
            metavar="ktransformers|llama.cpp|ollama",
            callback=options.check_target,
            help="Default: what the file says that it was made for.",
        ),
        click.option(
            "--reference",
            type=MODEL,
            default=None,
            metavar="MODEL",
            help="The original; without it weights are not compared.",
        ),
        click.option("--imatrix", type=IMATRIX, default=None, help="Also weigh errors by importance."),
        click.option(
            "--oracle/--no-oracle", default=True, help="Also run the file in the target's program, if installed."
        ),
        click.option("--values/--no-values", default=True, help="Decode every tensor."),
    ),
    "how",
    _certify_options,
)
@click.option(
    "--json",
    "out",
    type=OUT,
    default=None,
    help="Default: certify.json beside FILE; certify-TARGET.json if it was made for another target; with -FILE if "
    "there is one of another file.",
)
@options.device
def certify(file: Path, how: "CertifyOptions", out: Path | None, device: str | None) -> None:
    """Is this file right for that target? A table of checks, certify.json, and exit code 1 if one fails; whether a
    program has run the file is another question: `passed` there.

    FILE may be the folder that `make` left."""
    from quantkit.formats.lock import locked
    from quantkit.job.certify import certify_file
    from quantkit.machine import chosen_device

    with locked((out or file).parent, shared=True):
        made, out = certify_file(file, chosen_device(device), out, how)
    Console().print(made.table())
    streams.show(f"{made.target}: {made.verdict} ({out})")
    sys.exit(1 if made.failed() else 0)


def _evaluation_output(_: click.Context, __: click.Parameter, value: Path | None) -> Path | None:
    """Refuses, before torch is loaded, a name that something else will have."""
    from quantkit.job.asked import check_evaluation_output

    check_evaluation_output(value)
    return value


def _evaluate_options(continuations: int, tokens: int, context: int, **rest: Any) -> "EvaluateOptions":
    """rest: `parallel` and `placement`."""
    from quantkit.evaluation.behaviour.items import Amount
    from quantkit.job.evaluate import EvaluateOptions
    from quantkit.machine import chosen_device
    from quantkit.runtime.engines.open import open_engine

    place, amount = rest["placement"], Amount(continuations, tokens, context)

    def engine(weights: "GGUFWeights", capacity: int) -> "Engine":
        return open_engine(weights, rest["parallel"], capacity, place.gpu_layers)

    return EvaluateOptions(engine, amount, chosen_device(place.device), place.ram)


@click.command()
@click.argument("file", type=MODEL_FILE)
@click.option(
    "--reference",
    type=WEIGHTS,
    default="tiny-r1",
    show_default=True,
    metavar="MODEL",
    help="The original: a small checkpoint, or a GGUF of it, like Q8_0.",
)
@Shared(
    (
        click.option(
            "--continuations",
            "-n",
            default=500,
            show_default=True,
            type=click.IntRange(1, 100_000),
            help="Sampled ones of texts and chats; greedy ones, code, sums, calls and needles come with them.",
        ),
        click.option(
            "--tokens", default=256, show_default=True, type=click.IntRange(32), help="Of a continuation, at most."
        ),
        click.option(
            "--context", "-c", default="2k", show_default=True, type=options.TOKENS, help="Of the longest needle."
        ),
        click.option(
            "--parallel", default=8, show_default=True, type=click.IntRange(1), help="Sequences decoded at once."
        ),
        options.placement,
    ),
    "how",
    _evaluate_options,
)
@click.option(
    "--json",
    "out",
    type=OUT,
    default=None,
    callback=_evaluation_output,
    help="Default: evaluate.json beside FILE; evaluate-FILE.json if that is of another.",
)
@options.threads
def evaluate(file: Path, reference: str, how: "EvaluateOptions", out: Path | None) -> None:
    """Does it loop, end its reasoning, write code, add, find a needle? What FILE writes, beside what its original
    writes; exit code 1 if it is worse."""
    from quantkit.evaluation.behaviour.compare import table
    from quantkit.formats.lock import locked
    from quantkit.job.evaluate import evaluate as evaluate_file
    from quantkit.job.evaluate import place_of_evaluation

    out = out or place_of_evaluation(file)
    with locked(out.parent, shared=True):
        found = evaluate_file(file, reference, how, out)
    Console(width=110).print(table(found))
    nll = found["words"]
    if nll:
        streams.show(
            f"the original's words: {nll['nll']:.3f} nats a token, {nll['nll_reference']:.3f} to itself "
            f"({nll['tokens']:,} tokens)"
        )
    for line in found["findings"]:
        streams.show(f"worse: {line}")
    streams.show(f"{'worse than' if found['findings'] else 'no worse than'} the original ({out})")
    sys.exit(1 if found["findings"] else 0)


@click.command()
@click.argument("files", type=MODEL_FILE, nargs=-1, required=True, metavar="FILE...")
@click.option("--reference", type=MODEL, default=None, metavar="MODEL", help="The original; default: types and bytes.")
@options.text(32768, "evaluation")
@options.memory
@click.option(
    "--output",
    "-o",
    type=OUT_FOLDER,
    default=None,
    help="Folder for compare.json, compare.md, compare.png and what is done already. Default, with scores: compare.",
)
@options.as_json
@options.device
@options.threads
def compare(
    files: tuple[Path, ...],
    reference: str | None,
    text: "TextChoice",
    memory: int | None,
    output: Path | None,
    as_json: bool,
    device: str | None,
) -> None:
    """Files of anybody side by side: types, bytes, and with --reference KL divergence, top-1 and perplexity on the same
    tokens, as `verify` measures them. Without it --data gives perplexities alone. Resumes. Exit code 1 if none could be
    scored."""
    from quantkit.job import headers
    from quantkit.job.report import files as report_files

    opened = headers.opened(files)
    by_headers = reference is None and not text.data
    if by_headers:
        found = headers.tables(opened)
    else:
        from quantkit.formats.lock import locked
        from quantkit.job.compare import CompareOptions, scored_tables
        from quantkit.machine import chosen_device
        from quantkit.models.open import open_weights

        output = output or Path("compare")
        how = CompareOptions(text, output, chosen_device(device), memory)
        original = open_weights(reference) if reference else None
        with locked(output):
            found = scored_tables(opened, original, how)
    page = report_files.text(found, opened)
    made = report_files.write(found, page, output) if output else []
    if as_json:
        streams.show_json(found)
    else:
        streams.show("\n".join([page, *map(str, made)]).rstrip())
    if not by_headers and not any(one["scores"] for one in found["files"]):
        raise QuantkitError("no file was scored; why stands beside each")
