"""Two processes in one folder at once: one does its work, the other is told who is there, and harms nothing.

    python scripts/torture/race.py --pairs 60

A command is started, and a moment later (from none to most of its time) another one for the same folder. If that is
refused, its line must name the first process, and the first must end with the reference's bytes in every file. If they
happened to come one after the other, the model's files must be the reference's all the same.
"""

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from scenarios import BY_NAME, Stage, finish, refusal, results, start

SAME, RESTART = "the same", "the same --restart"
LATE = ("holds another job", "exists already", "no `make` wrote it")  # what is said when the first has ended
PAIRS = [
    *((name, other) for name in ("make ggml", "make", "make --recover", "calibrate") for other in (SAME, RESTART)),
    ("quantize", SAME),
    ("quantize", RESTART),
    ("calibrate --gradients", RESTART),
    ("sensitivity", SAME),
    *(("make", other) for other in ("calibrate", "plan", "quantize", "sensitivity", "verify", "make --recover")),
    ("make --recover", "make --imatrix"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    began, rng, count, findings = time.monotonic(), random.Random(options.seed), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        stage, calm = Stage(Path(scratch)), {}
        for name in dict.fromkeys(first for first, _ in PAIRS[: options.pairs]):
            folder, at = stage.folder(), time.monotonic()
            code, said = finish(start(stage.words(BY_NAME[name].command, folder), folder.parent / "err"))
            assert code == 0, (name, said)
            calm[name] = results(folder), time.monotonic() - at
        for number in range(options.pairs):
            name, other = PAIRS[number % len(PAIRS)]
            expected, span = calm[name]
            folder, delay = stage.folder(), rng.choice((0.0, rng.uniform(0, 0.8) * span))
            words = stage.words(BY_NAME[name].command, folder)
            second = words if other in (SAME, RESTART) else stage.words(BY_NAME[other].command, folder)
            runs = [start(words, folder.parent / "err-0")]
            time.sleep(delay)
            runs.append(start([*second, "--restart"] if other == RESTART else second, folder.parent / "err-1"))
            ends = [finish(run) for run in runs]
            what = f"pair {number}, {name} and {other} after {delay:.2f} s"
            codes = [code for code, _ in ends]
            if 1 in codes:
                loser = codes.index(1)
                line = refusal(ends[loser][1]) or ""
                count["second refused" if loser else "first refused"] += 1
                if not any(says in line for says in (f"process {runs[1 - loser].pid} on ", *LATE)):
                    findings.append(f"{what}: {ends[loser][1][-500:]}")
            if codes not in ([0, 0], [0, 1], [1, 0]):
                findings.append(f"{what}: exits {codes}: {ends[0][1][-800:]} / {ends[1][1][-800:]}")
            elif codes == [0, 0]:
                count["one after the other"] += 1
            alone = other in (SAME, RESTART) or codes == [0, 1]
            found = results(folder)
            wrong = [file for file in expected if found.get(file) != expected[file]]
            if codes[0] == 1 and other not in (SAME, RESTART):
                wrong = []  # the other command's folder
            elif not alone:
                wrong = [file for file in wrong if file.endswith(".gguf") and file != "imatrix.gguf"]
            if wrong or (alone and found.keys() != expected.keys()):
                findings.append(f"{what}: exits {codes}, {wrong or found.keys() ^ expected.keys()} differ")
            stage.drop(folder)
    print(f"{options.pairs} pairs: {dict(count)}, {len(findings)} findings, {time.monotonic() - began:.0f} s")
    print("\n".join(f"  FINDING {finding}" for finding in findings))
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
