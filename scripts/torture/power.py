"""Power loss, emulated: a command is killed, its disk forgets what was not synced, and the command runs again.

    python scripts/torture/power.py --cases 240 --seed 1

crash: of every folder the names of its last fsync hold; of what came after, the disk has the first so many changes, or
any of them in any choice (lost and reordered renames, removals and creations). Of every file the bytes of its last
fsync hold; each page that was written since is old, new, or zeros where there was nothing, and the size old or new.
zero: nothing is forgotten, but in one file, synced or not, finished or not, a page is zeros, or it is cut there.

Either way the command must end with the reference's bytes in every file, or refuse in one line, after which --restart
must give them.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_points import WATCHED, WRITES, Points, again, link_of, place_of
from scenarios import BY_NAME, Stage, Verdicts, finish, results, start

PAGE = 4096
COMMANDS = ("make ggml", "make", "make --imatrix", "make --recover", "calibrate", "calibrate --gradients", "quantize")
Names = dict[str, dict[str, int]]
"""Of each folder, by inode: name -> inode."""


class Journal(Points):
    """Points that also note what the disk would have: all names after each change, and the bytes of each sync."""

    def __init__(self, folder: Path, at: int, shadow: Path):
        super().__init__(folder, at)
        self.shadow, self.states, self.synced = shadow, list[Names](), dict[str, int]()
        self.link = os.link

    def install(self) -> None:
        """As in Points."""
        self._look()
        super().install()

    def _watched(self, kind: str, function: Callable[..., Any], log: int | None) -> Callable[..., Any]:
        counted = super()._watched(kind, function, log)

        def call(*args: Any, **rest: Any) -> Any:
            if not place_of(kind, args, rest).startswith(self.folder) or kind in WRITES:
                return counted(*args, **rest)
            with self.lock_of_names():
                self._look()
                made = counted(*args, **rest)
                self._look()
                if kind == "fsync":
                    self._note_sync(args[0])
            return made

        return call

    def lock_of_names(self) -> Any:
        """One change at a time."""
        if not hasattr(self, "_names_lock"):
            import threading

            self._names_lock = threading.RLock()
        return self._names_lock

    def _look(self) -> None:
        state: Names = {}

        def folder(path: str, number: int) -> None:
            state[str(number)] = mine = {}
            for entry in os.scandir(path):
                inode = mine[entry.name] = entry.inode()
                if entry.is_dir(follow_symlinks=False):
                    folder(entry.path, inode)
                elif not (kept := self.shadow / str(inode)).exists():
                    try:
                        self.link(entry.path, kept)
                    except FileNotFoundError:
                        del mine[entry.name]

        folder(self.folder, os.stat(self.folder).st_ino)
        if not self.states or self.states[-1] != state:
            self.states.append(state)

    def _note_sync(self, fd: int) -> None:
        number = os.fstat(fd).st_ino
        if os.path.isdir(path := link_of(fd)):
            self.synced[str(number)] = len(self.states) - 1
        else:
            shutil.copyfile(path, self.shadow / f"synced-{number}")

    def die(self) -> None:
        """With a note for whoever plays the disk."""
        self._look()
        root = str(os.stat(self.folder).st_ino)
        (self.shadow / "journal.json").write_text(json.dumps([root, self.states, self.synced]))
        super().die()


def after_crash(folder: Path, shadow: Path, rng: random.Random) -> str:
    """Put what the disk might have in the place of the folder; says what was forgotten."""
    root, states, synced = json.loads((shadow / "journal.json").read_text())
    told: Counter[str] = Counter()
    ordered, careful = rng.random() < 0.5, rng.random() < 0.3

    def names(number: str) -> dict[str, int]:
        since = synced.get(number, 0 if number == root else -1)
        kept = dict(states[since].get(number, {})) if since >= 0 else {}
        steps, before = [], kept
        for state in states[since + 1 :]:
            now = state.get(number, {})
            if step := {name: now.get(name) for name in {*before, *now} if before.get(name) != now.get(name)}:
                steps.append(step)
            before = now
        most = rng.randint(0, len(steps))
        for i, step in enumerate(steps):
            if i < most if ordered else rng.random() < 0.5:
                kept |= step
            else:
                told["changes of names"] += 1
        return {name: inode for name, inode in kept.items() if inode is not None}

    def write(number: str, to: Path) -> None:
        to.mkdir(parents=True, exist_ok=True)
        for name, inode in names(number).items():
            if (shadow / str(inode)).exists():
                (to / name).write_bytes(content(inode))
            else:
                write(str(inode), to / name)

    def content(inode: int) -> bytes:
        new, old_file = (shadow / str(inode)).read_bytes(), shadow / f"synced-{inode}"
        old = old_file.read_bytes() if old_file.exists() else b""
        if new == old or careful:
            return new
        size = rng.choice((len(old), len(new)))
        pages, share = [], rng.random()
        for at in range(0, size, PAGE):
            a, b = old[at : at + PAGE].ljust(PAGE, b"\0"), new[at : at + PAGE].ljust(PAGE, b"\0")
            lost = a != b and rng.random() < share
            told["pages"] += lost
            pages.append(a if lost else b)
        return b"".join(pages)[:size]

    shutil.rmtree(folder)
    write(root, folder)
    return f"{told['changes of names']} changes of names and {told['pages']} pages lost"


def zeroed(folder: Path, rng: random.Random) -> str:
    """Damage one file; says which."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    if not files:
        return "nothing there"
    if states := [path for path in files if path.suffix != ".json" and path.stat().st_size > PAGE]:
        files = states if rng.random() < 0.7 else files  # what a run goes on from, oftener than what only says so
    groups: dict[str, list[Path]] = {}
    for path in files:  # each folder and kind of file as often as another, however many there are
        groups.setdefault(f"{path.parent.name}/{path.name.split('-')[0]}", []).append(path)
    path = rng.choice(groups[rng.choice(sorted(groups))])
    data, size = path.read_bytes(), rng.choice((64, 512, PAGE, 16 * PAGE))
    at = rng.randrange(len(data)) // 64 * 64
    cut = rng.random() < 0.2
    path.write_bytes(data[:at] if cut else data[:at] + bytes(len(data[at : at + size])) + data[at + size :])
    return f"{path.relative_to(folder)}: {'cut' if cut else f'{size} zeros'} at {at}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=240)
    parser.add_argument("--first", type=int, default=0, help="number of the first case: to go on in pieces")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case after so many")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--mode", choices=("crash", "zero", "both"), default="both")
    parser.add_argument("--command", action="append")
    options = parser.parse_args()
    began, modes = time.monotonic(), ("crash", "zero") if options.mode == "both" else (options.mode,)
    commands = options.command or COMMANDS
    verdicts, told = {(c, m): Verdicts() for c in commands for m in modes}, Counter[str]()
    with tempfile.TemporaryDirectory() as scratch:
        stage, calm = Stage(Path(scratch)), {}
        cases = range(options.first, options.first + options.cases)
        for name in dict.fromkeys(commands[case % len(commands)] for case in cases):
            folder = stage.folder()
            log, words = folder.parent / "log", stage.words(BY_NAME[name].command, folder)
            code, said = finish(start(words, folder.parent / "err", Points(folder, log=log).install))
            assert code == 0, (name, said)
            points = [json.loads(line)[0] for line in log.read_text().splitlines()]
            calm[name] = results(folder), [i for i, kind in enumerate(points) if kind in WATCHED[2:] or i % 8 == 0]
        for case in cases:
            if time.monotonic() - began > options.seconds:
                break
            rng = random.Random(f"{options.seed} {case}")
            name, mode = commands[case % len(commands)], modes[case // len(commands) % len(modes)]
            expected, points = calm[name]
            folder, scenario = stage.folder(), BY_NAME[name]
            shadow, at = folder.parent / "shadow", rng.choice(points)
            shadow.mkdir()
            hook = Journal(folder, at, shadow) if mode == "crash" else Points(folder, at)
            if mode == "zero" and rng.random() < 0.2:
                hook = Points(folder)  # to the end
            code, said = finish(start(stage.words(scenario.command, folder), folder.parent / "err", hook.install))
            killed = code == -signal.SIGKILL
            if mode == "crash":
                what = after_crash(folder, shadow, rng) if killed else "not killed"
            else:
                what = zeroed(folder, rng)
            told[f"{mode}, {'killed' if killed else 'ended'}"] += 1
            again(stage, scenario, folder, f"case {case}, {name} at {at}, {what}", verdicts[name, mode], expected)
            stage.drop(folder)
    for (name, mode), verdict in verdicts.items():
        cases = verdict.same + sum(verdict.refused.values()) + len(verdict.findings)
        print(f"{name}, {mode}: {verdict.report(cases, time.monotonic() - began)}")
        for line, count in verdict.refused.items():
            print(f"    {count} x {line[:200]}")
    found = sum(len(verdict.findings) for verdict in verdicts.values())
    print(f"{sum(told.values())} cases ({dict(told)}) in {time.monotonic() - began:.0f} s: {found} findings")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
