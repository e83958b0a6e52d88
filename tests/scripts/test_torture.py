"""A handful of the cases of scripts/torture; its scripts run them by the hundred."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "scripts" / "torture"


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("kill_points.py", ["--most", "2", "--command", "make ggml", "--command", "calibrate"]),
        ("power.py", ["--cases", "4", "--command", "calibrate", "--command", "quantize"]),
        (
            "power.py",
            ["--first", "190", "--cases", "1", "--seed", "1"],
        ),  # layers that the pass has behind it are zeroed
        ("race.py", ["--pairs", "2"]),
    ],
)
def test_nothing_ends_with_other_bytes(script, options):
    done = subprocess.run([sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 findings" in done.stdout
