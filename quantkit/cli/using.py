"""Commands for finished files: judge them, run them, hand them on."""

import logging
import os
import sys
from collections.abc import Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from rich.console import Console

from quantkit.cli import options, streams
from quantkit.cli.options import FILE, FOLDER, MODEL_FILE, OUT, TOKENS, Finite, Placement, Shared
from quantkit.errors import QuantkitError, needs

if TYPE_CHECKING:
    from quantkit.job.certify import CertifyOptions
    from quantkit.job.publish.upload import Destination
    from quantkit.job.stages import VerifyOptions
    from quantkit.runtime.generate import Sampling
    from quantkit.serving.chat import Conversation


@click.command()
@click.argument("path")
def inspect(path: str) -> None:
    """What a checkpoint (folder, bundled name or Hub id) or a GGUF file holds, from headers alone."""
    from quantkit.job.inspect import describe

    streams.show(describe(path))


@click.command()
def families() -> None:
    """Which models are supported, how well, and which come along for `plan` without weights."""
    from quantkit.job.families import describe

    streams.show(describe())


def _verify_options(target: str | None, memory: int | None, **rest: Any) -> "VerifyOptions":
    """rest: fields of VerifyOptions, by their names."""
    from quantkit.job.stages import VerifyOptions
    from quantkit.planning import targets

    name = targets.parse(target).name if target else None
    return VerifyOptions(target=name, ram=memory, configuration=True, **rest)


@click.command()
@click.argument("file", type=MODEL_FILE)
@click.option("--reference", default="tiny-r1", show_default=True, metavar="MODEL", help="The original.")
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
@click.option("--json", "out", type=OUT, default=None, help="Write the figures here.")
@options.device
@options.threads
def verify(file: Path, reference: str, how: "VerifyOptions", out: Path | None, device: str | None) -> None:
    """Measure perplexity and KL divergence of a GGUF from the original, both streamed layer by layer side by side."""
    from quantkit.evaluation.summary import short_table
    from quantkit.formats.lock import locked
    from quantkit.job import stages
    from quantkit.machine import chosen_device
    from quantkit.models.open import open_weights
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.gguf import open_gguf

    device = chosen_device(device)
    original = open_weights(reference)
    runtime = partial(open_engine, open_gguf(file, device), 1) if how.runtime_tokens or how.prompts else None
    with locked(out.parent, shared=True) if out else nullcontext():
        result = stages.verify_file(file, original, device, how, out, runtime=runtime)
    streams.show(short_table(result, file))
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
            help="Default: what the file says that it was made for.",
        ),
        click.option(
            "--reference", default=None, metavar="MODEL", help="The original; without it weights are not compared."
        ),
        click.option("--imatrix", type=FILE, default=None, help="Also weigh errors by importance."),
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
    help="Default: certify.json beside FILE; certify-TARGET.json if it was made for another.",
)
@options.device
def certify(file: Path, how: "CertifyOptions", out: Path | None, device: str | None) -> None:
    """Is this file right for that target? A table of checks, certify.json, and exit code 1 if one fails.

    FILE may be the folder that `make` left."""
    from quantkit.formats.lock import locked
    from quantkit.job.certify import certify_file
    from quantkit.machine import chosen_device

    with locked((out or file).parent, shared=True):
        made, out = certify_file(file, chosen_device(device), out, how)
    Console().print(made.table())
    streams.show(f"{made.target}: {made.verdict} ({out})")
    sys.exit(0 if made.passed else 1)


@click.command("export-kt")
@click.argument("file", type=MODEL_FILE)
@click.option(
    "--output", "-o", default=None, type=options.Place(path_type=Path), help="Folder. Default: NAME-kt beside it."
)
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="Share the layers out over N GPUs.")
@click.option(
    "--linear",
    default="marlin",
    show_default=True,
    type=click.Choice(["marlin", "torch"]),
    help="Attention and shared experts on the GPU: packed to 4 bits at load, or BF16.",
)
def export_kt(file: Path, output: Path | None, gpus: int, linear: Literal["marlin", "torch"]) -> None:
    """Write what KTransformers needs to run FILE: optimize rules, attn_kv_b for 0.3.1 and earlier, configuration,
    tokenizer and a launch script. Refuses files with types that KTransformers cannot compute."""
    from quantkit.job import kt_export

    output = output or kt_export.default_output(file)
    made = kt_export.export(file, output, gpus=gpus, linear=linear)
    streams.show(f"{made}\nstart it with {made / kt_export.LAUNCH} chat")


@click.command()
@click.argument("folder", type=FOLDER)
def report(folder: Path) -> None:
    """One page about the FOLDER that `make` left, without outside requests, and its figures as PNGs."""
    with needs("plots"):
        from quantkit.formats.lock import locked
        from quantkit.job.report import write_report

    with locked(folder, shared=True):
        streams.show("\n".join(map(str, write_report(folder))))


def _text(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    return None if value is None else streams.text_of(value, "--prompt")


def _sampling(**given: Any) -> "Sampling":
    """given: fields of Sampling, by their names."""
    from quantkit.runtime.generate import Sampling

    return Sampling(**given)


@click.command()
@click.argument("file", type=MODEL_FILE)
@click.option(
    "-p", "--prompt", default=None, callback=_text, help="Continue this text; without it: a chat on the terminal."
)
@click.option("--chat", is_flag=True, help="Put the prompt through the file's chat template.")
@click.option(
    "--thinking/--no-thinking", default=None, help="In a chat: whether to reason, where the template has a switch."
)
@click.option("-n", "--n-tokens", default=None, type=click.IntRange(1), help="Default: 128; in a chat, the context.")
@click.option("--context", "-c", default="4k", show_default=True, type=TOKENS, help="Tokens in all.")
@Shared(
    (
        click.option("--temperature", "--temp", default=0.6, show_default=True, type=Finite(0), help="0 for greedy."),
        click.option("--top-p", default=0.95, show_default=True, type=Finite(0, 1)),
        click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all tokens."),
        click.option("--min-p", default=0.0, show_default=True, type=Finite(0, 1)),
        click.option("--seed", default=0, show_default=True, type=options.SEED),
    ),
    "sampling",
    _sampling,
)
@options.placement
@options.threads
def run(
    file: Path,
    prompt: str | None,
    chat: bool,
    thinking: bool | None,
    n_tokens: int | None,
    context: int,
    sampling: "Sampling",
    placement: Placement,
) -> None:
    """Generate text with a GGUF, or chat with it: on the GPU if there is one, experts that do not fit on the CPU."""
    from quantkit.machine import chosen_device
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.gguf import open_gguf
    from quantkit.serving.chat import Conversation
    from quantkit.serving.template import reasoning

    if thinking is not None and prompt is not None and not chat:
        raise QuantkitError("--thinking is for chats: add --chat, which puts the prompt through the chat template")
    show_placement()
    weights = open_gguf(file, chosen_device(placement.device), ram=placement.ram)
    given = {} if thinking is None else reasoning(weights.file.metadata, thinking)
    talk = Conversation(weights, open_engine(weights, 1, context, placement.gpu_layers), sampling, given)
    if prompt is None:
        return chat_on_terminal(talk, n_tokens or context)
    if chat:
        show_answer(talk.ask(prompt, n_tokens or 128))
    else:
        show_answer((piece, False) for piece in talk.complete(prompt, n_tokens or 128))
    click.echo(talk.speed, err=True)


def show_placement() -> None:
    """From here on the runtime tells where it put the layers."""
    logger = logging.getLogger("quantkit.runtime")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)


def show_answer(pieces: Iterator[tuple[str, bool]]) -> None:
    """Print pieces of an answer as they come, reasoning dimmed (on a terminal)."""
    try:
        for piece, thought in pieces:
            piece = streams.harmless(piece)
            click.echo(click.style(piece, dim=True) if thought and piece else piece, nl=False)
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
    click.echo()


def chat_on_terminal(talk: "Conversation", n_tokens: int) -> None:
    """Read a line, answer, until /exit or Ctrl-D. Ctrl-C ends only the answer under way."""
    click.echo("/clear forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops an answer", err=True)
    while True:
        click.echo("> ", nl=False, err=True)
        if not (line := sys.stdin.readline()) or line.strip() == "/exit":
            return
        if line.strip() == "/clear":
            talk.messages = []
        elif line.strip():
            try:
                show_answer(talk.ask(streams.text_of(line.strip(), "stdin"), n_tokens))
                click.echo(click.style(talk.speed, dim=True), err=True)
            except KeyboardInterrupt:
                click.echo("\n(stopped)", err=True)
            except QuantkitError as error:
                click.echo(f"{error}; /clear starts anew", err=True)


@dataclass(frozen=True)
class Door:
    """Where requests come in, the key that they have to bring, and how many may wait."""

    host: str
    port: int
    api_key: str | None
    queue: int


@click.command()
@click.argument("file", type=MODEL_FILE)
@Shared(
    (
        click.option(
            "--host",
            default="127.0.0.1",
            show_default=True,
            metavar="ADDRESS[,NAME]...",
            help="Listen here; others can reach 0.0.0.0. NAME: clients may call it so too.",
        ),
        click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one."),
        click.option(
            "--api-key",
            default=lambda: os.environ.get("QUANTKIT_API_KEY"),  # click would take an empty one for none
            help="Ask for it; or in $QUANTKIT_API_KEY. none: whoever reaches it may ask.",
        ),
        click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that may wait."),
    ),
    "door",
    Door,
)
@click.option("--context", "-c", default="4k", show_default=True, type=TOKENS, help="Tokens of a sequence.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1), help="Sequences decoded at once.")
@options.placement
@options.threads
def serve(file: Path, door: Door, context: int, parallel: int, placement: Placement) -> None:
    """Serve a GGUF to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models."""
    from quantkit.machine import chosen_device
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.gguf import open_gguf

    with needs("serve"):
        from quantkit.serving import http
        from quantkit.serving.gate import Gate

    host, *names = door.host.split(",")
    gate = Gate.of(host, names, door.api_key)
    show_placement()
    weights = open_gguf(file, chosen_device(placement.device), ram=placement.ram)
    engine = open_engine(weights, parallel, context, placement.gpu_layers)
    http.serve(weights, engine, host, door.port, http.Limits(queue=door.queue), gate)


def _target(**given: Any) -> "Destination":
    """given: fields of Destination, by their names."""
    from quantkit.job.publish.upload import Destination

    return Destination(**given)


@click.command()
@click.argument("folder", type=FOLDER)
@Shared(
    (
        click.option("--repo", required=True, metavar="USER/NAME", help="Model repository; made if it is new."),
        click.option("--private", is_flag=True, help="If the repository is new, only you can see it."),
        click.option("--pr", is_flag=True, help="Open a pull request instead of committing."),
    ),
    "to",
    _target,
)
@click.option("--name", default=None, help="Folder in the repository. Default: the recipe's name.")
@click.option("--base-model", default=None, metavar="USER/NAME", help="Default: where the checkpoint came from.")
@click.option("--license", "license_name", default=None, help="Default: the base model's.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
@click.option("--force", is_flag=True, help="Publish what is incomplete or not certified.")
def publish(
    folder: Path,
    to: "Destination",
    name: str | None,
    base_model: str | None,
    license_name: str | None,
    dry_run: bool,
    force: bool,
) -> None:
    """Upload what `make` left in FOLDER, with a model card. Resumes; several quantizations share a repository."""
    from quantkit.formats.lock import locked
    from quantkit.job.publish.folder import read_folder
    from quantkit.job.publish.upload import Uploader

    with locked(folder, shared=True):  # a job must not change what is being uploaded
        quant = read_folder(folder, name)
        if quant.problems and not force:
            why = "; ".join(quant.problems)
            raise QuantkitError(f"{folder}: not published: {why} (--force publishes it all the same)")
        uploader = Uploader(quant, to, base_model, license_name)
        if dry_run:
            rows = [f"{path.stat().st_size:>18,}  {stored}" for stored, path in quant.files.items()]
            streams.show("\n".join([*rows, "", uploader.card(uploader.present())]))
        else:
            streams.show(uploader.run())
