"""The command line: it only translates. Each command is one stage, file to file; `make` runs them all."""

import contextlib
import functools
import logging
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path

import click
from rich.console import Console

from quantkit import __version__, progress, ranks, sizes
from quantkit.errors import QuantkitError, out_of_memory

TOGETHER = ("make", "calibrate", "quantize")  # what ranks do together; all else rank 0 does alone
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
OUT = click.Path(dir_okay=False, path_type=Path)


class Commands(click.Group):
    """A QuantkitError is one line on stderr and exit code 1; Ctrl-C says that the work can go on."""

    def invoke(self, ctx: click.Context):
        signal.signal(signal.SIGTERM, _stop)
        try:
            done = super().invoke(ctx)
            ranks.leave()
            return done
        except QuantkitError as error:
            _complain(str(error))
        except KeyboardInterrupt:
            _complain("interrupted; run the same command again to go on")
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _complain(f"{where}{error.strerror or error}")
        except Exception as error:
            if what := out_of_memory(error):
                _complain(f"out of {what}; what is done is kept: free some, or use fewer --workers, and run the same "
                          "command again (fewer --tokens need --restart)")  # fmt: skip
            elif ranks.count() == 1 or isinstance(error, click.exceptions.Exit):
                raise
            elif ranks.may_speak():
                if isinstance(error, click.ClickException):
                    raise
                traceback.print_exc()
        ranks.end(1)
        sys.exit(1)


def _complain(message: str) -> None:
    """One line, from the first rank that has one."""
    if ranks.may_speak():
        where = f"rank {ranks.index()}: " if ranks.index() else ""
        click.echo(f"quantkit: {where}{message}", err=True)


def _stop(*_: object) -> None:
    """SIGTERM ends a run as Ctrl-C does; a second one ends it at once."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise KeyboardInterrupt


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="quantkit")
@click.pass_context
def main(ctx: click.Context) -> None:
    """Dynamic low-bit GGUF files of DeepSeek-R1 and its family."""
    warnings.filterwarnings("ignore", message=".*beta state.*")
    if ctx.invoked_subcommand in TOGETHER:
        ranks.join()
    if ranks.launched_index():
        if ranks.index() == 0:
            ctx.exit(0)
        progress.be_quiet()
        sys.stdout = open(os.devnull, "w")


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
    template = click.option("--template", default=None, metavar="TEXT",
                            help='Text made of several columns: "{question}\\n\\n{answer}".')  # fmt: skip
    start = click.option("--from-start", is_flag=True, help="Take the text's first chunks, not ones spread over it.")

    @functools.wraps(command)
    def with_template(*arguments, template, **options):
        if template is not None:
            options["column"] = template.replace("\\n", "\n")
        return command(*arguments, **options)

    return chunk(column(template(start(with_template))))


def calibration_options(command):
    options = [
        click.option("--min-expert-tokens", default=32, show_default=True, type=click.IntRange(0),
                     help="Experts with fewer tokens lean on their layer's mean statistics."),
        click.option("--expert-tokens", default=0, show_default=True, type=click.IntRange(0),
                     help="Keep drawing text until every expert saw this many tokens."),
        click.option("--memory", default=None, metavar="SIZE", help="Memory for the pass, like 16G. Default: all."),
        click.option("--hidden", type=click.Choice(["device", "ram", "disk"]), default=None,
                     help="Where hidden states live. Default: the first of these that has room."),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def hub_options(command):
    """--revision and --cache-size, handed on with the model's name."""

    @click.option("--revision", default=None, help="Branch, tag or commit of a model on the Hub. Default: main.")
    @click.option("--cache-size", default="60G", show_default=True, metavar="SIZE",
                  help="Disk for downloaded weights (HF_HOME/quantkit); finished layers make room.")  # fmt: skip
    @functools.wraps(command)
    def with_model(*arguments, revision, cache_size, **options):
        from quantkit.remote.repo import Model

        key = next(name for name in ("model", "reference", "path") if name in options)
        options[key] = Model(options[key], revision, parse_size(cache_size, "--cache-size") or 0)
        return command(*arguments, **options)

    return with_model


device_option = click.option("--device", default=None, metavar="cpu|cuda", help="Default: a GPU if there is one.")
experts_option = click.option("--experts", default="auto", show_default=True, type=click.Choice(["auto", "ggml", "kt"]),
                              help="Routed experts: the faster that is right, ggml, or kt-kernel.")  # fmt: skip
target_option = click.option("--target", default=None, metavar="ktransformers|llama.cpp|ollama",
                             help="Engine the file is for; overrides the recipe's.")  # fmt: skip
recipe_option = click.option("--recipe", default=None, metavar="NAME|FILE",
                             help="Default: 1.58bit, or auto if a budget is given.")  # fmt: skip
context_option = click.option("--context", default="16k", show_default=True, metavar="TOKENS",
                              help="Tokens that the KV cache is to hold.")  # fmt: skip
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
gpu_layers_option = click.option(
    "--gpu-layers", default="auto", show_default=True, metavar="auto|N",
    help="Layers whose routed experts stay in GPU memory; auto: as many as fit.")  # fmt: skip
restart_option = click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")


run_ram_option = click.option("--ram", default=None, metavar="SIZE",
                              help="RAM for the file; experts beyond it are read as needed. Default: all.")  # fmt: skip


def budget_options(command):
    """--size, --bpw, --ram, --vram and how to spend them; collected into one BudgetOptions."""
    options = [
        click.option("--size", default=None, metavar="SIZE", help="Budget: the whole file, like 131GB (GB is 2^30)."),
        click.option("--bpw", default=None, type=click.FloatRange(0, 32, min_open=True),
                     help="Budget: bits per weight of the whole model."),
        click.option("--ram", default=None, metavar="SIZE", help="Budget: RAM for the model where it will run."),
        click.option("--vram", default=None, metavar="SIZE", help="Budget: VRAM there, for all but the experts."),
        context_option,
        click.option("--sensitivity", "measured", type=FILE, default=None,
                     help="sensitivity.json of this model. Default: a prior that knows no model."),
        click.option("--solver", type=click.Choice(["lagrange", "milp"]), default="lagrange", show_default=True),
    ]  # fmt: skip
    for option in reversed(options):
        command = option(command)

    @functools.wraps(command)
    def collected(*args, size, bpw, ram, vram, context, measured, solver, **rest):
        from quantkit.plans import BudgetOptions

        limits = [sizes.parse_memory(text, option) if text is not None else None
                 for option, text in (("--size", size), ("--ram", ram), ("--vram", vram))]  # fmt: skip
        budget = BudgetOptions(limits[0], bpw, limits[1], limits[2], parse_context(context), measured, solver)
        return command(*args, budget=budget, **rest)

    return collected


@main.command()
@click.argument("model", default="tiny-r1")
@recipe_option
@target_option
@mla_option
@budget_options
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
@click.option(
    "--recover/--no-recover",
    default=False,
    show_default=True,
    help="Tune scales, norms and 4-bit matrices on the divergence afterwards. Needs the decoded model in memory.",
)
@click.option("--verify/--no-verify", default=True, help="End with perplexity and divergence from the original.")
@hub_options
def make(model, recipe, target, mla, budget, output, data, tokens, eval_data, eval_tokens, column, chunk, from_start,
         min_expert_tokens, expert_tokens, memory, hidden, imatrix, encoder, effort, device, workers, split_max_size,
         restart, recover, verify):  # fmt: skip
    """Make a low-bit GGUF: calibrate, plan, quantize, verify. MODEL: folder, bundled name or Hub id."""
    from quantkit import pipeline, plans
    from quantkit.evaluation.verify import short_table

    name = Path(plans.recipe_name(recipe, budget)).name.removesuffix(".toml")
    folder = output or Path(f"{Path(model).name}-{name}")
    options = pipeline.MakeOptions(
        recipe=recipe, target=target, mla=mla, budget=budget,
        calibration=pipeline.Calibration(
            pipeline.TextChoice(data, column, tokens, chunk, from_start), min_expert_tokens, expert_tokens,
            parse_size(memory, "--memory") if memory else None, hidden,
        ),
        evaluation=pipeline.TextChoice(eval_data, column, eval_tokens, chunk, from_start),
        imatrix=imatrix, encoder=encoder, effort=effort, device=device, workers=workers,
        split_max_bytes=parse_size(split_max_size), restart=restart, verify=verify, recover=recover,
    )  # fmt: skip
    files, result = pipeline.make(model, folder, options)
    click.echo(short_table(result, files[0]) if result else "\n".join(map(str, files)))


@main.command()
@click.argument("path")
@hub_options
def inspect(path):
    """What a checkpoint (folder, bundled name or Hub id) or a GGUF file holds, from headers alone."""
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
@hub_options
def calibrate(model, output, data, tokens, column, chunk, from_start, min_expert_tokens, expert_tokens, memory, hidden,
              device, restart):  # fmt: skip
    """Measure importance: run text through the model, layer by layer, and write an imatrix. Resumes.

    MODEL is a checkpoint folder, a bundled name, a Hub id or a GGUF file.
    """
    from quantkit import pipeline

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    limit = parse_size(memory, "--memory") if memory else None
    how = pipeline.Calibration(choice, min_expert_tokens, expert_tokens, limit, hidden)
    source = pipeline.open_for_calibration(model, device or pipeline.default_device())
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
@hub_options
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
@budget_options
@click.option("--compare", nargs=2, default=None, metavar="A B", help="Show two plans: recipes or plan.json files.")
@click.option("--plot", type=OUT, default=None, help="Draw the bit map here: a .png or .svg file.")
@click.option("--output", "-o", type=OUT, default=None, help="Write plan.json here (with .png or .svg: as --plot).")
@hub_options
def plan(model, recipe, target, mla, budget, compare, plot, output):
    """Choose a type for every tensor, by rules or within a budget, and show sizes. Needs no weights: try
    `quantkit plan deepseek-r1 --size 131GB`."""
    from quantkit import plans
    from quantkit.planning import table

    if compare:
        pair = [plans.load_or_plan(model, name, target, mla, budget) for name in compare]
        click.echo(table.compare(*pair, *(plans.predict_plan(model, one, budget.measured) for one in pair)))
        return
    chosen = plans.plan_model(model, recipe, target, mla, budget)
    if plot := plot or (output if output and output.suffix in (".png", ".svg") else None):
        from quantkit.planning import bitmap  # matplotlib takes a second to load

        bitmap.draw(chosen, plot)
    if output and output != plot:
        output.write_text(chosen.to_json(), encoding="utf-8")
    click.echo(table.render(chosen))
    kld = plans.predict_plan(model, chosen, budget.measured)
    basis = str(budget.measured or "prior")
    click.echo(table.outlook(chosen, plans.plan_file_bytes(model, chosen), kld, basis))


@main.command()
@click.argument("model", default="deepseek-r1")
@click.option("--recipe", "recipes", multiple=True, metavar="NAME|FILE",
              help="Recipe or plan.json; may be repeated. Default: the bundled ones with fixed types.")  # fmt: skip
@target_option
@mla_option
@click.option("--ram", default=None, metavar="SIZE", help="RAM for the model. Default: this machine's.")
@click.option("--vram", default=None, metavar="SIZE", help="VRAM for it. Default: this machine's free VRAM.")
@click.option("--ram-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured.")
@click.option("--gpu-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured, if there is a GPU.")
@click.option("--disk-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured with --disk.")
@click.option("--disk", type=FILE, default=None, help="A file of 1 GB or more on that disk, to measure reading.")
@context_option
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads. Default: this machine's cores.")
def hardware(model, recipes, target, mla, ram, vram, ram_bandwidth, gpu_bandwidth, disk_bandwidth, disk, context,
             threads):  # fmt: skip
    """Which recipes fit a machine, how fast they can be, and the commands that start them."""
    from quantkit import plans

    named = (("--ram", ram), ("--vram", vram))
    given = [sizes.parse_memory(text, name) if text is not None else None for name, text in named]
    machine = plans.machine_of(*given, ram_bandwidth, gpu_bandwidth, disk_bandwidth, disk)
    click.echo(plans.hardware_report(model, recipes, target, mla, machine, parse_context(context), threads))


@main.command()
@click.argument("model")
@click.option("--plan", "plan_file", type=FILE, required=True, help="plan.json of `quantkit plan`.")
@click.option("--imatrix", type=FILE, required=True)
@click.option("--output", "-o", type=OUT, required=True)
@workers_option
@split_option
@restart_option
@click.option("--overwrite", is_flag=True, help="Replace a finished file of that name.")
@hub_options
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
@click.option("--text", "data", multiple=True, metavar="[DOMAIN=]TEXT",
              help="Evaluation text. Default: the bundled mix.")  # fmt: skip
@click.option("--tokens", default=32768, show_default=True, type=click.IntRange(1))
@common_text
@target_option
@click.option("--score", type=click.Choice(["half", "all"]), default="half", show_default=True,
              help="half: the second half of each chunk, as llama-perplexity.")  # fmt: skip
@click.option("--runtime-tokens", default=0, show_default=True, type=click.IntRange(0),
              help="Also compute this many tokens one by one, as `run` does, and compare.")  # fmt: skip
@click.option("--prompts", default=0, show_default=True, type=click.IntRange(0),
              help="Also continue this many texts: greedy agreement with the original, and loops.")  # fmt: skip
@experts_option
@click.option("--memory", default=None, metavar="SIZE", help="Memory for the streams, like 16G. Default: all.")
@click.option("--json", "out", type=OUT, default=None, help="Write the figures here.")
@device_option
@hub_options
def verify(file, reference, data, tokens, column, chunk, from_start, target, score, runtime_tokens, prompts, experts,
           memory, out, device):  # fmt: skip
    """Measure perplexity and KL divergence of a GGUF from the original, both streamed layer by layer side by side."""
    from quantkit import pipeline
    from quantkit.evaluation.verify import short_table

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    original = pipeline.open_weights(reference)
    result = pipeline.verify_file(
        file, original, choice, device or pipeline.default_device(), target, out, score=score,
        runtime_tokens=runtime_tokens, prompts=prompts, experts=experts,
        ram=parse_size(memory, "--memory") if memory else None,
    )  # fmt: skip
    click.echo(short_table(result, file))


@main.command()
@click.argument("file", type=FILE)
@click.option("--target", default="llama.cpp", show_default=True, metavar="ktransformers|llama.cpp|ollama")
@click.option("--reference", default=None, metavar="MODEL", help="The original; without it weights are not compared.")
@click.option("--imatrix", type=FILE, default=None, help="Also weigh errors by importance.")
@click.option("--engine/--no-engine", default=True, help="Load and run the file in the engine, if it is installed.")
@click.option("--values/--no-values", default=True, help="Decode every tensor.")
@click.option("--json", "out", type=OUT, default=None, help="Default: certify.json beside FILE.")
@device_option
def certify(file, target, reference, imatrix, engine, values, out, device):
    """Is this file right for that engine? A table of checks, certify.json, and exit code 1 if one fails."""
    from quantkit import pipeline

    made = pipeline.certify_file(file, target, reference, imatrix, out or file.with_name(pipeline.CERTIFY),
                                 engine=engine, values=values, device=device or pipeline.default_device())  # fmt: skip
    Console(width=110).print(made.table())
    sys.exit(0 if made.passed else 1)


@main.command("export-kt")
@click.argument("file", type=FILE)
@click.option(
    "--output", "-o", default=None, type=click.Path(path_type=Path), help="Folder. Default: NAME-kt beside it."
)
@click.option("--gpus", default=1, show_default=True, type=click.IntRange(1), help="Share the layers out over N GPUs.")
@click.option("--linear", default="marlin", show_default=True, type=click.Choice(["marlin", "torch"]),
              help="Attention and shared experts on the GPU: packed to 4 bits at load, or BF16.")  # fmt: skip
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads. Default: this machine's cores.")
def export_kt(file, output, gpus, linear, threads):
    """Write what KTransformers needs to run FILE: optimize rules, attn_kv_b for 0.3.1 and earlier, configuration,
    tokenizer and a launch script. Refuses files with types that KTransformers cannot compute."""
    from quantkit.engines import kt_export

    output = output or kt_export.default_output(file)
    made = kt_export.export(file, output, gpus=gpus, linear=linear, threads=threads)
    click.echo(f"{made}\nstart it with {made / kt_export.LAUNCH} chat")


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
def report(folder):
    """One page about the FOLDER that `make` left, without outside requests, and its figures as PNGs."""
    from quantkit.report import write_report

    click.echo("\n".join(map(str, write_report(folder))))


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
@run_ram_option
@experts_option
@device_option
@gpu_layers_option
def run(file, prompt, chat, n_tokens, context, temperature, top_p, top_k, min_p, seed, ram, experts, device,
        gpu_layers):  # fmt: skip
    """Generate text with a GGUF, or chat with it: on the GPU if there is one, experts that do not fit on the CPU."""
    from quantkit import pipeline
    from quantkit.runtime.chat import Conversation
    from quantkit.runtime.generate import Sampling

    how = Sampling(temperature, top_p, seed, top_k, min_p)
    limit = sizes.parse_memory(ram, "--ram") if ram else None
    layers = parse_gpu_layers(gpu_layers)
    talk = Conversation(file, device or pipeline.default_device(), context, how, layers, experts, limit)
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
@run_ram_option
@experts_option
@device_option
@gpu_layers_option
def serve(file, host, port, api_key, context, parallel, queue, max_body, ram, experts, device, gpu_layers):
    """Serve a GGUF to OpenAI clients: /v1/chat/completions, /v1/completions, /v1/models."""
    from quantkit import pipeline
    from quantkit.runtime import kt_experts
    from quantkit.runtime.engine import open_engine
    from quantkit.runtime.sources import GGUFSource

    try:
        from quantkit import serve as server
    except ModuleNotFoundError as error:
        raise QuantkitError(f"serve needs {error.name}: pip install 'quantkit[serve]'") from None
    limit = sizes.parse_memory(ram, "--ram") if ram else None
    source = GGUFSource(file, device or pipeline.default_device(), ram=limit)
    kt_experts.select(source, experts)
    limits = server.Limits(parse_size(max_body, "--max-body") or sys.maxsize, queue)
    engine = open_engine(source, parallel, context, parse_gpu_layers(gpu_layers))
    server.serve(source, engine, host, port, limits, api_key)


@main.command()
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
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
    from quantkit.publish.folder import read_folder
    from quantkit.publish.upload import Target, Uploader

    quant = read_folder(folder, name)
    if quant.problems and not force:
        raise QuantkitError(f"{folder}: not published: {'; '.join(quant.problems)} (--force publishes it all the same)")
    uploader = Uploader(quant, Target(repo, private, pr), base_model, license_name)
    if dry_run:
        rows = [f"{path.stat().st_size:>18,}  {to}" for to, path in quant.files.items()]
        click.echo("\n".join([*rows, "", uploader.card(uploader.present())]))
    else:
        click.echo(uploader.run())


def parse_size(text: str, option: str = "--split-max-size") -> int | None:
    """As sizes.parse_size; 0 -> None."""
    return sizes.parse_size(text, option) or None


def parse_gpu_layers(text: str):
    """auto, or a number of layers; from here on the runtime tells where it put them."""
    logger = logging.getLogger("quantkit.runtime")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    if text == "auto":
        return "auto"
    if not text.isdecimal() or len(text) > 4:
        raise QuantkitError(f"--gpu-layers {text}: write auto or a number of layers")
    return int(text)


def parse_context(text: str) -> int:
    """16k or 16384 -> tokens (k is 1024)."""
    number = text.lower().removesuffix("k")
    if not number.isdigit() or not 0 < int(number) < 10**8:
        raise QuantkitError(f"--context {text}: not a number of tokens; write 16384 or 16k")
    return int(number) * (1024 if number != text.lower() else 1)
