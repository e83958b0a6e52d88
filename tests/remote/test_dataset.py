"""Calibration text from a dataset on a Hub, streamed, with columns put together by a template."""

import json
import subprocess
import sys

# `datasets` reads HF_ENDPOINT when it is imported: hence a process of its own.
PROGRAM = """
import json
from quantkit.calibration import corpus
from quantkit.errors import QuantkitError

def texts(source, limit=1 << 20):
    try:
        return [document.text for document in corpus.load([source], limit).documents]
    except QuantkitError as error:
        return str(error)

asked = [("user/sums:{question} {answer}", 25), ("user/sums",), ("user/none",), ("user/sums:default:test:answer",)]
print(json.dumps([texts(*each) for each in asked]))
"""


def test_template_limit_split_and_errors(hub, env):
    rows = [{"question": f"{i}+{i}?", "answer": str(2 * i)} for i in range(40)]
    lines = ["".join(json.dumps(row) + "\n" for row in part).encode() for part in (rows, rows[:2])]
    files = {"train.jsonl": lines[0], "test.jsonl": lines[1], "README.md": b"---\nlicense: mit\n---\n"}
    hub.add("datasets/user/sums", files)
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    some, no_column, no_dataset, test = json.loads(done.stdout)
    assert some == [f"{i}+{i}? {2 * i}" for i in range(5)]
    assert no_column == "user/sums: no column 'text'; it has question, answer (--data user/sums:COLUMN)"
    assert no_dataset.startswith("user/none: DatasetNotFoundError")
    assert test == ["0", "2"]
