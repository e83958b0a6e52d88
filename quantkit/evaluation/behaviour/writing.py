"""Continuations written by an engine, many at once, each noted as soon as it is there: a stopped run goes on."""

import fcntl
import json
import queue
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.evaluation.behaviour.items import Item
from quantkit.formats.byte_source import read_whole
from quantkit.progress import clock, say, track
from quantkit.runtime.generate import Engine, Sampling
from quantkit.serving.jobs import Emit, Job
from quantkit.serving.logits import TokenRules
from quantkit.serving.scheduler import Scheduler

PROBE = 128, 8  # tokens of a prompt, and steps of all slots, by which speed is measured


@dataclass(frozen=True)
class Written:
    """A continuation, without the EOS that ended it. ended: it did end, rather than reach the limit. nll: of its tokens
    in sum, by whom wrote it."""

    tokens: tuple[int, ...]
    ended: bool
    nll: float


class Notes:
    """Lines of JSON: first what they are of, then one for each continuation or score. A torn last line is dropped.
    alone: QuantkitError while another process has them, which may be of another file."""

    def __init__(self, path: Path, of: Mapping[str, Any], alone: bool = False):
        self.path, self.file = path, path.open("ab")
        if alone:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise QuantkitError(f"{path}: another evaluation writes it; give this one another --json") from None
            except OSError:  # a file system without locks
                say(f"warning: {path}: cannot be locked: let no other evaluation write it")
        self.found: dict[str, Any] = {}
        self.n_before = 0
        head, good = json.dumps({"of": dict(of)}, sort_keys=True), b""
        lines = read_whole(path, "record").splitlines(keepends=True) if path.exists() else []
        if lines and lines[0] == head.encode() + b"\n":
            for line in lines[1:]:
                try:
                    row = json.loads(line) if line.endswith(b"\n") else None
                except ValueError:
                    row = None
                if not isinstance(row, dict) or "key" not in row:
                    break
                self.found[row.pop("key")] = row
                good += line
            self.n_before = len(self.found)
        elif lines:
            say(f"{path}: of another file, original or amount; begun anew")
        path.write_bytes(head.encode() + b"\n" + good)

    def add(self, key: str, **row: Any) -> None:
        """On disk when this returns, but for a power cut."""
        self.found[key] = row
        self.file.write(json.dumps({"key": key, **row}).encode() + b"\n")
        self.file.flush()

    def written(self, item: Item) -> Written:
        """What it was."""
        row = self.found[item.key]
        return Written(tuple(row["tokens"]), row["ended"], row["nll"])


def announce(side: str, engine: Engine, items: Sequence[Item], n_read: int = 0) -> None:
    """How long it will take at most, by a moment's measuring. n_read: further tokens that are only read."""
    n, steps = PROBE
    n = min(n, engine.capacity - steps)
    engine.prefill(0, [0] * n, 0)  # what is compiled or read once is no speed
    begin = time.perf_counter()
    engine.prefill(0, [0] * n, 0)
    reading = (time.perf_counter() - begin) / n
    slots = list(range(engine.n_slots))
    for slot in slots:
        engine.prefill(slot, [0], 0)
    engine.decode(slots, [0] * len(slots))
    begin = time.perf_counter()
    for _ in range(steps):
        engine.decode(slots, [0] * len(slots))
    writing = (time.perf_counter() - begin) / steps / len(slots)
    read, write = sum(len(item.prompt) for item in items) + n_read, sum(item.n_tokens for item in items)
    say(
        f"{side}: {len(items):,} continuations, {read:,} tokens to read and at most {write:,} to write; at most about "
        f"{clock(read * reading + write * writing)} at {1 / writing:,.0f} tok/s"
    )


def write(side: str, engine: Engine, items: Sequence[Item], notes: Notes) -> None:
    """Those that are not noted yet."""
    left = [item for item in items if item.key not in notes.found]
    rules = TokenRules(n_logprobs=0)

    def jobs() -> list[tuple[str, Job]]:
        return [(item.key, _job(item.prompt, item.n_tokens, item.how, rules)) for item in left]

    def note(key: str, job: Job, why: str) -> int:
        nll = -sum(chance.logprob or 0.0 for chance in job.chances)
        notes.add(key, tokens=job.made, ended=why == "stop", nll=nll)
        return job.n_made

    total = sum(item.n_tokens for item in left)
    _run(f"{side} writes", engine, jobs(), note, total)


def score(engine: Engine, items: Sequence[Item], theirs: Notes, ours: Notes) -> None:
    """How probable the original's continuations are by this engine, where `ours` does not say it yet."""
    rules, jobs, begins = TokenRules(n_logprobs=0, of_prompt=True), [], {}
    for item in items:
        tokens = theirs.written(item).tokens
        if tokens and f"nll/{item.key}" not in ours.found:
            jobs.append((item.key, _job((*item.prompt, *tokens), 0, item.how, rules)))
            begins[item.key] = len(item.prompt)

    def note(key: str, job: Job, _: str) -> int:
        own = job.heard[begins[key] - 1 :]
        ours.add(f"nll/{key}", nll=-sum(chance.logprob or 0.0 for chance in own))
        return len(job.prompt)

    _run("file reads the original's", engine, jobs, note, sum(len(job.prompt) for _, job in jobs))


Done = queue.SimpleQueue[tuple[str, Job, str]]


def _job(prompt: Sequence[int], n_tokens: int, how: Sampling, rules: TokenRules) -> Job:
    return Job(list(prompt), n_tokens, how, lambda *_: None, rules)


def _run(what: str, engine: Engine, jobs: list[tuple[str, Job]], note: Any, total: int) -> None:
    if not jobs:
        return
    done: Done = queue.SimpleQueue()

    def ends(key: str, job: Job) -> Emit:
        return lambda token, why: done.put((key, job, why or "error")) if token is None else None

    for key, job in jobs:
        job.emit = ends(key, job)
    with Scheduler(engine, len(jobs)) as scheduler, track(what, total, "tokens") as advance:
        for _, job in jobs:
            scheduler.submit(job)
        for _ in jobs:
            key, job, why = done.get()
            if why not in ("stop", "length"):
                raise QuantkitError(f"{what}: {key}: a step failed; the log says why")
            advance(note(key, job, why))
