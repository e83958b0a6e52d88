"""`make --dry-run`: what `make` would do where it is asked to: all of it, what is left of it, or nothing more."""

from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.job.finished import check_notes, difference, scored_before
from quantkit.job.folder import BASELINE, PROVENANCE, VERIFY, claim, finished_files
from quantkit.job.forecast import forecast
from quantkit.job.plan import file_bytes
from quantkit.job.stages import source_of
from quantkit.job.status import unfinished
from quantkit.sizes import both_units

if TYPE_CHECKING:
    from quantkit.job.options import Order


def what_it_takes(order: "Order") -> list[str]:
    """What `make` would read, write and take, in lines, and what is done already; nothing is written. QuantkitError
    for a folder of another job, and for a finished one whose notes were changed, as `make` refuses them."""
    restart = order.options.restart
    if not restart:
        claim(order.folder, order.identity, restart=False, given=order.options.imatrix)
    files = [] if restart else finished_files(order.out)
    if files and (why := difference(files, order.identity, read=False)):
        return [f"again       {files[0].name}: {why}", *_whole(order)]
    if files:
        check_notes(order.folder, order.identity)
        return _finished(order, files)
    return [*_done(order), *_whole(order)]


def _whole(order: "Order") -> list[str]:
    """Of all of it."""
    n_bytes = file_bytes(order.checkpoint, order.plan, order.options.split_max_bytes)
    return forecast(order, source_of(order.checkpoint, order.device), n_bytes)


def _finished(order: "Order", files: list[Path]) -> list[str]:
    """Where the file is there."""
    options, size = order.options, sum(file.stat().st_size for file in files)
    lines = [f"finished    {files[0].name}, {both_units(size)}: read once, to know its bytes again; nothing is encoded"]
    if options.verify:
        lines.append(f"scores      {_scores(order, VERIFY)}")
    if options.baseline:
        lines.append(f"baseline    {_scores(order, BASELINE)}")
    return lines


def _scores(order: "Order", name: str) -> str:
    if scored_before(order.folder, order.options.evaluation, name):
        return f"known ({name})"
    what = "this file and the original are" if name == VERIFY else "the same types are encoded by ggml; all three are"
    return f"not yet: {what} read, layer by layer, for {order.options.evaluation.n_tokens or 0:,} tokens"


def _done(order: "Order") -> list[str]:
    """What a run that was stopped has left, as `status` says it; and that the forecast behind it is of all."""
    if order.options.restart or not (order.folder / PROVENANCE).is_file():
        return []
    there = unfinished(order.folder)
    return [*there, "            is done already; all of it, with that:"] if there else []
