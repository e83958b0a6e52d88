"""`make`, and the stages that it runs one after another, each by itself."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, streams
from quantkit.cli.options import FILE, FOLDER, OUT, OUT_FOLDER, SIZE, Shared, Types
from quantkit.errors import QuantkitError, needs

if TYPE_CHECKING:
    from quantkit.calibration.options import Calibration
    from quantkit.job.options import MakeOptions
    from quantkit.job.stages import QuantizeOptions, SensitivityOptions
    from quantkit.planning.hardware import Machine

MOST_BANDWIDTH = 1e6  # GB/s: more is a slip


def _make_options(types: Types, split_max_bytes: int, **rest: Any) -> "MakeOptions":
    """rest: fields of MakeOptions, by their names."""
    from quantkit.job.options import MakeOptions

    return MakeOptions(**vars(types), split_max_bytes=split_max_bytes or None, **rest)


@click.command()
@click.argument("model", default="tiny-r1")
@click.option(
    "--output", "-o", type=OUT_FOLDER, default=None, help="Folder for the results. Default: MODEL-RECIPE here."
)
@Shared(
    (
        options.types,
        options.calibration,
        options.evaluation,
        options.imatrix,
        options.encoder,
        options.effort,
        options.device,
        options.split,
        options.restart,
        click.option(
            "--recover",
            is_flag=True,
            help="Tune norms, routers, matrices and experts' scales on the divergence afterwards, layer by layer.",
        ),
        click.option(
            "--verify/--no-verify", default=True, help="End with perplexity and divergence from the original."
        ),
        click.option(
            "--baseline", is_flag=True, help="Also score the same types by ggml's encoder: a second file, for a while."
        ),
        click.option("--dry-run", is_flag=True, help="Say what it would read, write and take; do nothing."),
    ),
    "asked",
    _make_options,
)
@options.threads
def make(model: str, output: Path | None, asked: "MakeOptions") -> None:
    """Make a low-bit GGUF: calibrate, plan, quantize, verify. MODEL (default: bundled tiny-r1): folder, bundled name
    or Hub id (user/name@revision; disk for what is downloaded: $QUANTKIT_CACHE_SIZE)."""
    from quantkit.evaluation.summary import short_table
    from quantkit.job.make import make, what_it_takes

    if asked.dry_run:
        streams.show("\n".join(what_it_takes(model, output, asked)))
        return
    files, result = make(model, output, asked)
    streams.show(short_table(result, files[0]) if result else "\n".join(map(str, files)))


@click.command()
@click.argument("model", default="tiny-r1")
@click.option("--output", "-o", type=OUT, default="imatrix.gguf", show_default=True)
@options.calibration
@click.option(
    "--gradients",
    type=OUT_FOLDER,
    default=None,
    help="Also derive the model's loss, layer by layer back, and write gradients-NNN.safetensors here.",
)
@click.option(
    "--gradient-tokens",
    default=16384,
    show_default=True,
    type=click.IntRange(1),
    help="Most tokens of calibration text for that.",
)
@options.device
@options.restart
def calibrate(
    model: str,
    output: Path,
    calibration: "Calibration",
    gradients: Path | None,
    gradient_tokens: int,
    device: str | None,
    restart: bool,
) -> None:
    """Measure importance: run text through the model, layer by layer, and write an imatrix. Resumes.

    MODEL (default: tiny-r1) is a checkpoint folder, a bundled name, a Hub id or a GGUF file.
    """
    from quantkit.calibration import measure
    from quantkit.calibration.gradients import GradientOptions, calibrate_gradients
    from quantkit.formats.lock import locked
    from quantkit.job import stages
    from quantkit.machine import chosen_device

    source = stages.open_for_calibration(model, chosen_device(device))
    with locked(output.parent), locked(gradients or output.parent):
        if gradients:  # first: what is finished of them is not done again, so a rerun goes on in either pass
            text = dataclasses.replace(calibration.text, n_tokens=gradient_tokens)
            calibrate_gradients(source, GradientOptions(text, memory=calibration.memory), gradients, restart)
        measure.calibrate(source, calibration, output, restart)
    streams.show(str(output))


def _sensitivity_options(types: str | None, other_types: str | None, **rest: Any) -> "SensitivityOptions":
    from quantkit.calibration.variants import DEFAULT, Candidates
    from quantkit.job.stages import SensitivityOptions

    routed = tuple(types.split(",")) if types else DEFAULT.routed
    others = tuple(other_types.split(",")) if other_types else DEFAULT.others
    return SensitivityOptions(types=Candidates(routed, others) if types or other_types else None, **rest)


@click.command()
@click.argument("model", default="tiny-r1")
@click.option(
    "--imatrix",
    "--gradients",
    "basis",
    type=click.Path(exists=True, path_type=Path),
    required=True,
    help="An imatrix, to measure types as ggml encodes them; or a folder of `calibrate --gradients`, to estimate them "
    "for quantkit's encoder.",
)
@click.option(
    "--output",
    "-o",
    type=OUT_FOLDER,
    default=Path("."),
    help="Folder for sensitivity.json and sensitivity.png.",
)
@Shared(
    (
        options.text(None, "measurement", "8192, with gradients as in `calibrate`"),
        click.option(
            "--budget",
            default=1 << 21,
            show_default=True,
            type=click.IntRange(1),
            help="Stream-tokens: tokens x forks carried through the layers. Too few for all forks: a cheaper "
            "estimate, by layer.",
        ),
        click.option(
            "--types",
            default=None,
            metavar="A,B",
            help="Types to try on routed experts. Default: five; all with --gradients.",
        ),
        click.option(
            "--other-types",
            default=None,
            metavar="A,B",
            help="Types to try on all other tensors. Default: four, or all.",
        ),
    ),
    "how",
    _sensitivity_options,
)
@options.device
def sensitivity(model: str, basis: Path, output: Path, how: "SensitivityOptions", device: str | None) -> None:
    """What each tensor's type costs: KL divergence at the output if only that tensor is quantized, in one pass.

    MODEL's default is tiny-r1. `plan --sensitivity` goes by what is found."""
    from quantkit.job import stages
    from quantkit.job.folder import SENSITIVITY
    from quantkit.machine import chosen_device
    from quantkit.models.open import open_weights

    device = chosen_device(device)
    source = stages.source_of(open_weights(model), device)
    stages.measure_sensitivity(source, basis, output, how)
    streams.show(str(output / SENSITIVITY))


@click.command()
@click.argument("model", default="tiny-r1")
@options.types_and_machine
@click.option("--compare", nargs=2, default=None, metavar="A B", help="Show two plans: recipes or plan.json files.")
@click.option(
    "--output",
    "-o",
    "outputs",
    type=OUT,
    multiple=True,
    help="Write here: plan.json (-: to stdout, alone), or with .png or .svg the bit map drawn; may be repeated.",
)
def plan(model: str, types: Types, compare: tuple[str, str] | None, outputs: tuple[Path, ...]) -> None:
    """Choose a type for every tensor, by rules or within a budget, and show sizes. Needs no weights: try
    `quantkit plan deepseek-r1 --size 150GB`. MODEL's default is tiny-r1."""
    from quantkit.formats.lock import locked
    from quantkit.formats.whole_file import write_text
    from quantkit.job.plan import basis, load_or_plan, plan_file_bytes, plan_model, predict_plan
    from quantkit.planning import table

    target, budget = types.target, types.budget
    if compare and outputs:
        raise QuantkitError("--compare shows two plans and writes none: leave -o out")
    if compare:
        a, b = (load_or_plan(model, name, target, budget) for name in compare)
        streams.show(table.compare(a, b, *(predict_plan(model, one, budget.measured) for one in (a, b))))
        return
    chosen = plan_model(model, types.recipe, target, budget)
    for output in outputs:
        if str(output) == "-":
            streams.show(chosen.to_json())
            return
        with locked(output.parent, shared=True):
            if output.suffix not in (".png", ".svg"):
                write_text(output, chosen.to_json())
                continue
            with needs("plots"):
                from quantkit.planning import bitmap  # matplotlib takes a second to load

            bitmap.draw(chosen, output)
    streams.show(table.render(chosen))
    kld = predict_plan(model, chosen, budget.measured)
    streams.show(table.outlook(chosen, plan_file_bytes(model, chosen), kld, basis(model, chosen, budget.measured)))


def _machine(bandwidths: tuple[str, ...], **sizes: Any) -> "Machine":
    """bandwidths: `ram=80`, `disk=FILE`; QuantkitError for what is neither. sizes: as `machine_of` takes them."""
    rates: dict[str, float] = {}
    disk = None
    for given in bandwidths:
        part, _, value = given.partition("=")
        if part == "disk" and Path(value).is_file():
            disk = Path(value)
            continue
        try:
            rates[part] = float(value)
        except ValueError:
            rates[part] = 0.0
        if part not in ("ram", "gpu", "disk") or not 0 < rates[part] < MOST_BANDWIDTH:
            raise QuantkitError(f"--bandwidth {given}: write ram=80, gpu=900 or disk=3, in GB/s, or disk=FILE")
    from quantkit.planning import presets

    for known, name in ((presets.gpu, sizes.get("gpu")), (presets.cpu, sizes.get("cpu"))):
        if name:
            known(name)
    from quantkit.job.hardware import Named, machine_of  # torch takes a second to load

    return machine_of(Named(**sizes), {part: rate * 1e9 for part, rate in rates.items()}, disk)


@click.command()
@click.argument("model", default="deepseek-r1")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME|FILE",
    help="Recipe or plan.json; may be repeated. Default: the bundled ones with fixed types.",
)
@options.target
@Shared(
    (
        click.option("--ram", type=SIZE, default=None, help="RAM for the model. Default: this machine's."),
        click.option("--vram", type=SIZE, default=None, help="VRAM for it. Default: this machine's free VRAM."),
        click.option("--gpu", metavar="NAME", default=None, help="A GPU that is not here: 3090, 4090, h200, …"),
        click.option("--cpu", metavar="NAME", default=None, help="A CPU that is not here: epyc-9004, xeon-4, …"),
        click.option(
            "--bandwidth",
            "bandwidths",
            multiple=True,
            metavar="PART=GB/S",
            help="Of ram, gpu or disk; may be repeated. Default: measured here, the disk's by --bandwidth disk=FILE, a "
            "file of 1 GB or more on it.",
        ),
        options.their_threads,
    ),
    "machine",
    _machine,
)
@options.context
def hardware(model: str, recipes: tuple[str, ...], target: str | None, machine: "Machine", context: int) -> None:
    """Which recipes fit a machine, how fast they can be, and the commands that start them. MODEL's default is
    deepseek-r1."""
    from quantkit.job.hardware import hardware_report

    streams.show(hardware_report(model, recipes, target, machine, context, machine.threads))


def _quantize_options(split_max_bytes: int, **rest: Any) -> "QuantizeOptions":
    """rest: fields of QuantizeOptions, by their names."""
    from quantkit.job.stages import QuantizeOptions

    return QuantizeOptions(split_max_bytes=split_max_bytes or None, **rest)


@click.command()
@click.argument("model")
@click.option("--plan", "plan_file", type=FILE, required=True, help="plan.json of `quantkit plan`.")
@click.option("--imatrix", type=FILE, required=True)
@click.option("--output", "-o", type=OUT, required=True)
@Shared(
    (
        options.split,
        options.restart,
        click.option("--overwrite", is_flag=True, help="Replace a finished file of that name."),
    ),
    "how",
    _quantize_options,
)
@options.threads
def quantize(model: str, plan_file: Path, imatrix: Path, output: Path, how: "QuantizeOptions") -> None:
    """Encode every tensor as planned, with ggml, and write the GGUF file(s). Resumes where an earlier run stopped."""
    from quantkit.formats.byte_source import read_whole
    from quantkit.job import stages
    from quantkit.models.open import open_weights
    from quantkit.planning.plan import Plan

    chosen = Plan.from_json(read_whole(plan_file, "plan"), str(plan_file))
    files = stages.quantize_model(open_weights(model), chosen, imatrix, output, how)
    streams.show("\n".join(map(str, files)))


@click.command()
@click.argument("folder", type=FOLDER)
def status(folder: Path) -> None:
    """How far the job is that works in FOLDER, or was stopped there: layers, bytes, time left, scores."""
    from quantkit.job.status import status

    streams.show("\n".join(status(folder)))


@click.command()
@click.argument("name", required=False)
def recipes(name: str | None) -> None:
    """The bundled recipes, a line each; with NAME its rules, to be read and changed:
    `quantkit recipes 1.58bit > my.toml`."""
    from quantkit import bundle
    from quantkit.planning.recipe import Recipe

    if name:
        streams.show(Recipe.text(name).rstrip("\n"))
        return
    for each in map(Recipe.load, bundle.recipe_names()):
        kind = "within a budget" if each.is_open else "fixed types"
        streams.show(f"{each.name:<12} {each.target:<14} {kind:<16} {each.description}")
