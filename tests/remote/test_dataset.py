"""Calibration text from a dataset on a Hub, streamed, with columns put together by a template."""

import json
import subprocess
import sys

PROGRAM = """
import json, sys
from quantkit.calibration import corpus
source, column, limit = sys.argv[1:]
print(json.dumps([d.text for d in corpus.load([source], column, int(limit)).documents]))
"""


def load(source: str, column: str, limit: int = 1 << 20) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", PROGRAM, source, column, str(limit)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_dataset_with_template_and_limit(hub, env):
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(40)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    hub.add("datasets/user/sums", {"train.jsonl": lines, "README.md": b"---\nlicense: mit\n---\n"})
    done = load("user/sums", "{question} {answer}", 25)
    assert json.loads(done.stdout) == [f"{i}+{i}? {2 * i}" for i in range(5)], done.stderr
    assert "no column 'text'; it has question, answer" in load("user/sums", "text").stderr
    assert "user/none: DatasetNotFoundError" in load("user/none", "text").stderr
