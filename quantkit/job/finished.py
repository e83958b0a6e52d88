"""Finished files, known again: a rerun takes a file that lies there only if it is what this very job made.

checksums.json, beside the files: digest of the job's identity; bytes, time and CRC-32 of each file. A file of the
recorded size and time is taken as it is; one that was touched or copied is read. Until the record is there the
writer's ledger stays, so that a run that is stopped in between is finished, not begun anew.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import checksum, open_regular, read_text
from quantkit.formats.resume import forget
from quantkit.formats.whole_file import write_json
from quantkit.job.folder import CHECKSUMS

READERS = 4


def record(path: Path, files: Sequence[Path], identity: Mapping[str, Any]) -> None:
    """Note that the job made these files under the name `path`; the writer's ledger then goes. Reads them once."""
    with ThreadPoolExecutor(READERS) as pool:
        sums = list(pool.map(_crc, files))
    entries = {
        file.name: {"bytes": file.stat().st_size, "mtime_ns": file.stat().st_mtime_ns, "crc32": crc}
        for file, crc in zip(files, sums, strict=True)
    }
    write_json(path.with_name(CHECKSUMS), {"job": _digest(identity), "files": entries})
    forget(path)


def difference(files: Sequence[Path], identity: Mapping[str, Any]) -> str | None:
    """Why these files (not none) are not what a job of that identity made; None if they are."""
    note = files[0].with_name(CHECKSUMS)
    try:
        known = json.loads(read_text(note, "record"))
        job, entries = known["job"], {str(name): dict(entry) for name, entry in known["files"].items()}
    except (QuantkitError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"there is no {CHECKSUMS} of a finished run"
    if job != _digest(identity):
        return "another job made it"
    if missing := sorted(entries.keys() - {file.name for file in files}):
        return f"{missing[0]} is missing"
    for file in files:
        stat, entry = file.stat(), entries.get(file.name)
        if entry is None:
            return f"{file.name} is not one of its files"
        if stat.st_size != entry.get("bytes"):
            return f"{file.name} has {stat.st_size:,} bytes, not {entry.get('bytes'):,}"
        if stat.st_mtime_ns != entry.get("mtime_ns") and _crc(file) != entry.get("crc32"):
            return f"the bytes of {file.name} were changed"
    return None


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _crc(file: Path) -> int:
    with os.fdopen(open_regular(file), "rb") as opened:
        return checksum(opened.fileno())[0]
