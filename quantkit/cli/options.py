"""Options that several commands share, what their values mean, and how they are handed on: as one noun each."""

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from quantkit import bundle, machine, sizes
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_folder import model_in

if TYPE_CHECKING:
    from quantkit.calibration.corpus import TextChoice
    from quantkit.calibration.options import Calibration
    from quantkit.planning.budget import BudgetOptions


class Place(click.Path):
    """A path in which ~ is the home folder: shells leave it alone in --output=~/x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """As click.Path."""
        return super().convert(os.path.expanduser(value), param, ctx)


class ModelFile(Place):
    """A GGUF, or a folder that holds one model: its file, or the first of its splits."""

    name = "file"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """QuantkitError for a folder of none or of several."""
        path = Path(super().convert(value, param, ctx))
        return model_in(path) if path.is_dir() else path


MODEL_FILE = ModelFile(exists=True, path_type=Path)
FILE = Place(exists=True, dir_okay=False, path_type=Path)
FOLDER = Place(exists=True, file_okay=False, path_type=Path)
OUT = Place(dir_okay=False, path_type=Path)
OUT_FOLDER = Place(file_okay=False, path_type=Path)
LONGEST_CONTEXT = 10**8

Command = Callable[..., Any]
Decorator = Callable[[Command], Command]


@dataclass(frozen=True)
class Shared:
    """Options as one decorator, in this order in --help. What `build` makes of their values, given by name, is the
    command's argument `noun`; without a noun they stay as they are."""

    options: tuple["Decorator | Shared", ...]
    noun: str = ""
    build: Callable[..., Any] = dict

    @property
    def arguments(self) -> tuple[str, ...]:
        """What a command is given by them."""
        return (self.noun,) if self.noun else tuple(name for option in self.options for name in _arguments(option))

    def __call__(self, command: Command) -> Command:
        taken = Shared(self.options).arguments if self.noun else ()

        @functools.wraps(command)
        def collected(**values: Any) -> Any:
            own = {name: values.pop(name) for name in taken}
            return command(**values, **({self.noun: self.build(**own)} if self.noun else {}))

        wrapped: Command = collected
        for option in reversed(self.options):
            wrapped = option(wrapped)
        return wrapped


def _arguments(option: Decorator | Shared) -> tuple[str, ...]:
    if isinstance(option, Shared):
        return option.arguments

    def probe() -> None:
        """Where click notes an option."""

    option(probe)
    return tuple(parameter.name for parameter in vars(probe)["__click_params__"])


class Size(click.ParamType):
    """Bytes: GB is 10^9 and GiB is 2^30, in every option."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """QuantkitError, naming the option, for what is not a size."""
        return value if isinstance(value, int) else sizes.parse_size(value, name_of(param))


@dataclass(frozen=True)
class FileSize:
    """How large the whole file may be: in bytes, or in bits of tensor data per weight."""

    size: int | None = None
    bpw: float | None = None


class SizeOrBits(click.ParamType):
    """131GB, or 1.8bpw: bits of tensor data per weight of the whole model."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> FileSize:
        """QuantkitError, naming the option, for what is neither."""
        if isinstance(value, FileSize):
            return value
        number = value.strip().lower()
        if not number.endswith("bpw"):
            return FileSize(size=sizes.parse_size(value, name_of(param)))
        try:
            bits = float(number.removesuffix("bpw"))
        except ValueError:
            bits = 0.0
        if not 0 < bits <= 32:
            raise QuantkitError(f"{name_of(param)} {value}: bits per weight are a number up to 32, like 1.8bpw")
        return FileSize(bpw=bits)


class Tokens(click.ParamType):
    """16k or 16384 -> tokens (k is 1024)."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """QuantkitError, naming the option, for what is no number of tokens."""
        if isinstance(value, int):
            return value
        number = value.lower().removesuffix("k")
        if not number.isdecimal() or not 0 < int(number[:9]) < LONGEST_CONTEXT or len(number) > 9:
            raise QuantkitError(f"{name_of(param)} {value}: not a number of tokens; write 16384 or 16k")
        return int(number) * (1024 if number != value.lower() else 1)


class GpuLayers(click.ParamType):
    """auto, a number of layers, or a share of all experts."""

    name = "auto|n|n%"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | float | Literal["auto"]:
        """QuantkitError, naming the option, for anything else."""
        if not isinstance(value, str):
            return value
        if value == "auto":
            return "auto"
        number = value.removesuffix("%")
        if not number.isdecimal() or len(number) > 4 or (number != value and int(number) > 100):
            raise QuantkitError(
                f"{name_of(param)} {value}: write auto or a number of layers, or how much of all experts, like 40%"
            )
        return int(number) if number == value else int(number) / 100


class Finite(click.FloatRange):
    """A number within bounds; nan and inf are none."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """QuantkitError, naming the option, for what is not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            raise QuantkitError(f"{name_of(param)} {value}: not a finite number")
        return float(number)


class OneOf(click.Choice[str]):
    """One of a few words; another is refused as everything else is, in one line."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """QuantkitError, naming the option and the words."""
        if value not in self.choices:
            raise QuantkitError(f"{name_of(param)} {value}: unknown; choose {', '.join(self.choices)}")
        return value


def _device(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuses, before torch is loaded, what is no device; whether it is there, `chosen_device` finds."""
    if value is not None:
        machine.known_device(value)
    return value


def _use_threads(_: click.Context, __: click.Parameter, value: int | None) -> None:
    """Of the whole process, before any library that has threads is loaded."""
    if value is not None:
        machine.use_threads(value)


def name_of(param: click.Parameter | None) -> str:
    """`--size`, for messages."""
    return max(param.opts, key=len) if param else ""


SIZE, TOKENS = Size(), Tokens()
SEED = click.IntRange(-(2**63), 2**63 - 1)  # what torch's generators take


@dataclass(frozen=True)
class Types:
    """What decides the type of every tensor."""

    recipe: str | None
    target: str | None
    budget: "BudgetOptions"


def _budget(
    size: FileSize | None, ram: int | None, vram: int | None, context: int = 16384, measured: Path | None = None
) -> "BudgetOptions":
    from quantkit.planning.budget import BudgetOptions

    size = size or FileSize()
    return BudgetOptions(size=size.size, bpw=size.bpw, ram=ram, vram=vram, context=context, measured=measured)


def _types(recipe: str | None, target: str | None, budget: "BudgetOptions") -> Types:
    return Types(os.path.expanduser(recipe) if recipe else recipe, target, budget)


def _text(data: tuple[str, ...], tokens: int | None) -> "TextChoice":
    from quantkit.calibration.corpus import TextChoice

    return TextChoice(tuple(map(os.path.expanduser, data)), n_tokens=tokens)


def _evaluation(eval_data: tuple[str, ...], eval_tokens: int) -> "TextChoice":
    return _text(eval_data, eval_tokens)


def _calibration(text: "TextChoice", memory: int | None) -> "Calibration":
    from quantkit.calibration.options import Calibration

    return Calibration(text, memory=memory)


def _text_options(n_tokens: int | None, what: str, prefix: str = "", default: str = "") -> tuple[Decorator, Decorator]:
    return (
        click.option(
            f"--{prefix}data",
            multiple=True,
            metavar="TEXT",
            help=f"{what.capitalize()} text: file, folder or dataset id, with the column after a colon (FILE:body, "
            '"FILE:{question} {answer}"); may be repeated. Default: the bundled mix.',
        ),
        click.option(
            f"--{prefix}tokens",
            default=n_tokens,
            show_default=default or True,
            type=click.IntRange(1),
            help=f"Most tokens of {what} text to use.",
        ),
    )


def text(n_tokens: int | None, what: str = "calibration", default: str = "") -> Shared:
    """--data and --tokens as one TextChoice. default: in words, where it is no number."""
    return Shared(_text_options(n_tokens, what, default=default), "text", _text)


evaluation = Shared(_text_options(32768, "evaluation", "eval-"), "evaluation", _evaluation)
memory = click.option("--memory", type=SIZE, default=None, help="Memory for the pass, like 16GB. Default: all.")
calibration = Shared(
    (text(None, default="131072; on a GPU 4 a dimension of an expert's input, if there is room"), memory),
    "calibration",
    _calibration,
)
imatrix = click.option("--imatrix", type=FILE, default=None, help="Use this importance instead of calibrating.")

device = click.option(
    "--device",
    default=None,
    metavar="cpu|cuda[:N]",
    callback=_device,
    help="Default: a GPU if there is one.",
)
target = click.option(
    "--target",
    default=None,
    metavar="TARGET",
    help="What the file is for: ktransformers, llama.cpp or ollama; with /combined, kv_b in one tensor, as their old "
    "versions read it; with /deepseek2, V3.2 without its indexer. Overrides the recipe's.",
)


def _recipes(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Names that a shell can complete to."""
    return [name for name in bundle.recipe_names() if name.startswith(incomplete)]


recipe = click.option(
    "--recipe",
    default=None,
    metavar="NAME|FILE",
    shell_complete=_recipes,
    help="Default: 1.58bit, or auto if a budget is given. `quantkit recipes` lists them.",
)
context = click.option(
    "--context", "-c", default="16k", show_default=True, type=TOKENS, help="Tokens that the KV cache is to hold."
)
measured = click.option(
    "--sensitivity",
    "measured",
    type=FILE,
    default=None,
    help="sensitivity.json of this model. Default: a prior that knows no model.",
)
limits = Shared(
    (
        click.option(
            "--size", type=SizeOrBits(), default=None, help="Budget: the whole file, like 140GB, or bits, like 1.8bpw."
        ),
        click.option("--ram", type=SIZE, default=None, help="Budget: RAM for the model where it will run."),
        click.option("--vram", type=SIZE, default=None, help="Budget: VRAM there, for all but the experts."),
    )
)
types = Shared((recipe, target, Shared((limits,), "budget", _budget)), "types", _types)
types_and_machine = Shared((recipe, target, Shared((limits, context, measured), "budget", _budget)), "types", _types)

_threads = partial(click.option, "--threads", "-t", default=None, type=click.IntRange(1))
threads = _threads(
    callback=_use_threads,
    expose_value=False,
    help="CPU threads. Default: $OMP_NUM_THREADS, or the physical cores that this process may use.",
)
their_threads = _threads(help="CPU threads there. Default: as many as here.")
encoder = click.option(
    "--encoder",
    type=OneOf(["auto", "quantkit", "ggml"]),
    default="auto",
    show_default=True,
    help="Who packs the blocks. auto: quantkit on a GPU and for small models.",
)
effort = click.option(
    "--effort",
    type=OneOf(["fast", "normal", "best"]),
    default="normal",
    show_default=True,
    help="How long quantkit's encoders search.",
)
split = click.option(
    "--split-max-size",
    "split_max_bytes",
    type=SIZE,
    default="50GB",
    show_default=True,
    help="Largest file, like 50GB or 4096M; 0 for a single file.",
)
restart = click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
run_ram = click.option(
    "--ram", type=SIZE, default=None, help="RAM for the file; experts beyond it are read as needed. Default: all."
)
gpu_layers = click.option(
    "--gpu-layers",
    "-ngl",
    type=GpuLayers(),
    default="auto",
    show_default=True,
    help="Layers whose routed experts stay in GPU memory; n%: so much of all experts, those chosen most; auto: as many "
    "of those as fit.",
)


@dataclass(frozen=True)
class Placement:
    """Where a model runs: device (None: a GPU if there is one), bytes of RAM for it (None: all), layers whose routed
    experts stay in GPU memory (float: the share of all experts that does)."""

    device: str | None
    ram: int | None
    gpu_layers: int | float | Literal["auto"]


placement = Shared((run_ram, device, gpu_layers), "placement", Placement)
