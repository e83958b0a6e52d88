"""Options that several commands share, what their values mean, and how they are handed on: as one noun each."""

import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from quantkit import bundle, machine
from quantkit.cli.values import FILE, IMATRIX, SIZE, TOKENS, FileSize, GpuLayers, OneOf, SizeOrBits
from quantkit.errors import QuantkitError

if TYPE_CHECKING:
    from quantkit.calibration.corpus import TextChoice
    from quantkit.calibration.options import Calibration
    from quantkit.planning.budget import BudgetOptions


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


def checked(check: Callable[..., None]) -> Decorator:
    """A decorator above all options of a command: `check` sees those values that it has parameters for before anything
    is made of them, which may take torch."""
    wanted = inspect.signature(check).parameters

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def guarded(**values: Any) -> Any:
            check(**{name: values[name] for name in wanted})
            return command(**values)

        return guarded

    return decorate


def _arguments(option: Decorator | Shared) -> tuple[str, ...]:
    if isinstance(option, Shared):
        return option.arguments

    def probe() -> None:
        """Where click notes an option."""

    option(probe)
    return tuple(parameter.name for parameter in vars(probe)["__click_params__"])


def _device(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuses, before torch is loaded, what is no device, and a GPU without driver; `chosen_device` finds the rest."""
    if value is not None:
        machine.known_device(value)
        machine.check_driver(value)
    return value


def _recipe(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuses, before torch is loaded, a recipe that is not there or has errors."""
    if value is not None:
        from quantkit.job.asked import check_recipe

        check_recipe(os.path.expanduser(value))
    return value


def check_recipes(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The same of several."""
    for value in values or ():
        _recipe(ctx, param, value)
    return values


def check_closed(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """The same of several that get no budget."""
    from quantkit.job.asked import check_types
    from quantkit.planning.budget import NO_BUDGET

    for value in check_recipes(ctx, param, values):
        check_types("", os.path.expanduser(value), NO_BUDGET)
    return values


def _check_data(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """Refuses, before torch is loaded, a text that is not there."""
    from quantkit.calibration.sources import parse

    for value in values:
        if not value:
            raise QuantkitError("--data and --eval-data take a file, a folder or a dataset; one of them is empty")
        parse(os.path.expanduser(value)).files()
    return values


def check_target(_: click.Context, __: click.Parameter, value: str | None) -> str | None:
    """Refuses, before torch is loaded, what is no target."""
    if value is not None:
        from quantkit.planning import targets

        targets.parse(value)
    return value


def _targets(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Names that a shell can complete to."""
    from quantkit.planning.targets import TARGETS

    return [name for name in TARGETS if name.startswith(incomplete)]


def _use_threads(_: click.Context, __: click.Parameter, value: int | None) -> None:
    """Of the whole process, before any library that has threads is loaded."""
    if value is not None:
        machine.use_threads(value)


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

    if measured:
        from quantkit.formats.sensitivity import Sensitivity

        Sensitivity.load(measured)
    size = size or FileSize()
    return BudgetOptions(size=size.size, bpw=size.bpw, ram=ram, vram=vram, context=context, measured=measured)


def _types(recipe: str | None, target: str | None, budget: "BudgetOptions") -> Types:
    from quantkit.job.asked import check_types

    recipe = os.path.expanduser(recipe) if recipe else recipe
    check_types(click.get_current_context().params["model"], recipe, budget)
    return Types(recipe, target, budget)


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
            callback=_check_data,
            metavar="TEXT",
            help=f"{what.capitalize()} text: file, folder or dataset id, with the column after a colon (FILE:body, "
            '"FILE:{question} {answer}"); may be repeated. Default: the bundled mix.',
        ),
        click.option(
            f"--{prefix}tokens",
            default=n_tokens,
            show_default=default or True,
            type=TOKENS,
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
imatrix = click.option("--imatrix", type=IMATRIX, default=None, help="Use this importance instead of calibrating.")

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
    callback=check_target,
    shell_complete=_targets,
    help="What the file is for: ktransformers, llama.cpp or ollama; with /combined, kv_b in one tensor, as their old "
    "versions read it; with /deepseek2, V3.2 without its indexer. Overrides the recipe's.",
)


def recipe_completion(_: click.Context, __: click.Parameter, incomplete: str) -> list[str]:
    """Names that a shell can complete to."""
    from quantkit.planning import mixtures

    return [name for name in (*bundle.recipe_names(), *mixtures.BASE) if name.startswith(incomplete)]


recipe = click.option(
    "--recipe",
    default=None,
    metavar="NAME|FILE",
    shell_complete=recipe_completion,
    callback=_recipe,
    help="Also Q4_K_M, IQ2_XXS and so on. Default: 1.58bit, or auto if a budget is given. `quantkit recipes` lists "
    "them.",
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
mtp = click.option(
    "--mtp/--no-mtp",
    default=True,
    help="With the layer that drafts the token after the next, in V3.2 and GLM-5. llama.cpp: --spec-type draft-mtp.",
)
types = Shared((recipe, target, Shared((limits,), "budget", _budget)), "types", _types)
types_and_machine = Shared((recipe, target, Shared((limits, context, measured), "budget", _budget)), "types", _types)

_threads = partial(click.option, "--threads", "-t", default=None, type=click.IntRange(1))
threads = _threads(
    callback=_use_threads,
    expose_value=False,
    is_eager=True,
    help="CPU threads. Default: $OMP_NUM_THREADS, or the physical cores that this process may use.",
)
their_threads = _threads(help="CPU threads there. Default: as --cpu has cores, else as here.")
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


as_json = click.option("--json", "as_json", is_flag=True, help="The same for programs, on stdout.")


@dataclass(frozen=True)
class Placement:
    """Where a model runs: device (None: a GPU if there is one), bytes of RAM for it (None: all), layers whose routed
    experts stay in GPU memory (float: the share of all experts that does)."""

    device: str | None
    ram: int | None
    gpu_layers: int | float | Literal["auto"]


placement = Shared((run_ram, device, gpu_layers), "placement", Placement)
