"""`make`, what is decided before it, and how far it is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import options, streams
from quantkit.cli.options import Shared, Types
from quantkit.cli.values import FOLDER, MODEL, OUT, OUT_FOLDER, SIZE, WEIGHTS
from quantkit.errors import QuantkitError, needs

if TYPE_CHECKING:
    from quantkit.job.options import MakeOptions
    from quantkit.planning.hardware import Machine
    from quantkit.planning.recipe import Recipe

LINE = 80  # columns of a list
MOST_BANDWIDTH = 1e6  # GB/s: more is a slip


def _make_options(types: Types, split_max_bytes: int, **rest: Any) -> "MakeOptions":
    """rest: fields of MakeOptions, by their names."""
    from quantkit.job.options import MakeOptions

    return MakeOptions(**vars(types), split_max_bytes=split_max_bytes or None, **rest)


def _check_make(
    encoder: str, effort: str, imatrix: Path | None, data: tuple[str, ...], recover: bool, verify: bool, baseline: bool
) -> None:
    """QuantkitError for options that exclude each other."""
    from quantkit.job.asked import check_baseline, check_encoder, check_unused

    check_encoder(encoder, imatrix)
    check_unused(encoder, effort, imatrix, () if recover else data)  # recovery tunes on the text
    if baseline:
        check_baseline("ggml" if imatrix else encoder, recover, verify)


@click.command()
@options.checked(_check_make)
@click.argument("model", type=WEIGHTS, default="tiny-r1")
@click.option(
    "--output", "-o", type=OUT_FOLDER, default=None, help="Folder for the results. Default: MODEL-RECIPE here."
)
@Shared(
    (
        options.types,
        options.mtp,
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
    """Make a low-bit GGUF: calibrate, plan, quantize, verify. MODEL (default: bundled tiny-r1): folder, GGUF,
    bundled name or Hub id (user/name@revision; disk for what is downloaded: $QUANTKIT_CACHE_SIZE)."""
    from quantkit.evaluation.summary import short_table
    from quantkit.job.dry_run import what_it_takes
    from quantkit.job.make import make, order_of

    if asked.dry_run:
        streams.show("\n".join(what_it_takes(order_of(model, output, asked))))
        return
    files, result = make(model, output, asked)
    streams.show(short_table(result, files[0]) if result else "\n".join(map(str, files)))


@click.command()
@click.argument("model", type=MODEL, default="tiny-r1")
@options.types_and_machine
@options.mtp
@click.option(
    "--compare",
    nargs=2,
    default=None,
    metavar="A B",
    callback=options.check_recipes,
    help="Show two plans: recipes or plan.json files.",
)
@click.option(
    "--output",
    "-o",
    "outputs",
    type=OUT,
    multiple=True,
    help="Write here: plan.json (-: to stdout, alone), or with .png or .svg the bit map drawn; may be repeated.",
)
@options.as_json
def plan(
    model: str,
    types: Types,
    mtp: bool,
    compare: tuple[str, str] | None,
    outputs: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Choose a type for every tensor, by rules or within a budget, and show sizes. Needs no weights: try
    `quantkit plan deepseek-r1 --size 150GB`. MODEL's default is tiny-r1."""
    from quantkit.job.asked import PICTURES, check_plan_outputs

    target, budget = types.target, types.budget
    if compare and (outputs or as_json):
        raise QuantkitError("--compare shows two plans and writes none: leave -o and --json out")
    check_plan_outputs(outputs)
    from quantkit.formats.lock import locked
    from quantkit.formats.whole_file import make_folders, write_text
    from quantkit.job.plan import basis, load_or_plan, plan_file_bytes, plan_model, predict_plan
    from quantkit.planning import table

    if compare:
        a, b = (load_or_plan(model, name, target, budget) for name in compare)
        streams.show(table.compare(a, b, *(predict_plan(model, one, budget.measured) for one in (a, b))))
        return
    chosen = plan_model(model, types.recipe, target, budget, mtp=mtp)
    for output in outputs:
        if str(output) == "-":
            streams.show(chosen.to_json())
            return
        make_folders(output.parent)
        with locked(output.parent, shared=True):
            if output.suffix not in PICTURES:
                write_text(output, chosen.to_json())
                continue
            with needs("plots"):
                from quantkit.planning import bitmap  # matplotlib takes a second to load

            bitmap.draw(chosen, output)
    kld = predict_plan(model, chosen, budget.measured)
    known = chosen, plan_file_bytes(model, chosen), kld, basis(model, chosen, budget.measured)
    if as_json:
        return streams.show_json(table.facts(*known))
    streams.show(table.render(chosen))
    streams.show(table.outlook(*known))


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
@click.argument("model", type=MODEL, default="deepseek-r1")
@click.option(
    "--recipe",
    "recipes",
    multiple=True,
    metavar="NAME|FILE",
    callback=options.check_closed,
    shell_complete=options.recipe_completion,
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
@options.as_json
def hardware(
    model: str,
    recipes: tuple[str, ...],
    target: str | None,
    machine: "Machine",
    context: int,
    as_json: bool,
) -> None:
    """Which recipes fit a machine, how fast they can be, and the commands that start them. MODEL's default is
    deepseek-r1."""
    from quantkit.job.hardware import SPLIT_BYTES, hardware_report
    from quantkit.job.hardware_facts import facts

    if as_json:
        return streams.show_json(facts(model, recipes, target, machine, context, machine.threads, SPLIT_BYTES))
    streams.show(hardware_report(model, recipes, target, machine, context, machine.threads))


@click.command()
@click.argument("folder", type=FOLDER)
def status(folder: Path) -> None:
    """How far the job is that works in FOLDER, or was stopped there: layers, bytes, time left, scores."""
    from quantkit.job.asked import check_job

    check_job(folder)
    from quantkit.job.status import status

    streams.show("\n".join(status(folder)))


@click.command()
@click.argument("name", required=False, shell_complete=options.recipe_completion)
@click.argument("model", type=MODEL, default="deepseek-r1")
def recipes(name: str | None, model: str) -> None:
    """What --recipe takes; with NAME its rules, to be read and changed: `quantkit recipes 1.58bit > my.toml`. Those of
    llama-quantize are written out for MODEL (default: deepseek-r1)."""
    from quantkit import bundle
    from quantkit.planning import mixtures
    from quantkit.planning.recipe import Recipe

    if name and mixtures.known(name):
        from quantkit.job.plan import NO_BUDGET, recipe_text
        from quantkit.models import family
        from quantkit.models.open import open_model

        streams.show((recipe_text(name, NO_BUDGET, family.from_hf(open_model(model).config), "split") or "").rstrip())
        return
    if name:
        streams.show(Recipe.text(name).rstrip("\n"))
        return
    table = click.HelpFormatter(width=LINE)
    with table.section("Bundled"):
        ours = map(Recipe.load, bundle.recipe_names())
        table.write_dl([(each.name, f"{each.description} {kind_of(each)}") for each in ours])
    with table.section(f"As {mixtures.SOURCE}"):
        table.write_dl([(each, mixtures.describe(each)) for each in mixtures.BASE])
    with table.section("Yours"):
        table.write_text("A TOML file, or a plan.json of `quantkit plan`; docs/plan.md has the grammar.")
    streams.show(table.getvalue().rstrip())


def kind_of(recipe: "Recipe") -> str:
    """Who chooses its types, and what for."""
    return f"({'Within a budget' if recipe.is_open else 'Fixed types'}, for {recipe.target}.)"
