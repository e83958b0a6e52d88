"""`make --dry-run`: what `make` would do where it is asked to: all of it, what is left of it, or nothing more."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibration.corpus import cut
from quantkit.errors import QuantkitError
from quantkit.job.checks import Check, each_possible, room_of_pass, state_of
from quantkit.job.finished import check_notes, difference, scored_before
from quantkit.job.folder import BASE, BASELINE, PROVENANCE, VERIFY, claim, finished_files
from quantkit.job.forecast import forecast
from quantkit.job.plan import file_bytes
from quantkit.job.recovery.options import RecoverOptions
from quantkit.job.recovery.recover import open_original
from quantkit.job.stages import source_of
from quantkit.job.status import unfinished
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.sizes import both_units

if TYPE_CHECKING:
    from quantkit.job.options import Order


def what_it_takes(order: "Order") -> list[str]:
    """What `make` would read, write and take, in lines, what is done already, and why it would be refused for want of
    room; nothing is written. QuantkitError for a folder of another job, and for a finished one whose notes were
    changed, as `make` refuses them."""
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
    """Of all of it, and why it would be refused here, if it would."""
    source, options = source_of(order.checkpoint, order.device), order.options
    n_bytes = file_bytes(order.checkpoint, order.plan, options.split_max_bytes)
    judged = options.evaluation if options.verify else None
    checks: list[Check] = each_possible(source, order.plan, order.folder, n_bytes * (1 + options.baseline), judged)
    if not options.imatrix:
        checks.append(partial(_check_pass, order, source, n_bytes))
    if options.recover:
        how = options.calibration
        of_recovery = how.text, order.folder, RecoverOptions(memory=how.memory, hidden=how.hidden)
        checks.append(partial(open_original, order.checkpoint, order.plan, order.device, *of_recovery))
    refusals = (f"refused     {why}" for why in map(_why, checks) if why)
    return [*forecast(order, source, n_bytes), *refusals]


def _why(check: Check) -> str:
    """What is wrong; nothing if all is well."""
    try:
        check()
    except QuantkitError as error:
        return str(error)
    return ""


def _check_pass(order: "Order", source: CheckpointSource, n_bytes: int) -> None:
    """QuantkitError if memory or the disk has no room for the pass that measures and encodes."""
    text, evaluation = order.options.calibration.text, order.options.evaluation
    compared = 0
    if order.options.verify and order.checkpoint.origin:
        compared = cut(evaluation.corpus("evaluation"), source, evaluation).tokens.numel()
    n_tokens = cut(text.corpus("calibration"), source, text).tokens.numel()
    out = order.folder / BASE / order.out.name if order.options.recover else order.out
    room_of_pass(order, source, (n_tokens, compared), state_of(out), n_bytes)


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
