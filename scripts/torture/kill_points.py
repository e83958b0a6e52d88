"""SIGKILL at every rename, sync, link, removal and write of every command; then the same command again.

    python scripts/torture/kill_points.py --most 30

A calm run of each command lists the points where it touches its folder. It is killed before each of them (a write:
in its middle), all renames first, then one point of each kind and file, then others at random. The run that follows
must end with the reference's bytes in every file, or refuse in one line, after which --restart must give those bytes.
"""

import argparse
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scenarios import SCENARIOS, Scenario, Stage, Verdicts, finish, results, start

RENAMES = ("replace", "rename")
WRITES = ("write", "pwrite")
WATCHED = (*RENAMES, *WRITES, "fsync", "ftruncate", "link", "mkdir", "rmdir", "unlink")


class Points:
    """Functions of `os` that change a folder, counted; at one of the calls the process dies."""

    def __init__(self, folder: Path, at: int | None = None, log: Path | None = None):
        self.folder, self.at, self.log, self.n = str(folder), at, log, 0
        self.lock, self.kill, self.getpid = threading.Lock(), os.kill, os.getpid
        self.write = os.write

    def install(self) -> None:
        """In the process that is to be killed."""
        fd = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if self.log else None
        for kind in WATCHED:
            setattr(os, kind, self._watched(kind, getattr(os, kind), fd))

    def _watched(self, kind: str, function: Callable[..., Any], log: int | None) -> Callable[..., Any]:
        def call(*args: Any, **rest: Any) -> Any:
            place = place_of(kind, args, rest)
            if not place.startswith(self.folder):
                return function(*args, **rest)
            with self.lock:
                here, self.n = self.n, self.n + 1
            if log is not None:
                self.write(log, (json.dumps([kind, place.removeprefix(self.folder)]) + "\n").encode())
            if here == self.at:
                if kind in WRITES:
                    function(args[0], memoryview(args[1]).cast("B")[: len(args[1]) // 2], *args[2:])
                self.die()
            return function(*args, **rest)

        return call

    def die(self) -> None:
        """At once, whatever is under way."""
        self.kill(self.getpid(), signal.SIGKILL)
        time.sleep(60)


def place_of(kind: str, args: tuple, rest: dict[str, Any]) -> str:
    """The file that a call is about, for a rename the new name."""
    what = args[1] if kind in (*RENAMES, "link") else args[0]
    if isinstance(what, int):
        return link_of(what)
    name = os.fspath(what)
    name = name.decode() if isinstance(name, bytes) else name
    if not os.path.isabs(name) and isinstance(rest.get("dir_fd"), int):
        return os.path.join(link_of(rest["dir_fd"]), name)
    return os.path.abspath(name)


def link_of(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def chosen(points: list[tuple[str, str]], most: int, rng: random.Random) -> list[int]:
    """Numbers of calls to die at: all renames, the first of each other kind and file, then any."""
    renames = [i for i, (kind, _) in enumerate(points) if kind in RENAMES]
    seen: dict[tuple[str, str], int] = {}
    for i, (kind, place) in enumerate(points):
        seen.setdefault((kind, re.sub(r"\d+", "N", place)), i)
    rest = list(range(len(points)))
    rng.shuffle(rest)
    rng.shuffle(renames)
    first = sorted(seen.values())
    rng.shuffle(first)
    return list(dict.fromkeys([*renames, *first, *rest]))[:most]


def again(stage: Stage, scenario: Scenario, folder: Path, what: str, verdicts: Verdicts, expected: dict) -> None:
    """The same command without trouble, and anew if it refused."""
    words = stage.words(scenario.command, folder)
    code, said = finish(start(words, folder.parent / "err"))
    if verdicts.judge(what, code, said, folder, expected) or code != 1 or not scenario.anew:
        return
    code, said = finish(start([*words, *scenario.anew], folder.parent / "err"))
    if code or results(folder) != expected:
        differ = [name for name in expected if results(folder).get(name) != expected[name]]
        verdicts.find(f"{what}: after a refusal {scenario.anew} gave exit {code}, {differ} differ: {said[-1500:]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=30, help="points of each command")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--command", action="append", help="only these (`make`, `make --recover`, ...)")
    options = parser.parse_args()
    found = 0
    with tempfile.TemporaryDirectory() as scratch:
        stage = Stage(Path(scratch))
        for scenario in SCENARIOS:
            if options.command and scenario.name not in options.command:
                continue
            began, rng, folder = time.monotonic(), random.Random(options.seed), stage.folder()
            log, words = folder.parent / "log", stage.words(scenario.command, folder)
            code, said = finish(start(words, folder.parent / "err", Points(folder, log=log).install))
            assert code == 0, (scenario.name, said)
            expected = results(folder)
            points = [tuple(json.loads(line)) for line in log.read_text().splitlines()]
            verdicts, kinds = Verdicts(), Counter[str]()
            for at in chosen(points, options.most, rng):
                folder = stage.folder()
                words = stage.words(scenario.command, folder)
                code, said = finish(start(words, folder.parent / "err", Points(folder, at).install))
                kinds[points[at][0] if code == -signal.SIGKILL else "none"] += 1
                again(stage, scenario, folder, f"{scenario.name} at {at} {points[at]}", verdicts, expected)
                stage.drop(folder)
            where = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            print(f"{scenario.name}: {len(points)} points; killed at {where}")
            print(f"  {verdicts.report(sum(kinds.values()), time.monotonic() - began)}", flush=True)
            found += len(verdicts.findings)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
