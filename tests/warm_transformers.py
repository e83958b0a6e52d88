"""transformers loaded once for all tests of a worker that ask it, by a process that forks for each question: to load it
takes four seconds, and a small random model of a test a tenth of one."""

import os
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import quantkit
from quantkit.evaluation.oracles.child import run_module

SERVER = """
import json, os, signal, sys
from pathlib import Path
answers = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
import torch, transformers
from quantkit.evaluation.oracles import hf
for line in sys.stdin:
    path = Path(line.strip())
    getattr(transformers, json.loads(path.read_text())["config"]["architectures"][0], None)
    if not (pid := os.fork()):
        signal.alarm(120)  # a fork that hangs is no answer
        try:
            hf._serve(path)
        finally:
            os._exit(1)
    os.write(answers, b"%d\\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


class WarmTransformers:
    """In place of `child.run_module` in the oracle. What it does not answer is asked as users do, for the error."""

    def __init__(self) -> None:
        self.server: subprocess.Popen[str] | None = None

    def __call__(
        self, module: str, request: str, name: str, timeout: float, settings: Mapping[str, str] | None = None
    ) -> None:
        if self.server is None:
            places = [str(Path(quantkit.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
            around = os.environ | {"PYTHONPATH": os.pathsep.join(places)} | dict(settings or {})
            pipe, null = subprocess.PIPE, subprocess.DEVNULL
            command = [sys.executable, "-c", SERVER]
            self.server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=null, text=True, env=around)
        assert self.server.stdin and self.server.stdout
        with suppress(BrokenPipeError):
            print(request, file=self.server.stdin, flush=True)
        if self.server.stdout.readline() != "0\n":
            run_module(module, request, name, timeout, settings)

    def close(self) -> None:
        """End the process, if there is one."""
        if self.server:
            self.server.communicate()
