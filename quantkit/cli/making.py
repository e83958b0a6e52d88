"""`make`, and the stages that it runs one after another, each by itself."""

from pathlib import Path

import click

from quantkit import sizes
from quantkit.cli import options
from quantkit.cli.options import FILE, OUT, parse_size


@click.command()
@click.argument("model", default="tiny-r1")
@options.types
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    default=None,
    help="Folder for the results. Default: MODEL-RECIPE here.",
)
@options.text(131072)
@options.text(32768, "eval-", "evaluation")
@options.common_text
@options.calibration
@click.option("--imatrix", type=FILE, default=None, help="Use this importance instead of calibrating.")
@options.encoder
@options.effort
@options.device
@options.workers
@options.split
@options.restart
@click.option(
    "--recover/--no-recover",
    default=False,
    show_default=True,
    help="Tune scales, norms and 4-bit matrices on the divergence afterwards. Needs the decoded model in memory.",
)
@click.option("--verify/--no-verify", default=True, help="End with perplexity and divergence from the original.")
def make(
    model,
    recipe,
    target,
    budget,
    output,
    data,
    tokens,
    eval_data,
    eval_tokens,
    column,
    chunk,
    from_start,
    min_expert_tokens,
    expert_tokens,
    memory,
    hidden,
    imatrix,
    encoder,
    effort,
    device,
    workers,
    split_max_size,
    restart,
    recover,
    verify,
):
    """Make a low-bit GGUF: calibrate, plan, quantize, verify. MODEL: folder, bundled name or Hub id."""
    from quantkit.evaluation.summary import short_table
    from quantkit.job import make as pipeline
    from quantkit.job import plan as plans

    name = Path(plans.recipe_name(recipe, budget)).name.removesuffix(".toml").removesuffix(".json")
    folder = output or Path(f"{Path(model).name}-{name}")
    asked = pipeline.MakeOptions(
        recipe=recipe,
        target=target,
        budget=budget,
        calibration=pipeline.Calibration(
            pipeline.TextChoice(data, column, tokens, chunk, from_start),
            min_expert_tokens,
            expert_tokens,
            parse_size(memory, "--memory") if memory else None,
            hidden,
        ),
        evaluation=pipeline.TextChoice(eval_data, column, eval_tokens, chunk, from_start),
        imatrix=imatrix,
        encoder=encoder,
        effort=effort,
        device=device,
        workers=workers,
        split_max_bytes=parse_size(split_max_size),
        restart=restart,
        verify=verify,
        recover=recover,
    )
    files, result = pipeline.make(model, folder, asked)
    click.echo(short_table(result, files[0]) if result else "\n".join(map(str, files)))


@click.command()
@click.argument("model", default="tiny-r1")
@click.option("--output", "-o", type=OUT, default="imatrix.gguf", show_default=True)
@options.text(131072)
@options.common_text
@options.calibration
@options.device
@options.restart
def calibrate(
    model,
    output,
    data,
    tokens,
    column,
    chunk,
    from_start,
    min_expert_tokens,
    expert_tokens,
    memory,
    hidden,
    device,
    restart,
):
    """Measure importance: run text through the model, layer by layer, and write an imatrix. Resumes.

    MODEL is a checkpoint folder, a bundled name, a Hub id or a GGUF file.
    """
    from quantkit.job import make as pipeline

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    limit = parse_size(memory, "--memory") if memory else None
    how = pipeline.Calibration(choice, min_expert_tokens, expert_tokens, limit, hidden)
    source = pipeline.open_for_calibration(model, device or pipeline.default_device())
    pipeline.calibrate(source, how, output, restart)
    click.echo(str(output))


@click.command()
@click.argument("model", default="tiny-r1")
@click.option("--imatrix", type=FILE, required=True, help="Importance, for encoding the variants.")
@click.option(
    "--output",
    "-o",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    help="Folder for sensitivity.json and sensitivity.png.",
)
@options.text(8192, "", "measurement")
@options.common_text
@click.option("--tier", type=click.Choice(["full", "cheap"]), default=None, help="Default: full if --budget allows.")
@click.option(
    "--budget",
    default=1 << 21,
    show_default=True,
    type=click.IntRange(1),
    help="Stream-tokens: tokens x forks carried through the layers.",
)
@click.option("--types", default=None, metavar="A,B", help="Types to try on routed experts.")
@click.option("--other-types", default=None, metavar="A,B", help="Types to try on all other tensors.")
@options.device
def sensitivity(
    model, imatrix, output, data, tokens, column, chunk, from_start, tier, budget, types, other_types, device
):
    """What each tensor's type costs: KL divergence at the output if only that tensor is quantized, in one pass."""
    from quantkit.calibration.sensitivity import DEFAULT, Candidates
    from quantkit.job import make as pipeline

    choice = pipeline.TextChoice(data, column, tokens, chunk, from_start)
    source = pipeline.source_of(pipeline.open_weights(model), device or pipeline.default_device())
    chosen = Candidates(
        tuple(types.split(",")) if types else DEFAULT.routed,
        tuple(other_types.split(",")) if other_types else DEFAULT.others,
    )
    pipeline.measure_sensitivity(source, imatrix, choice, output, types=chosen, tier=tier, budget=budget)
    click.echo(str(output / "sensitivity.json"))


@click.command()
@click.argument("model", default="tiny-r1")
@options.types
@click.option("--compare", nargs=2, default=None, metavar="A B", help="Show two plans: recipes or plan.json files.")
@click.option("--plot", type=OUT, default=None, help="Draw the bit map here: a .png or .svg file.")
@click.option("--output", "-o", type=OUT, default=None, help="Write plan.json here (with .png or .svg: as --plot).")
def plan(model, recipe, target, budget, compare, plot, output):
    """Choose a type for every tensor, by rules or within a budget, and show sizes. Needs no weights: try
    `quantkit plan deepseek-r1 --size 131GB`."""
    from quantkit.job import plan as plans
    from quantkit.planning import table

    if compare:
        pair = [plans.load_or_plan(model, name, target, budget) for name in compare]
        click.echo(table.compare(*pair, *(plans.predict_plan(model, one, budget.measured) for one in pair)))
        return
    chosen = plans.plan_model(model, recipe, target, budget)
    if plot := plot or (output if output and output.suffix in (".png", ".svg") else None):
        from quantkit.planning import bitmap  # matplotlib takes a second to load

        bitmap.draw(chosen, plot)
    if output and output != plot:
        output.write_text(chosen.to_json(), encoding="utf-8")
    click.echo(table.render(chosen))
    kld = plans.predict_plan(model, chosen, budget.measured)
    basis = str(budget.measured or "prior")
    click.echo(table.outlook(chosen, plans.plan_file_bytes(model, chosen), kld, basis))


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
@click.option("--ram", default=None, metavar="SIZE", help="RAM for the model. Default: this machine's.")
@click.option("--vram", default=None, metavar="SIZE", help="VRAM for it. Default: this machine's free VRAM.")
@click.option("--ram-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured.")
@click.option("--gpu-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured, if there is a GPU.")
@click.option("--disk-bandwidth", default=None, metavar="GB/S", type=float, help="Default: measured with --disk.")
@click.option("--disk", type=FILE, default=None, help="A file of 1 GB or more on that disk, to measure reading.")
@options.context
@click.option("--threads", default=None, type=click.IntRange(1), help="CPU threads. Default: this machine's cores.")
def hardware(model, recipes, target, ram, vram, ram_bandwidth, gpu_bandwidth, disk_bandwidth, disk, context, threads):
    """Which recipes fit a machine, how fast they can be, and the commands that start them."""
    from quantkit.job import hardware as view

    named = (("--ram", ram), ("--vram", vram))
    given = [sizes.parse_size(text, name) if text is not None else None for name, text in named]
    machine = view.machine_of(*given, ram_bandwidth, gpu_bandwidth, disk_bandwidth, disk)
    click.echo(view.hardware_report(model, recipes, target, machine, options.parse_context(context), threads))


@click.command()
@click.argument("model")
@click.option("--plan", "plan_file", type=FILE, required=True, help="plan.json of `quantkit plan`.")
@click.option("--imatrix", type=FILE, required=True)
@click.option("--output", "-o", type=OUT, required=True)
@options.workers
@options.split
@options.restart
@click.option("--overwrite", is_flag=True, help="Replace a finished file of that name.")
def quantize(model, plan_file, imatrix, output, workers, split_max_size, restart, overwrite):
    """Encode every tensor as planned, with ggml, and write the GGUF file(s). Resumes where an earlier run stopped."""
    from quantkit.job import make as pipeline
    from quantkit.planning.plan import Plan

    chosen = Plan.from_json(plan_file.read_bytes(), str(plan_file))
    files = pipeline.quantize_model(
        pipeline.open_weights(model),
        chosen,
        imatrix,
        output,
        workers=workers,
        split_max_bytes=parse_size(split_max_size),
        restart=restart,
        overwrite=overwrite,
    )
    click.echo("\n".join(map(str, files)))
