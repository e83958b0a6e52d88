"""The command line: it only translates. Each command is one stage, file to file; `make` runs them all."""

import contextlib
import sys
import warnings
from pathlib import Path

import click
from rich.console import Console

from quantkit import __version__
from quantkit.errors import QuantkitError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT = click.Path(dir_okay=False, path_type=Path)
MODEL_HELP = "MODEL is a checkpoint folder or a bundled name (tiny-r1)."


class Commands(click.Group):
    """A QuantkitError is one line on stderr and exit code 1; Ctrl-C says that the work can go on."""

    def invoke(self, ctx: click.Context):
        try:
            return super().invoke(ctx)
        except QuantkitError as error:
            click.echo(f"quantkit: {error}", err=True)
        except KeyboardInterrupt:
            click.echo("quantkit: interrupted; run the same command again to go on", err=True)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            click.echo(f"quantkit: {where}{error.strerror or error}", err=True)
        sys.exit(1)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Dynamic low-bit GGUF files of DeepSeek-R1 and its family."""
    warnings.filterwarnings("ignore", message=".*beta state.*")


def text_options(n_tokens: int, prefix: str = "", what: str = "calibration"):
    """--data, --column, --tokens, --chunk; collected into one TextChoice."""

    def decorate(command):
        key = prefix.replace("-", "_")
        options = [
            click.option(f"--{prefix}data", f"{key}data", multiple=True, metavar="TEXT",
                         help=f"{what.capitalize()} text: file, folder or Hugging Face dataset id; may be repeated. "
                              "Default: the bundled mix."),
            click.option(f"--{prefix}tokens", f"{key}tokens", default=n_tokens, show_default=True,
                         type=click.IntRange(1), help=f"Most tokens of {what} text to use."),
        ]  # fmt: skip
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def common_text(command):
    chunk = click.option("--chunk", default=512, show_default=True, type=click.IntRange(4), help="Tokens per chunk.")
    column = click.option("--column", default="text", show_default=True, help="Text column of datasets and jsonl.")
    start = click.option("--from-start", is_flag=True, help="Take the text's first chunks, not ones spread over it.")
    return chunk(column(start(command)))


def calibration_options(command):
    options = [
        click.option("--min-expert-tokens", default=32, show_default=True, type=click.IntRange(0),
                     help="Experts with fewer tokens lean on their layer's mean statistics."),
        click.option("--expert-tokens", default=0, show_default=True, type=click.IntRange(0),
                     help="Keep drawing text until every expert saw this many tokens."),
        click.option("--ram", default=None, metavar="SIZE", help="Memory limit of the pass, like 16G. Default: all."),
        click.option("--hidden", type=click.Choice(["device", "ram", "disk"]), default=None,
                     help="Where hidden states live. Default: the first of these that has room."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


device_option = click.option("--device", default=None, metavar="cpu|cuda", help="Default: a GPU if there is one.")
target_option = click.option("--target", default=None, metavar="ktransformers|llama.cpp|ollama",
                             help="Engine the file is for; overrides the recipe's.")  # fmt: skip
recipe_option = click.option("--recipe", default="1.58bit", show_default=True, metavar="NAME|FILE")
mla_option = click.option("--mla", type=click.Choice(["split", "combined"]), default=None,
                          help="Layout of kv_b: two tensors (current engines) or one (old ones).")  # fmt: skip
workers_option = click.option(
    "--workers", type=click.IntRange(1), default=None, help="Encoding threads. Default: cores."
)
encoder_option = click.option("--encoder", default="auto", show_default=True, metavar="auto|quantkit|ggml",
                              help="Who packs the blocks. auto: quantkit on a GPU and for small models.")  # fmt: skip
effort_option = click.option("--effort", type=click.Choice(["fast", "normal", "best"]), default="normal",
                             show_default=True, help="How long quantkit's encoders search.")  # fmt: skip
split_option = click.option("--split-max-size", default="50G", show_default=True, metavar="SIZE",
                            help="Largest file, like 50G or 4096M; 0 for a single file.")  # fmt: skip
restart_option = click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")


@main.command()
@click.argument("model", default="tiny-r1")
@recipe_option
@target_option
@mla_option
@click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=None,
              help="Folder for the results. Default: MODEL-RECIPE here.")  # fmt: skip
@text_options(131072)
@text_options(32768, "eval-", "evaluation")
@common_text
@calibration_options
@click.option("--imatrix", type=FILE, default=None, help="Use this importance instead of calibrating.")
@encoder_option
@effort_option
@device_option
@workers_option
@split_option
@restart_option
@click.option("--verify/--no-verify", default=True, help="End with perplexity and divergence from the original.")
def make(model, recipe, target, mla, output, data, tokens, eval_data, eval_tokens, column, chunk, from_start,
         min_expert_tokens, expert_tokens, ram, hidden, imatrix, encoder, effort, device, workers, split_max_size,
         restart, verify):  # fmt: skip
    """Make a low-bit GGUF: calibrate, plan, quantize, verify. MODEL is a checkpoint folder or a bundled name."""
    from quantkit import pipeline
    from quantkit.evaluation.verify import short_table

    folder = output or Path(f"{Path(model).name}-{Path(recipe).name.removesuffix('.toml')}")
    options = pipeline.MakeOptions(
        recipe=recipe, target=target, mla=mla,
        calibration=pipeline.Calibration(
            pipeline.TextChoice(data, column, tokens, chunk, from_start), min_expert_tokens, expert_tokens,
            parse_size(ram, "--ram") if ram else None, hidden,
        ),
        evaluation=pipeline.TextChoice(eval_data, column, eval_tokens, chunk, from_start),
        imatrix=imatrix, encoder=encoder, effort=effort, device=device, workers=workers,
        split_max_bytes=parse_size(split_max_size), restart=restart, verify=verify,
    )  # fmt: skip
    files, result = pipeline.make(model, folder, options)
    click.echo(short_table(result, files[0]) if result else "\n".join(map(str, files)))


@main.command()
@click.argument("path")
def inspect(path):
    """What a checkpoint folder, a bundled model or a GGUF file holds."""
    from quantkit.inspect import describe

    Console(width=100).print(describe(path), markup=False, highlight=False)


@main.command()
@click.argument("model", default="tiny-r1")
@click.option("--output", "-o", type=OUT, default="imatrix.gguf", show_default=True)
@text_options(131072)
@common_text
@calibration_options
@device_option
@restart_option
def calibrate(model, output, data, tokens, column, chunk, from_start, min_expert_tokens, expert_tokens, ram, hidden,
              device, restart):  # fmt: skip
    """Measure importance: run text through the model, layer by layer, and write an imatrix. Resumes.

    MODEL is a checkpoint folder, a bundled name or a GGUF file.
    """
    from quantkit import pipeline

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    limit = parse_size(ram, "--ram") if ram else None
    how = pipeline.Calibration(choice, min_expert_tokens, expert_tokens, limit, hidden)
    source = pipeline.open_model(model, device or pipeline.default_device())
    pipeline.calibrate(source, how, output, restart)
    click.echo(str(output))


@main.command()
@click.argument("model", default="tiny-r1")
@click.option("--imatrix", type=FILE, required=True, help="Importance, for encoding the variants.")
@click.option("--output", "-o", type=click.Path(file_okay=False, path_type=Path), default=Path("."),
              help="Folder for sensitivity.json and sensitivity.png.")  # fmt: skip
@text_options(8192, "", "measurement")
@common_text
@click.option("--tier", type=click.Choice(["full", "cheap"]), default=None, help="Default: full if --budget allows.")
@click.option("--budget", default=1 << 21, show_default=True, type=click.IntRange(1),
              help="Stream-tokens: tokens x forks carried through the layers.")  # fmt: skip
@click.option("--types", default=None, metavar="A,B", help="Types to try on routed experts.")
@click.option("--other-types", default=None, metavar="A,B", help="Types to try on all other tensors.")
@device_option
def sensitivity(model, imatrix, output, data, tokens, column, chunk, from_start, tier, budget, types, other_types,
                device):  # fmt: skip
    """What each tensor's type costs: KL divergence at the output if only that tensor is quantized, in one pass."""
    from quantkit import pipeline
    from quantkit.calibration.sensitivity import OTHER_TYPES, ROUTED_TYPES

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    source = pipeline.source_of(pipeline.open_weights(model), device or pipeline.default_device())
    pipeline.measure_sensitivity(
        source, imatrix, choice, output, tier=tier, budget=budget,
        routed=types.split(",") if types else ROUTED_TYPES,
        others=other_types.split(",") if other_types else OTHER_TYPES,
    )  # fmt: skip
    click.echo(str(output / "sensitivity.json"))


@main.command()
@click.argument("model", default="tiny-r1")
@recipe_option
@target_option
@mla_option
@click.option("--output", "-o", type=OUT, default=None, help="Write plan.json here.")
def plan(model, recipe, target, mla, output):
    """Choose a type for every tensor and show sizes. Needs no weights: try `quantkit plan deepseek-r1`."""
    from quantkit import pipeline
    from quantkit.planning.table import render

    chosen = pipeline.plan_model(model, recipe, target, mla)
    if output:
        output.write_text(chosen.to_json(), encoding="utf-8")
    click.echo(render(chosen))


@main.command()
@click.argument("model")
@click.option("--plan", "plan_file", type=FILE, required=True, help="plan.json of `quantkit plan`.")
@click.option("--imatrix", type=FILE, required=True)
@click.option("--output", "-o", type=OUT, required=True)
@workers_option
@split_option
@restart_option
@click.option("--overwrite", is_flag=True, help="Replace a finished file of that name.")
def quantize(model, plan_file, imatrix, output, workers, split_max_size, restart, overwrite):
    """Encode every tensor as planned, with ggml, and write the GGUF file(s). Resumes where an earlier run stopped."""
    from quantkit import pipeline
    from quantkit.planning.plan import Plan

    chosen = Plan.from_json(plan_file.read_bytes(), str(plan_file))
    files = pipeline.quantize_model(
        pipeline.open_weights(model), chosen, imatrix, output, workers=workers,
        split_max_bytes=parse_size(split_max_size), restart=restart, overwrite=overwrite,
    )  # fmt: skip
    click.echo("\n".join(map(str, files)))


@main.command()
@click.argument("file", type=FILE)
@click.option("--reference", default="tiny-r1", show_default=True, metavar="MODEL", help="The original.")
@click.option("--text", "data", multiple=True, metavar="TEXT", help="Evaluation text. Default: the bundled mix.")
@click.option("--tokens", default=32768, show_default=True, type=click.IntRange(1))
@common_text
@target_option
@click.option("--json", "out", type=OUT, default=None, help="Write the figures here.")
@device_option
def verify(file, reference, data, tokens, column, chunk, from_start, target, out, device):
    """Check a GGUF and measure perplexity and KL divergence from the original."""
    from quantkit import pipeline
    from quantkit.evaluation.verify import short_table

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    original = pipeline.open_weights(reference)
    result = pipeline.verify_file(file, original, choice, device or pipeline.default_device(), target, out)
    click.echo(short_table(result, file))


@main.command()
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
@device_option
def run(file, prompt, chat, n_tokens, context, temperature, top_p, top_k, min_p, seed, device):
    """Generate text with a GGUF, or chat with it: attention on the GPU if there is one, experts on the CPU."""
    from quantkit import pipeline
    from quantkit.runtime.chat import Conversation
    from quantkit.runtime.generate import Sampling

    how = Sampling(temperature, top_p, seed, top_k, min_p)
    talk = Conversation(file, device or pipeline.default_device(), context, how)
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


@main.command()
@click.argument("file", type=FILE)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; others can reach 0.0.0.0.")
@click.option("--port", default=8000, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option("--api-key", envvar="QUANTKIT_API_KEY", default=None, help="Ask for it; or in $QUANTKIT_API_KEY.")
@click.option("--context", default=4096, show_default=True, type=click.IntRange(2), help="Tokens of a sequence.")
@click.option("--parallel", default=4, show_default=True, type=click.IntRange(1), help="Sequences decoded at once.")
@click.option("--queue", default=256, show_default=True, type=click.IntRange(1), help="Requests that may wait.")
@click.option("--max-body", default="4M", show_default=True, help="Longest request in bytes.")
@device_option
def serve(file, host, port, api_key, context, parallel, queue, max_body, device):
    """Serve a GGUF to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models."""
    from quantkit import pipeline
    from quantkit.runtime.engine import open_engine
    from quantkit.runtime.sources import GGUFSource

    try:
        from quantkit import serve as server
    except ModuleNotFoundError as error:
        raise QuantkitError(f"serve needs {error.name}: pip install 'quantkit[serve]'") from None
    source = GGUFSource(file, device or pipeline.default_device())
    limits = server.Limits(parse_size(max_body, "--max-body") or sys.maxsize, queue)
    server.serve(source, open_engine(source, parallel, context), host, port, limits, api_key)


def parse_size(text: str, option: str = "--split-max-size") -> int | None:
    """50G, 4096M, 123456 -> bytes (decimal units, as llama.cpp's gguf-split); 0 -> None."""
    units = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
    number, unit = text.upper().removesuffix("B"), ""
    if number and number[-1] in units:
        number, unit = number[:-1], number[-1]
    try:
        size = int(float(number) * units[unit])
    except (ValueError, OverflowError):
        size = -1
    if size < 0:
        raise QuantkitError(f"{option} {text}: not a size; write 50G or 4096M")
    return size or None
