"""Commands for finished files: look into them, hand them on."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from quantkit.cli import options, streams
from quantkit.cli.options import Shared
from quantkit.cli.values import FOLDER, MODEL, MODEL_FILE, Place
from quantkit.errors import QuantkitError, needs

if TYPE_CHECKING:
    from quantkit.job.publish.upload import Destination


@click.command()
@click.argument("path", type=MODEL)
@options.as_json
def inspect(path: str, as_json: bool) -> None:
    """What a checkpoint (folder, bundled name or Hub id) or a GGUF file holds, from headers alone."""
    from quantkit.job.inspect import describe, facts

    if as_json:
        streams.show_json(facts(path))
    else:
        streams.show(describe(path))


@click.command()
def families() -> None:
    """Which models are supported, how well, and which come along for `plan` without weights."""
    from quantkit.job.families import describe

    streams.show(describe())


def _check_export(output: Path | None) -> None:
    """QuantkitError for a folder that is there."""
    from quantkit.job.asked import check_new_folder

    check_new_folder(output)


@click.command("export-kt")
@options.checked(_check_export)
@click.argument("file", type=MODEL_FILE)
@click.option("--output", "-o", default=None, type=Place(path_type=Path), help="Folder. Default: NAME-kt beside it.")
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
    streams.show(f"{made}\nstart it with {shlex.quote(str(made / kt_export.LAUNCH))} chat")


@click.command()
@click.argument("folders", type=FOLDER, nargs=-1, required=True, metavar="FOLDER...")
def report(folders: tuple[Path, ...]) -> None:
    """One page about the FOLDER that `make` left, without outside requests, and its figures as PNGs. Of several folders
    one page that compares them: compare.html here."""
    from quantkit.job.asked import check_reportable

    check_reportable(folders)
    with needs("plots"):
        from quantkit.formats.lock import locked
        from quantkit.job.report.compare import write_comparison
        from quantkit.job.report.page import write_report

    if len(folders) > 1:
        streams.show(str(write_comparison(folders, Path())))
        return
    with locked(folders[0], shared=True):
        streams.show("\n".join(map(str, write_report(folders[0]))))


def _target(**given: Any) -> "Destination":
    """given: fields of Destination, by their names."""
    from quantkit.job.publish.upload import Destination

    return Destination(**given)


def _check_publishable(folder: Path, repo: str) -> None:
    """QuantkitError for a folder or a repository that cannot be one."""
    from quantkit.job.asked import check_publishable

    check_publishable(folder, repo)


@click.command()
@options.checked(_check_publishable)
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
