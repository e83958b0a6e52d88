"""Finished files, known again: a rerun takes a file that lies there only if it is what this very job made.

checksums.json, beside the files: digest of the job's identity; bytes and CRC-32 of each file. They are read once more
before they are taken: whatever happened to them since, what is vouched for is true. Until the record is there the
writer's ledger stays, so that a run that is stopped in between is finished, not begun anew.

Besides the model there are notes of what `make` found on the way, which a rerun may go on from: the imatrix, the costs
of types and the plan that rests on them, what recovery gained.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from quantkit import __version__
from quantkit.calibration.corpus import TextChoice
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum, open_regular, read_text
from quantkit.formats.resume import forget
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.whole_file import write_json
from quantkit.job.folder import CHECKSUMS, IMATRIX, PLAN, PROVENANCE, RECOVERY, SENSITIVITY, VERIFY
from quantkit.progress import say

READERS = 4
ON_THE_WAY = {IMATRIX, SENSITIVITY, PLAN, RECOVERY}


def record(path: Path, files: Sequence[Path], identity: Mapping[str, Any]) -> None:
    """Note that the job made these files under the name `path`; the writer's ledger then goes. Reads them once."""
    _write(path.with_name(CHECKSUMS), identity, {**_on_the_way(path, identity), **_entries(files)})
    forget(path)


def note(file: Path, identity: Mapping[str, Any]) -> None:
    """Note that the job made this file on its way, and may go on from it."""
    _write(file.with_name(CHECKSUMS), identity, {**_on_the_way(file, identity), **_entries([file])})


def difference(files: Sequence[Path], identity: Mapping[str, Any], read: bool = True) -> str | None:
    """Why these files (not none) are not what a job of that identity made; None if they are. read: their bytes too."""
    known = _read(files[0].with_name(CHECKSUMS))
    if not known:
        return f"there is no {CHECKSUMS} of a finished run"
    job, entries = known
    if job != _digest(identity):
        return "another job made it"
    names = {file.name for file in files}
    if names.isdisjoint(ON_THE_WAY) and (missing := sorted(entries.keys() - names - ON_THE_WAY)):
        return f"{missing[0]} is missing"
    for file in files:
        size, entry = file.stat().st_size, entries.get(file.name)
        if entry is None:
            return f"{file.name} is not one of its files"
        if size != entry.get("bytes"):
            return f"{file.name} has {size:,} bytes, not {entry.get('bytes'):,}"
    for file, crc in zip(files, checksums(files), strict=True) if read else ():
        if crc != entries[file.name].get("crc32"):
            return f"the bytes of {file.name} were changed"
    return None


def recorded(folder: Path) -> dict[str, int]:
    """CRC-32 of the files that were made in this folder, by name, as noted then; empty if nothing is on record."""
    known = _read(folder / CHECKSUMS)
    return {name: entry.get("crc32", -1) for name, entry in known[1].items()} if known else {}


def check_notes(folder: Path, identity: Mapping[str, Any]) -> None:
    """QuantkitError if one of those files, beside a finished model, is not what the job of that identity made: to make
    it again would be to make everything again. One that was removed is not missed."""
    for name in _on_the_way(folder / CHECKSUMS, identity):
        path = folder / name
        if path.exists() and (why := difference([path], identity)):
            raise QuantkitError(
                f"{path}: {why} since the run ended; put it back, remove it, or make all of it --restart"
            )


def scored_before(folder: Path, evaluation: TextChoice, name: str = VERIFY) -> dict[str, Any] | None:
    """What verify.json (or another of that kind) holds, if it is of the files on record, on this text; then it need not
    be measured again."""
    try:
        scores = load_object(read_text(folder / name, "record").encode(), str(folder / name))
    except QuantkitError:
        return None
    if scores.get("measured") != _measured(folder, evaluation):
        return None
    say(f"using {folder / name} from an earlier run")
    return scores


def write_scores(folder: Path, scores: dict[str, Any], evaluation: TextChoice, name: str = VERIFY) -> None:
    """verify.json (or another of that kind), with what `scored_before` knows it again by."""
    scores["measured"] = _measured(folder, evaluation)
    write_json(folder / name, scores)


def place_of_scores(file: Path, reference: str) -> Path | None:
    """Where `verify` keeps what it finds, against the original of that fingerprint: see `place_of`. What `make` found
    against its own stays, for it is what a card and a report show. None, once said, where nothing can be written."""
    if not os.access(file.absolute().parent, os.W_OK):
        say(f"{file.absolute().parent} cannot be written: the figures are shown, not kept (--json FILE)")
        return None
    place = place_of(VERIFY, file)
    made = _record(file.with_name(PROVENANCE)).get("checkpoint", reference)
    return place if made == reference or not place.exists() else file.with_name(own_name(VERIFY, file))


def own_name(name: str, file: Path) -> str:
    """verify-NAME.json, say, of a model."""
    return f"{Path(name).stem}-{file.stem}.json"


def _record(path: Path) -> dict[str, Any]:
    """What a record holds; nothing if it cannot be read."""
    try:
        return load_object(read_text(path, "record").encode(), path.name)
    except QuantkitError:
        return {}


def place_of(name: str, file: Path) -> Path:
    """verify.json, say, beside a model; verify-NAME.json if that is of another."""
    there = _record(file.with_name(name)).get("file")
    return file.with_name(name if there in (None, file.name) else own_name(name, file))


def keep_scores(out: Path, scores: dict[str, Any], text: TextChoice, reference: str) -> None:
    """Write what `verify` found on that text. Of the file that a job made, scored as `make` scores it against the same
    original (reference: its fingerprint), `make` takes the figures for its own when it is called again."""
    made = _record(out.with_name(PROVENANCE))
    known = _read(out.with_name(CHECKSUMS))
    if out.name == VERIFY and known and scores["file"] in known[1] and scores["score"] == "half":
        if made.get("checkpoint") == reference:
            scores["measured"] = _measured(out.parent, text)
    write_json(out, scores)


def _measured(folder: Path, evaluation: TextChoice) -> str:
    """Digest of the files on record and the evaluation text: what scores depend on."""
    known = _read(folder / CHECKSUMS)
    files = {name: entry for name, entry in known[1].items() if name not in ON_THE_WAY} if known else None
    text = {**asdict(evaluation), "sha256": evaluation.corpus("evaluation").digest}
    return _digest({"files": files, "text": text, "quantkit": __version__})


def _on_the_way(path: Path, identity: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is noted of this job's other files."""
    known = _read(path.with_name(CHECKSUMS))
    if not known or known[0] != _digest(identity):
        return {}
    return {name: entry for name, entry in known[1].items() if name in ON_THE_WAY}


def _read(note: Path) -> tuple[str, dict[str, dict[str, Any]]] | None:
    """Job and entries; None if there are none that can be read."""
    try:
        known = json.loads(read_text(note, "record"))
        return str(known["job"]), {str(name): dict(entry) for name, entry in known["files"].items()}
    except (QuantkitError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _write(note: Path, identity: Mapping[str, Any], entries: Mapping[str, dict[str, int]]) -> None:
    write_json(note, {"job": _digest(identity), "files": entries})


def _entries(files: Sequence[Path]) -> dict[str, dict[str, int]]:
    sums = checksums(files)
    return {file.name: {"bytes": file.stat().st_size, "crc32": crc} for file, crc in zip(files, sums, strict=True)}


def checksums(files: Sequence[Path]) -> list[int]:
    """CRC-32 of each file; reads them."""
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(_crc, files))


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _crc(file: Path) -> int:
    with os.fdopen(open_regular(file), "rb") as opened:
        return checksum(opened.fileno())[0]
