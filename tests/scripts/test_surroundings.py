"""scripts/torture/containers.py tells a refusal from a failure, and its environments are what they say."""

import os

import containers
import pytest


@pytest.mark.parametrize(
    ("code", "stderr", "verdict"),
    [
        (0, "warning: x\n", "ok"),
        (1, "layers 10 %\nquantkit: no room\n", "refused"),
        (1, "quantkit: a\nquantkit: b\n", "FAILED"),
        (1, "", "FAILED"),
        (1, "Traceback (most recent call last):\nquantkit: x\n", "FAILED"),
        (-9, "", "FAILED (-9)"),
        (None, "", "HANGS"),
    ],
)
def test_verdicts(code, stderr, verdict):
    assert containers.judge(code, stderr).startswith(verdict)


def test_a_command_sees_its_environment():
    """Address space, open files, streams and variables of the child; it is a real one, which refuses."""
    for name in ("address space of 8 GB", "64 open files", "closed stdin", "latin-1"):
        code, stderr = containers.attempt(containers.ENVIRONMENTS[name], ["run", "/nowhere.gguf"], 60)
        assert code == 2 and "does not exist" in stderr, name
    before = len(os.sched_getaffinity(0))
    code, stderr = containers.attempt(containers.ENVIRONMENTS["one core"], ["plan", "nothing", "--recipe", "x"], 60)
    assert containers.judge(code, stderr) == "refused" and len(os.sched_getaffinity(0)) == before
