"""The contract of the folder that `make` leaves: what lies there under which name, and whose job it holds.

MODEL-RECIPE.gguf   the file, or its splits MODEL-RECIPE-00001-of-00003.gguf; only when it is complete
imatrix.gguf        the importance that was measured
plan.json           the type of every tensor, and why; recipe.toml: the rules behind it; sensitivity.json: the costs of
                    types that it rests on, if they were estimated
verify.json         the scores; certify.json: the checks of `certify`; recovery.json: what tuning gained, by which
                    text, after how many steps; baseline.json: the scores of the same types by ggml's encoder
checksums.json      by which a rerun knows the finished files again
provenance.json     what the files were made of, and how: the identity of the job, and its circumstances
*.part, *.state     of a run that is under way or was interrupted; base: the file that recovery starts from;
                    gradients: what a backward pass found, for --effort best
"""

import glob
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_whole
from quantkit.formats.gguf_folder import IMATRIX
from quantkit.formats.lock import NAME as LOCK
from quantkit.formats.resume import discard
from quantkit.formats.whole_file import write_json, write_text

PLAN, RECIPE = "plan.json", "recipe.toml"
VERIFY, PROVENANCE, RECOVERY, CERTIFY = "verify.json", "provenance.json", "recovery.json", "certify.json"
CHECKSUMS = "checksums.json"
REPORT = "report.html"
NO_FIGURES = f"{{}}: neither {VERIFY} nor {PLAN}; give the folder that `quantkit make` left"
NOT_MADE = "{}: no such file; is {} a folder that `quantkit make` left?"
SENSITIVITY = "sensitivity.json"  # of `sensitivity`, in a folder of its own; of --effort best within a budget
BASE = "base"
REFERENCE = "reference.state"  # of the original's half of the evaluation
BASELINE, BASELINE_FILES = "baseline.json", "baseline"  # scores; the file that they are of, until it is judged
GRADIENTS = "gradients"  # of the backward pass, until the file is made


def finished_files(path: Path) -> list[Path]:
    """The complete file or splits under this name; they carry their final name only when they are complete."""
    if path.exists():
        return [path]
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}-[0-9]*-of-[0-9]*.gguf"))


def certifies(certificate: Mapping[str, Any], file: str) -> bool:
    """Whether a certificate is of the file of that name, as far as it says."""
    return not file or file in (certificate.get("files") or [file])


def begin(
    folder: Path,
    identity: Mapping[str, Any],
    circumstances: Mapping[str, Any],
    texts: Mapping[str, str],
    restart: bool,
    given: Path | None = None,
) -> None:
    """Claim the folder for a job and record there what it is, with texts by file name; `restart` discards what an
    earlier run of it left. given: as in `claim`."""
    folder.mkdir(parents=True, exist_ok=True)
    claim(folder, identity, restart, given)
    write_json(folder / PROVENANCE, {**identity, **circumstances})
    for name, text in texts.items():
        write_text(folder / name, text)
    if restart:
        for left in (REFERENCE, BASE, GRADIENTS, BASELINE_FILES):
            shutil.rmtree(folder / left, ignore_errors=True)
        (folder / SENSITIVITY).unlink(missing_ok=True)


def unclaim(folder: Path) -> None:
    """Take back what `begin` wrote into a new folder, if nothing else came to be there: a job that was refused leaves
    nothing."""
    there = {path.name for path in folder.iterdir() if path.name != LOCK}
    if there <= {PLAN, RECIPE, PROVENANCE}:
        for name in there:
            (folder / name).unlink(missing_ok=True)


def claim(folder: Path, mine: Mapping[str, Any], restart: bool, given: Path | None = None) -> None:
    """The folder is ours if it is new or holds the job of that identity; `restart` clears what another job left.

    given: the imatrix that the job goes by, which stays wherever it lies; None: the job measures its own.
    QuantkitError, naming the first difference, if it holds another job that is not to be cleared; and for an
    imatrix.gguf that no job wrote: it would be replaced, and may have taken hours.
    """
    record, imatrix = folder / PROVENANCE, folder / IMATRIX
    if not record.exists():
        if given is None and imatrix.exists():
            raise QuantkitError(
                f"{imatrix}: no `make` wrote it, and this one would replace it; take it with --imatrix, or choose "
                "another --output"
            )
        return
    try:
        old = json.loads(read_whole(record, "record"))
    except (ValueError, RecursionError):
        old = None
    if not isinstance(old, dict):
        old = {}
    if not old and not restart:
        raise QuantkitError(
            f"{record}: damaged, so whose job lies there is not known; choose another --output, or --restart"
        )
    changed = [key for key, value in mine.items() if old.get(key) != value]
    if not changed and not restart:
        return
    if not restart:
        key, was, now = _difference(changed[0], old.get(changed[0]), mine[changed[0]])
        raise QuantkitError(
            f"{folder} holds another job: {key} was {was}, now {now}; choose another --output, or --restart"
        )
    clear(folder, given)


def clear(folder: Path, given: Path | None = None) -> None:
    """Discard what a job left, but for finished models and the imatrix that the next one goes by (given). QuantkitError
    if another process is writing one."""
    for ledger in folder.glob("*.gguf.part.ledger"):
        discard(ledger.with_name(ledger.name.removesuffix(".part.ledger")))
    for state in folder.glob("*.gguf.state*"):
        shutil.rmtree(state, ignore_errors=True)
    for name in (IMATRIX, VERIFY, RECOVERY, SENSITIVITY, BASELINE, CHECKSUMS):
        path = folder / name
        if path.exists() and not (given and path.samefile(given)):
            path.unlink()


def _difference(key: str, was: Any, now: Any) -> tuple[str, Any, Any]:
    """The first value that differs, by its path in nested tables: `calibration.text.n_tokens`, 8192, 4096."""
    if isinstance(was, dict) and isinstance(now, dict):
        for inner in now:
            if was.get(inner) != now[inner]:
                return _difference(f"{key}.{inner}", was.get(inner), now[inner])
    return key, was, now
