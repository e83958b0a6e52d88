"""Options that several commands share, and what their values mean."""

import functools
import logging
from pathlib import Path

import click

from quantkit import sizes
from quantkit.errors import QuantkitError

FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)
OUT = click.Path(dir_okay=False, path_type=Path)


def together(*options):
    """Several options as one decorator, in this order in --help."""

    def decorate(command):
        return functools.reduce(lambda inner, option: option(inner), reversed(options), command)

    return decorate


def text(n_tokens: int, prefix: str = "", what: str = "calibration"):
    """--data and --tokens, with names of their own for a second text."""
    return together(
        click.option(
            f"--{prefix}data",
            multiple=True,
            metavar="TEXT",
            help=f"{what.capitalize()} text: file, folder or Hugging Face dataset id; may be repeated. "
            "Default: the bundled mix.",
        ),
        click.option(
            f"--{prefix}tokens",
            default=n_tokens,
            show_default=True,
            type=click.IntRange(1),
            help=f"Most tokens of {what} text to use.",
        ),
    )


def common_text(command):
    """--chunk, --column, --template (handed on as the column) and --from-start."""

    @together(
        click.option("--chunk", default=512, show_default=True, type=click.IntRange(4), help="Tokens per chunk."),
        click.option("--column", default="text", show_default=True, help="Text column of datasets and jsonl."),
        click.option(
            "--template", default=None, metavar="TEXT", help='Text made of several columns: "{question}\\n\\n{answer}".'
        ),
        click.option("--from-start", is_flag=True, help="Take the text's first chunks, not ones spread over it."),
    )
    @functools.wraps(command)
    def with_template(*arguments, template, **options):
        if template is not None:
            options["column"] = template.replace("\\n", "\n")
        return command(*arguments, **options)

    return with_template


calibration = together(
    click.option(
        "--min-expert-tokens",
        default=32,
        show_default=True,
        type=click.IntRange(0),
        help="Experts with fewer tokens lean on their layer's mean statistics.",
    ),
    click.option(
        "--expert-tokens",
        default=0,
        show_default=True,
        type=click.IntRange(0),
        help="Keep drawing text until every expert saw this many tokens.",
    ),
    click.option("--memory", default=None, metavar="SIZE", help="Memory for the pass, like 16G. Default: all."),
    click.option(
        "--hidden",
        type=click.Choice(["device", "ram", "disk"]),
        default=None,
        help="Where hidden states live. Default: the first of these that has room.",
    ),
)


device = click.option("--device", default=None, metavar="cpu|cuda", help="Default: a GPU if there is one.")
target = click.option(
    "--target",
    default=None,
    metavar="ktransformers|llama.cpp|ollama",
    help="Engine the file is for; overrides the recipe's.",
)
recipe = click.option(
    "--recipe", default=None, metavar="NAME|FILE", help="Default: 1.58bit, or auto if a budget is given."
)
context = click.option(
    "--context", default="16k", show_default=True, metavar="TOKENS", help="Tokens that the KV cache is to hold."
)
workers = click.option("--workers", type=click.IntRange(1), default=None, help="Encoding threads. Default: cores.")
encoder = click.option(
    "--encoder",
    default="auto",
    show_default=True,
    metavar="auto|quantkit|ggml",
    help="Who packs the blocks. auto: quantkit on a GPU and for small models.",
)
effort = click.option(
    "--effort",
    type=click.Choice(["fast", "normal", "best"]),
    default="normal",
    show_default=True,
    help="How long quantkit's encoders search.",
)
split = click.option(
    "--split-max-size",
    default="50G",
    show_default=True,
    metavar="SIZE",
    help="Largest file, like 50G or 4096M; 0 for a single file.",
)
gpu_layers = click.option(
    "--gpu-layers",
    default="auto",
    show_default=True,
    metavar="auto|N",
    help="Layers whose routed experts stay in GPU memory; auto: as many as fit.",
)
restart = click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
run_ram = click.option(
    "--ram", default=None, metavar="SIZE", help="RAM for the file; experts beyond it are read as needed. Default: all."
)


def budget(command):
    """--size, --bpw, --ram, --vram and how to spend them; collected into one BudgetOptions."""

    @together(
        click.option("--size", default=None, metavar="SIZE", help="Budget: the whole file, like 140GB or 131GiB."),
        click.option(
            "--bpw",
            default=None,
            type=click.FloatRange(0, 32, min_open=True),
            help="Budget: bits per weight of the whole model.",
        ),
        click.option("--ram", default=None, metavar="SIZE", help="Budget: RAM for the model where it will run."),
        click.option("--vram", default=None, metavar="SIZE", help="Budget: VRAM there, for all but the experts."),
        context,
        click.option(
            "--sensitivity",
            "measured",
            type=FILE,
            default=None,
            help="sensitivity.json of this model. Default: a prior that knows no model.",
        ),
    )
    @functools.wraps(command)
    def collected(*args, size, bpw, ram, vram, context, measured, **rest):
        from quantkit.job.plan import BudgetOptions

        limits = [
            sizes.parse_size(text, option) if text is not None else None
            for option, text in (("--size", size), ("--ram", ram), ("--vram", vram))
        ]
        budget = BudgetOptions(limits[0], bpw, limits[1], limits[2], parse_context(context), measured)
        return command(*args, budget=budget, **rest)

    return collected


types = together(recipe, target, budget)  # what decides the type of every tensor


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
