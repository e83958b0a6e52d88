"""`quantkit status`: how far the job is that works in a folder, or was stopped there. Only reads, and takes no lock."""

import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats import sealed
from quantkit.formats.byte_source import read_text, read_whole
from quantkit.formats.ledger import Coverage, ledger_path, ledger_paths, on_record
from quantkit.formats.lock import at_work
from quantkit.job.asked import NO_JOB
from quantkit.job.folder import (
    BASE,
    BASELINE_FILES,
    CERTIFY,
    GRADIENTS,
    PLAN,
    PROVENANCE,
    REFERENCE,
    VERIFY,
    certifies,
    finished_files,
)
from quantkit.planning.plan import Plan
from quantkit.progress import clock
from quantkit.sizes import both_units

LAST = 8  # layers whose times tell how long the others will take


@dataclass(frozen=True)
class Part:
    """A file that is being written. done: bytes on record, of `total`; whole: complete tensors, of `tensors`."""

    path: Path
    done: int
    total: int
    whole: int
    tensors: int


@dataclass(frozen=True)
class State:
    """A pass over the layers. layers: done; seconds: what the rest will take, if enough layers tell."""

    folder: Path
    layers: int
    seconds: float | None = None


def status(folder: Path) -> list[str]:
    """In lines. QuantkitError for a folder in which nothing of a job lies."""
    record = _json(folder / PROVENANCE)
    plan, states, parts = _begun(folder)
    name = f"{plan.model}-{plan.recipe}.gguf" if plan else ""
    files = finished_files(folder / name) if name else []
    if not (record or parts or states or files):
        raise QuantkitError(NO_JOB.format(folder))
    worker = at_work(folder)
    lines = [f"job         {record['command']}"] if record.get("command") else []
    lines.append(f"now         {_now(folder, worker, bool(parts or states), bool(files))}")
    lines += _unfinished(folder, plan, states, parts)
    if files:
        size = sum(file.stat().st_size for file in files)
        lines.append(f"file        finished: {files[0].name}, {both_units(size)}, {len(files)} file(s)")
        lines += _judged(folder, files[0].name)
    if record.get("command") and not worker and (parts or states):
        lines.append("go on       with the same command; what is done is kept")
    return lines


def unfinished(folder: Path) -> list[str]:
    """What a job that was stopped there has done, in lines."""
    return list(_unfinished(folder, *_begun(folder)))


def _begun(folder: Path) -> tuple[Plan | None, list[State], list[Part]]:
    """The plan that lies there, and what of it is on its way."""
    plan = _plan(folder)
    states = sorted(_states(folder, plan), key=lambda state: str(state.folder))
    return plan, states, [part for part in _parts(folder, plan) if part.tensors]


def _unfinished(folder: Path, plan: Plan | None, states: list[State], parts: list[Part]) -> Iterator[str]:
    for state in states:
        layers = f"{state.layers} of {_n_layer(plan)} layers" if plan else f"{state.layers} layers"
        left = f", about {clock(state.seconds)} for the others" if state.seconds is not None else ""
        yield f"pass        {layers} done{left} ({state.folder.relative_to(folder)})"
    for part in parts:
        share = f"{part.done / part.total:.0%} of {both_units(part.total)}" if part.total else "nothing yet"
        yield f"file        {share}, {part.whole:,} of {part.tensors:,} tensors ({part.path.relative_to(folder)})"


def _now(folder: Path, worker: str, unfinished: bool, finished: bool) -> str:
    if worker:
        phase = ""
        if not unfinished:
            phase = ", verifying" if finished else ", preparing"
        return f"{worker} is at work{phase}, last write {_ago(folder)}"
    if unfinished:
        return f"stopped, last write {_ago(folder)}"
    return "finished" if finished else "stopped before anything was done"


def _judged(folder: Path, file: str) -> Iterator[str]:
    scores = _json(folder / VERIFY)
    if "kld_mean" in scores and scores.get("file") in (None, file):
        yield f"scores      KLD {scores['kld_mean']:.4f}, perplexity {scores['ppl']:.4f} ({VERIFY})"
    else:
        yield "scores      none yet"
    for path in sorted(folder.glob(f"{Path(CERTIFY).stem}*.json")):
        made = _json(path)
        if not certifies(made, file):
            continue
        yield f"certified   {made.get('target')}: {made.get('verdict') or made.get('passed')} ({path.name})"


def _ago(folder: Path) -> str:
    """Since anything of the job was written."""
    times = [path.stat().st_mtime for path in folder.rglob("*") if path.is_file()]
    return f"{clock(max(0.0, time.time() - max(times)))} ago" if times else "unknown"


def _n_layer(plan: Plan) -> int:
    return 1 + max((t.layer for t in plan.tensors if t.layer is not None), default=-1)


def _plan(folder: Path) -> Plan | None:
    try:
        return Plan.from_json(read_whole(folder / PLAN, "plan"), str(folder / PLAN))
    except (QuantkitError, OSError):
        return None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_text(path, "record"))
    except (QuantkitError, OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _parts(folder: Path, plan: Plan | None) -> Iterator[Part]:
    """Of the folder, of its base, from which recovery starts, and of what the file is compared with."""
    places = (folder, folder / BASE, folder / BASELINE_FILES)
    for ledger in (found for place in places for found in place.glob("*.gguf.part.ledger")):
        path = ledger.with_name(ledger.name.removesuffix(".part.ledger"))
        coverage, seen = Coverage(), Counter[str]()
        for each in (ledger_path(path), *ledger_paths(path)):
            for name, start, stop in on_record(each):
                if not coverage.covers(name, start, stop):
                    seen[name] += stop - start
                coverage.add(name, start, stop)
        if plan is None:
            size = sum(p.stat().st_size for p in path.parent.glob(f"{path.stem}*.gguf.part"))
            yield Part(path, 0, size, 0, len(seen))
            continue
        rows = {t.name: t.n_weights // t.shape[-1] for t in plan.tensors}
        done = sum(t.n_bytes * min(seen[t.name], rows[t.name]) // rows[t.name] for t in plan.tensors)
        whole = sum(coverage.covers(t.name, 0, rows[t.name]) for t in plan.tensors)
        yield Part(path, done, plan.n_bytes, whole, len(plan.tensors))


def _states(folder: Path, plan: Plan | None) -> Iterator[State]:
    """Of passes: calibration, the evaluation's half that runs beside it; what a backward pass has left."""
    for hidden in (*folder.glob("*.state*/hidden.safetensors"), *(folder / BASE).glob("*.state*/hidden.safetensors")):
        if hidden.parent.name == REFERENCE:
            continue
        try:
            layers = int(sealed.about(hidden)["layer"])
        except (QuantkitError, OSError, KeyError, ValueError):
            continue
        yield State(hidden.parent, layers, _left(hidden.parent, layers, plan))
    if files := list((folder / GRADIENTS).glob("gradients-*.safetensors")):
        yield State(folder / GRADIENTS, len(files))


def _left(state: Path, layers: int, plan: Plan | None) -> float | None:
    """Seconds for the layers that are left, each by its weights, as the last ones took; None if there are too few."""
    if plan is None:
        return None
    weights = Counter[int]()
    for tensor in plan.tensors:
        if tensor.layer is not None:
            weights[tensor.layer] += tensor.n_weights
    times = [state / f"layer-{layer}.safetensors" for layer in range(max(0, layers - LAST - 1), layers)]
    if len(times) < 2 or not all(path.exists() for path in times):
        return None
    ends = [path.stat().st_mtime for path in times]
    first = layers - len(ends) + 1
    each = [(b - a) / weights[first + i] for i, (a, b) in enumerate(pairwise(ends))]
    return statistics.median(each) * sum(n for layer, n in weights.items() if layer >= layers)
