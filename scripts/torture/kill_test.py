"""SIGKILL `quantkit make` at random moments; it must resume, lose little, and end with the bytes of an undisturbed run.

    python scripts/torture/kill_test.py --kills 25 --encoder ggml --encoder quantkit

Each run is a fork of this process, which has the imports behind it, so that the moments fall into the work. A killed
run is started again and killed again, until it ends by itself; then every file of its folder is compared. Lost work:
jobs that were begun but are not in the ledger when the process is dead. With ggml a job is a slice of a tensor, and
each of its threads may lose one; with quantkit it is an expert or a matrix, and one thread encodes.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from quantkit.__main__ import main as command_line
from quantkit.encoding import jobs
from quantkit.encoding.layer import LayerEncoder
from quantkit.formats.ledger import Coverage, slice_of
from quantkit.tensors import ROUTED_ROLES

ENCODERS = ("ggml", "quantkit")
DOCS = Path(__file__).parents[2] / "docs"  # texts that are cut into tokens at once
THREADS = 2  # always the same: the last bits of products depend on it
GROWTH = 1.3  # of the longest time to the next kill, so that a run ends after a few and another begins from nothing


def child(arguments: list[str], log: Path) -> None:
    """`quantkit make` in this process, noting every job that it begins. Does not return."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(*slices: tuple[str, int, int]) -> None:
        os.write(fd, (json.dumps(slices) + "\n").encode())

    encode, flush, whole = jobs._encode, LayerEncoder.flush, LayerEncoder._whole

    def noted_encode(checkpoint, config, job, *rest):
        note((job.tensor.name, job.start, job.stop))
        return encode(checkpoint, config, job, *rest)

    def noted_flush(self):
        for expert, *_ in self.waiting:
            mine = [
                (self.planned[role].name, self.specs[role].shape[1]) for role in ROUTED_ROLES if role in self.planned
            ]
            note(*((name, expert * rows, (expert + 1) * rows) for name, rows in mine))
        flush(self)

    def noted_whole(self, role, name, spec, hessian):
        note((name, 0, spec.n_rows))
        whole(self, role, name, spec, hessian)

    jobs._encode = noted_encode
    LayerEncoder.flush, LayerEncoder._whole = noted_flush, noted_whole
    null = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1):
        os.dup2(null, number)
    os.dup2(os.open(log.with_suffix(".err"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    code = 1
    try:
        command_line(arguments, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def start(arguments: list[str], log: Path) -> int:
    log.unlink(missing_ok=True)
    if pid := os.fork():
        return pid
    child(arguments, log)
    raise AssertionError


def finish(pid: int, deadline: float | None = None) -> int | None:
    """Exit status of the child; None if it was killed at the deadline."""
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if deadline is not None and time.monotonic() >= deadline:
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            code = os.waitstatus_to_exitcode(status)
            return None if code == -signal.SIGKILL else code
        time.sleep(0.002)


def lost(folder: Path, log: Path) -> int:
    """Jobs begun in the run just killed that its ledger does not have."""
    ledgers = list(folder.glob("*.ledger"))
    if not ledgers or not log.exists():
        return 0
    recorded = Coverage()
    for line in ledgers[0].read_bytes().split(b"\n")[1:-1]:
        recorded.add(*slice_of(json.loads(line)))
    begun = [json.loads(line) for line in log.read_text().split("\n")[:-1]]
    return sum(not all(recorded.covers(*item) for item in job) for job in begun)


def stage(folder: Path) -> str:
    """What the folder says the killed run was doing."""
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if any(name.startswith("tiny-r1") and name.endswith(".gguf") for name in names):
        return "verifying"
    if any(name.endswith(".ledger") for name in names):
        return "encoding"
    if any(name.endswith(".state") for name in names):
        return "calibrating"
    return "starting"


def contents(folder: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for name in ("verify.json", "provenance.json"):  # the time that it took; the command with its folder
        if name in found:
            fields = json.loads(found[name])
            found[name] = json.dumps({k: v for k, v in fields.items() if k not in ("seconds", "command")}).encode()
    return found


def trial(encoder: str, asked: argparse.Namespace, scratch: Path) -> tuple[Counter, int, int]:
    """Kills by stage, runs that came to their end, and most jobs lost by one kill."""
    rng, log = random.Random(f"{asked.seed} {encoder}"), scratch / "log"

    def arguments(folder: Path) -> list[str]:
        options = f"--recipe {asked.recipe} --encoder {encoder} --tokens {asked.tokens} --eval-tokens 512 --device cpu"
        texts = ["--data", str(DOCS / "architecture.md"), "--eval-data", str(DOCS / "serve.md")]
        return ["make", "tiny-r1", "-o", str(folder), *texts, *options.split(), "--threads", str(THREADS)]

    began = time.monotonic()
    code = finish(start(arguments(scratch / f"calm-{encoder}"), log))
    assert code == 0, (code, log.with_suffix(".err").read_text())
    span, expected = time.monotonic() - began, contents(scratch / f"calm-{encoder}")
    stages, ends, most = Counter(), 0, 0
    while sum(stages.values()) < asked.kills:
        folder, here = scratch / f"{encoder}-{ends}", 0
        while True:
            pid = start(arguments(folder), log)
            delay = rng.uniform(0.02, 1.0) * span * GROWTH**here
            code = finish(pid, time.monotonic() + delay)
            if code is not None:
                break
            stages[stage(folder)] += 1
            here += 1
            gone = lost(folder, log)
            assert gone <= THREADS, f"{gone} jobs of {THREADS} threads were lost"
            most = max(most, gone)
            early = contents(folder) if folder.exists() else {}
            wrong = [name for name in early if name.endswith(".gguf") and early[name] != expected.get(name)]
            assert not wrong, f"{wrong} have their final names and are not finished"
        assert code == 0, f"a resumed run failed: {log.with_suffix('.err').read_text()}"
        found = contents(folder)
        assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
        differ = [name for name in expected if found[name] != expected[name]]
        assert not differ, f"{differ} differ from the undisturbed run's"
        ends += 1
    return stages, ends, most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=25, help="of each encoder")
    parser.add_argument("--encoder", choices=ENCODERS, action="append")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--recipe", default="1.58bit")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    for encoder in options.encoder or ENCODERS:
        with tempfile.TemporaryDirectory() as scratch:
            began = time.monotonic()
            stages, ends, most = trial(encoder, options, Path(scratch))
            where = ", ".join(f"{count} {name}" for name, count in stages.most_common())
            print(
                f"{encoder}: {sum(stages.values())} kills ({where}), {ends} runs ended with the same bytes, "
                f"most jobs lost by a kill: {most}, {time.monotonic() - began:.0f} s",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
