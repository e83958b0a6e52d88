"""Commands for finished files: judge them, run them, hand them on."""

import contextlib
import sys
from pathlib import Path

import click
from rich.console import Console

from quantkit import sizes
from quantkit.cli import options
from quantkit.cli.options import FILE, FOLDER, OUT, parse_size
from quantkit.errors import QuantkitError


@click.command()
@click.argument("path")
def inspect(path):
    """What a checkpoint (folder, bundled name or Hub id) or a GGUF file holds, from headers alone."""
    from quantkit.job.inspect import describe

    Console(width=100).print(describe(path), markup=False, highlight=False)


@click.command()
@click.argument("file", type=FILE)
@click.option("--reference", default="tiny-r1", show_default=True, metavar="MODEL", help="The original.")
@click.option(
    "--text", "data", multiple=True, metavar="[DOMAIN=]TEXT", help="Evaluation text. Default: the bundled mix."
)
@click.option("--tokens", default=32768, show_default=True, type=click.IntRange(1))
@options.common_text
@options.target
@click.option(
    "--score",
    type=click.Choice(["half", "all"]),
    default="half",
    show_default=True,
    help="half: the second half of each chunk, as llama-perplexity.",
)
@click.option(
    "--runtime-tokens",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Also compute this many tokens one by one, as `run` does, and compare.",
)
@click.option(
    "--prompts",
    default=0,
    show_default=True,
    type=click.IntRange(0),
    help="Also continue this many texts: greedy agreement with the original, and loops.",
)
@click.option("--memory", default=None, metavar="SIZE", help="Memory for the streams, like 16G. Default: all.")
@click.option("--json", "out", type=OUT, default=None, help="Write the figures here.")
@options.device
def verify(
    file,
    reference,
    data,
    tokens,
    column,
    chunk,
    from_start,
    target,
    score,
    runtime_tokens,
    prompts,
    memory,
    out,
    device,
):
    """Measure perplexity and KL divergence of a GGUF from the original, both streamed layer by layer side by side."""
    from quantkit.evaluation.summary import short_table
    from quantkit.job import make as pipeline

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    original = pipeline.open_weights(reference)
    result = pipeline.verify_file(
        file,
        original,
        choice,
        device or pipeline.default_device(),
        target,
        out,
        score=score,
        runtime_tokens=runtime_tokens,
        prompts=prompts,
        ram=parse_size(memory, "--memory") if memory else None,
    )
    click.echo(short_table(result, file))


@click.command()
@click.argument("file", type=FILE)
@click.option("--target", default="llama.cpp", show_default=True, metavar="ktransformers|llama.cpp|ollama")
@click.option("--reference", default=None, metavar="MODEL", help="The original; without it weights are not compared.")
@click.option("--imatrix", type=FILE, default=None, help="Also weigh errors by importance.")
@click.option("--engine/--no-engine", default=True, help="Load and run the file in the engine, if it is installed.")
@click.option("--values/--no-values", default=True, help="Decode every tensor.")
@click.option("--json", "out", type=OUT, default=None, help="Default: certify.json beside FILE.")
@options.device
def certify(file, target, reference, imatrix, engine, values, out, device):
    """Is this file right for that engine? A table of checks, certify.json, and exit code 1 if one fails."""
    from quantkit.job import make as pipeline

    made = pipeline.certify_file(
        file,
        target,
        reference,
        imatrix,
        out or file.with_name(pipeline.CERTIFY),
        engine=engine,
        values=values,
        device=device or pipeline.default_device(),
    )
    Console(width=110).print(made.table())
    sys.exit(0 if made.passed else 1)


@click.command("export-kt")
@click.argument("file", type=FILE)
@click.option(
    "--output", "-o", default=None, type=click.Path(path_type=Path), help="Folder. Default: NAME-kt beside it."
)
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="Share the layers out over N GPUs.")
@click.option(
    "--linear",
    default="marlin",
    show_default=True,
    type=click.Choice(["marlin", "torch"]),
    help="Attention and shared experts on the GPU: packed to 4 bits at load, or BF16.",
)
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads. Default: this machine's cores.")
def export_kt(file, output, gpus, linear, threads):
    """Write what KTransformers needs to run FILE: optimize rules, attn_kv_b for 0.3.1 and earlier, configuration,
    tokenizer and a launch script. Refuses files with types that KTransformers cannot compute."""
    from quantkit.job import kt_export

    output = output or kt_export.default_output(file)
    made = kt_export.export(file, output, gpus=gpus, linear=linear, threads=threads)
    click.echo(f"{made}\nstart it with {made / kt_export.LAUNCH} chat")


@click.command()
@click.argument("folder", type=FOLDER)
def report(folder):
    """One page about the FOLDER that `make` left, without outside requests, and its figures as PNGs."""
    from quantkit.job.report import write_report

    click.echo("\n".join(map(str, write_report(folder))))


@click.command()
@click.argument("file", type=FILE)
@click.option("-p", "--prompt", default=None, help="Continue this text; without it: a chat on the terminal.")
@click.option("--chat", is_flag=True, help="Put the prompt through the file's chat template.")
@click.option("-n", "--n-tokens", default=None, type=click.IntRange(1), help="Default: 128; in a chat, the context.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(2), help="Tokens in all.")
@click.option("--temperature", default=0.6, show_default=True, type=click.FloatRange(0), help="0 for greedy.")
@click.option("--top-p", default=0.95, show_default=True, type=click.FloatRange(0, 1))
@click.option("--top-k", default=0, show_default=True, type=click.IntRange(0), help="0: all tokens.")
@click.option("--min-p", default=0.0, show_default=True, type=click.FloatRange(0, 1))
@click.option("--seed", default=0, show_default=True)
@options.run_ram
@options.device
@options.gpu_layers
def run(file, prompt, chat, n_tokens, context, temperature, top_p, top_k, min_p, seed, ram, device, gpu_layers):
    """Generate text with a GGUF, or chat with it: on the GPU if there is one, experts that do not fit on the CPU."""
    from quantkit.job import make as pipeline
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.generate import Sampling
    from quantkit.runtime.sources.weights import open_gguf
    from quantkit.serving.chat import Conversation

    how = Sampling(temperature, top_p, seed, top_k, min_p)
    limit = sizes.parse_size(ram, "--ram") if ram else None
    weights = open_gguf(file, device or pipeline.default_device(), ram=limit)
    engine = open_engine(weights, 1, context, options.parse_gpu_layers(gpu_layers))
    talk = Conversation(weights, engine, how)
    if prompt is None:
        return chat_on_terminal(talk, n_tokens or context)
    if chat:
        show_answer(talk.ask(prompt, n_tokens or 128))
    else:
        show_answer((piece, False) for piece in talk.complete(prompt, n_tokens or 128))
    click.echo(talk.speed, err=True)


def show_answer(pieces) -> None:
    """Print pieces of an answer as they come, reasoning dimmed (on a terminal)."""
    with contextlib.closing(pieces):
        for piece, thought in pieces:
            click.echo(click.style(piece, dim=True) if thought and piece else piece, nl=False)
    click.echo()


def chat_on_terminal(talk, n_tokens: int) -> None:
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
                show_answer(talk.ask(line.strip(), n_tokens))
                click.echo(click.style(talk.speed, dim=True), err=True)
            except KeyboardInterrupt:
                click.echo("\n(stopped)", err=True)
            except QuantkitError as error:
                click.echo(f"{error}; /clear starts anew", err=True)


@click.command()
@click.argument("file", type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others can reach 0.0.0.0.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--api-key", envvar="QUANTKIT_API_KEY", default=None, help="Ask for it; or in $QUANTKIT_API_KEY.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(2), help="Tokens of a sequence.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1), help="Sequences decoded at once.")
@click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option("--max-body", default="4M", show_default=True, help="Longest request in bytes.")
@options.run_ram
@options.device
@options.gpu_layers
def serve(file, host, port, api_key, context, parallel, queue, max_body, ram, device, gpu_layers):
    """Serve a GGUF to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models."""
    from quantkit.job import make as pipeline
    from quantkit.runtime.engines.open import open_engine
    from quantkit.runtime.sources.weights import open_gguf

    try:
        from quantkit.serving import http as server
    except ModuleNotFoundError as error:
        raise QuantkitError(f"serve needs {error.name}: pip install 'quantkit[serve]'") from None
    limit = sizes.parse_size(ram, "--ram") if ram else None
    weights = open_gguf(file, device or pipeline.default_device(), ram=limit)
    limits = server.Limits(parse_size(max_body, "--max-body") or sys.maxsize, queue)
    engine = open_engine(weights, parallel, context, options.parse_gpu_layers(gpu_layers))
    server.serve(weights, engine, host, port, limits, api_key)


@click.command()
@click.argument("folder", type=FOLDER)
@click.option("--repo", required=True, metavar="USER/NAME", help="Model repository; made if it is new.")
@click.option("--name", default=None, help="Folder in the repository. Default: the recipe's name.")
@click.option("--base-model", default=None, metavar="USER/NAME", help="Default: where the checkpoint came from.")
@click.option("--license", "license_name", default=None, help="Default: the base model's.")
@click.option("--private", is_flag=True, help="If the repository is new, only you can see it.")
@click.option("--pr", is_flag=True, help="Open a pull request instead of committing.")
@click.option("--dry-run", is_flag=True, help="Show the files and the card; upload nothing.")
@click.option("--force", is_flag=True, help="Publish what is incomplete or not certified.")
def publish(folder, repo, name, base_model, license_name, private, pr, dry_run, force):
    """Upload what `make` left in FOLDER, with a model card. Resumes; several quantizations share a repository."""
    from quantkit.job.publish.folder import read_folder
    from quantkit.job.publish.upload import Destination, Uploader

    quant = read_folder(folder, name)
    if quant.problems and not force:
        raise QuantkitError(f"{folder}: not published: {'; '.join(quant.problems)} (--force publishes it all the same)")
    uploader = Uploader(quant, Destination(repo, private, pr), base_model, license_name)
    if dry_run:
        rows = [f"{path.stat().st_size:>18,}  {to}" for to, path in quant.files.items()]
        click.echo("\n".join([*rows, "", uploader.card(uploader.present())]))
    else:
        click.echo(uploader.run())
