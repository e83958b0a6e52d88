"""What kill_points.py, power.py and race.py put under stress: every command that writes, on a checkpoint of two layers.

The checkpoint is cut out of tiny-r1: its dense layer, a MoE layer with four of its experts, embedding and tokenizer. A
command runs in a fork of this process, which has the imports behind it, and takes a second or less.
"""

import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from quantkit import bundle
from quantkit.__main__ import main as command_line

EXPERTS, USED = 4, 2
PATIENCE = 120.0  # seconds for one run; more is a hang
COMMON = "--device cpu"
TEXT = "--data {inputs}/text.txt --tokens 512"
EVAL = "--eval-data {inputs}/other.txt --eval-tokens 512"
SPLIT = "--split-max-size 500000"


@dataclass(frozen=True)
class Scenario:
    """command: with {out}, a folder of its own, {inputs} and {model}. anew: options by which it begins anew, where it
    refuses."""

    name: str
    command: str
    anew: tuple[str, ...] = ("--restart",)


RECIPE = """
name = "quick"
description = "Types that ggml encodes in a moment."
target = "llama.cpp"
rules = [
    { match = "output", qtype = "Q6_K", why = "quick" },
    { match = "attn_k_b", qtype = "Q8_0", why = "its rows are short" },
    { match = "ffn_*_exps", qtype = "Q2_K", why = "quick" },
    { match = "*", qtype = "Q4_K", why = "quick" },
]
"""
OURS = "--encoder quantkit --effort fast"
MAKE = f"make {{model}} -o {{out}} {TEXT} {EVAL} {COMMON}"
QUICK = f"{MAKE} --recipe {{inputs}}/quick.toml"
SCENARIOS = [
    Scenario("make ggml", f"{QUICK} --encoder ggml --no-verify {SPLIT}"),
    Scenario("make", f"{QUICK} {OURS} {SPLIT}"),
    Scenario("make --imatrix", f"{QUICK.replace(TEXT, '')} --imatrix {{inputs}}/imatrix.gguf --no-verify {SPLIT}"),
    Scenario("make --recover", f"{QUICK} {OURS} --recover --no-verify"),
    Scenario("make best", f"{MAKE} --size 900KB --effort best --no-verify"),
    Scenario("calibrate", f"calibrate {{model}} -o {{out}}/imatrix.gguf {TEXT} {COMMON}"),
    Scenario(
        "calibrate --gradients",
        f"calibrate {{model}} -o {{out}}/imatrix.gguf --gradients {{out}}/g --gradient-tokens 512 {TEXT} {COMMON}",
    ),
    Scenario(
        "sensitivity",
        f"sensitivity {{model}} --imatrix {{inputs}}/imatrix.gguf -o {{out}} --types Q2_K --other-types Q4_K {TEXT} "
        f"{COMMON}",
        anew=(),
    ),
    Scenario("plan", "plan {model} --recipe {inputs}/quick.toml -o {out}/plan.json", anew=()),
    Scenario(
        "quantize",
        f"quantize {{model}} --plan {{inputs}}/plan.json --imatrix {{inputs}}/imatrix.gguf -o {{out}}/q.gguf {SPLIT}",
        anew=("--restart", "--overwrite"),
    ),
    Scenario(
        "verify",
        "verify {inputs}/q.gguf --reference {model} --data {inputs}/other.txt --tokens 512 --json {out}/verify.json "
        f"{COMMON}",
        anew=(),
    ),
    Scenario("export-kt", "export-kt {inputs}/q.gguf -o {out}/kt", anew=()),
    Scenario("certify", f"certify {{inputs}}/q.gguf --no-oracle --json {{out}}/certify.json {COMMON}", anew=()),
]
BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}


def cut_model(folder: Path) -> Path:
    """The checkpoint of two layers."""
    folder.mkdir(parents=True)
    origin = bundle.models_dir() / "tiny-r1"
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(origin / name, folder)
    config = json.loads((origin / "config.json").read_text())
    config |= {"num_hidden_layers": 2, "n_routed_experts": EXPERTS, "num_experts_per_tok": USED}
    config |= {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
    (folder / "config.json").write_text(json.dumps(config))
    kept: dict[str, torch.Tensor] = {}
    for shard in sorted(origin.glob("*.safetensors")):
        for name, tensor in load_file(shard).items():
            layer, expert = (re.search(rf"\.{what}\.(\d+)\.", name) for what in ("layers", "experts"))
            if (layer is None or int(layer[1]) < 2) and (expert is None or int(expert[1]) < EXPERTS):
                kept[name] = tensor[:EXPERTS].clone() if ".mlp.gate." in name else tensor
    save_file(kept, folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(kept, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


class Stage:
    """A scratch folder with the model, texts, and what commands need that do not make it themselves."""

    def __init__(self, scratch: Path):
        self.scratch, self.inputs, self.count = scratch, scratch / "inputs", 0
        self.model = cut_model(scratch / "small")
        self.inputs.mkdir()
        (self.inputs / "quick.toml").write_text(RECIPE)
        for name, word in (("text.txt", "says"), ("other.txt", "claims")):
            lines = (f"Line {i} {word} that {i} and {i + 1} are {2 * i + 1}." for i in range(200))
            (self.inputs / name).write_text("\n\n".join(lines))
        for command in (
            f"calibrate {{model}} -o {{inputs}}/imatrix.gguf {TEXT} {COMMON}",
            "plan {model} --recipe {inputs}/quick.toml -o {inputs}/plan.json",
            "quantize {model} --plan {inputs}/plan.json --imatrix {inputs}/imatrix.gguf -o {inputs}/q.gguf",
        ):
            code, said = finish(start(self.words(command, self.inputs), self.inputs / "err"))
            assert code == 0, (command, said)

    def words(self, command: str, out: Path) -> list[str]:
        """The arguments of a command."""
        places = {"out": out, "inputs": self.inputs, "model": self.model}
        return [word.format(**places) for word in command.split()]

    def folder(self) -> Path:
        """A new empty one."""
        self.count += 1
        folder = self.scratch / f"case-{self.count}" / "out"
        folder.mkdir(parents=True)
        return folder

    def drop(self, folder: Path) -> None:
        """Remove what `folder` gave."""
        shutil.rmtree(folder.parent)


@dataclass
class Run:
    """A fork at work."""

    pid: int
    err: Path
    began: float


def start(words: list[str], err: Path, hook: Callable[[], None] | None = None) -> Run:
    """Run a command in a fork. hook: called in it first, to bend functions of `os`."""
    began = time.monotonic()
    if pid := os.fork():
        return Run(pid, err, began)
    code = 70
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.dup2(os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
        from quantkit import progress

        progress.console.file = sys.stderr
        sys.argv = ["quantkit", *words]
        torch.set_num_threads(1)
        if hook:
            hook()
        command_line(words, standalone_mode=False)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(run: Run, kill_at: float | None = None) -> tuple[int, str]:
    """Exit status, -9 for a kill, and what it said. kill_at: SIGKILL so many seconds after it began."""
    while True:
        done, status = os.waitpid(run.pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), run.err.read_text(errors="replace")
        age = time.monotonic() - run.began
        if age > (PATIENCE if kill_at is None else kill_at):
            os.kill(run.pid, signal.SIGKILL)
            os.waitpid(run.pid, 0)
            assert kill_at is not None, f"a run hangs: {run.err.read_text(errors='replace')[-2000:]}"
            return -signal.SIGKILL, run.err.read_text(errors="replace")
        time.sleep(0.002)


def results(folder: Path) -> dict[str, bytes]:
    """What a command left, without what differs from run to run: the seconds it took, the place it lies."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name == ".quantkit.lock":
            continue
        name, data = str(path.relative_to(folder)), path.read_bytes()
        if path.suffix == ".json":
            try:
                data = json.dumps(without_time(json.loads(data))).encode()
            except ValueError:
                data = b"not JSON: " + data
        if path.suffix == ".png":
            data = b""  # matplotlib writes its version and may write its time
        found[name] = data.replace(str(folder).encode(), b"OUT")
    return found


def without_time(value: object) -> object:
    """A JSON value without fields that are of one run."""
    if isinstance(value, dict):
        return {
            key: without_time(v) for key, v in value.items() if key not in ("seconds", "command", "tokens_per_second")
        }
    return value


def refusal(said: str) -> str | None:
    """The one line by which a run refused; None if it ended in another way."""
    lines = [line for line in said.splitlines() if line.startswith("quantkit: ")]
    return lines[0] if len(lines) == 1 and "Traceback" not in said else None


class Verdicts:
    """What became of the cases: the reference's bytes, a refusal, or a finding."""

    def __init__(self) -> None:
        self.same, self.refused, self.findings = 0, dict[str, int](), list[str]()

    def find(self, finding: str) -> None:
        """Note a finding, and print it: a long run may be cut off."""
        self.findings.append(finding)
        print(f"  FINDING {finding}", flush=True)

    def judge(self, what: str, code: int, said: str, folder: Path, expected: dict[str, bytes]) -> bool:
        """Note a case; whether it ended with the reference's bytes. Files beside them are findings, too."""
        if code == 0:
            found = results(folder)
            if found == expected:
                self.same += 1
                return True
            differ = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
            self.find(f"{what}: exit 0, but {differ} differ")
        elif code == 1 and (line := refusal(said)):
            self.refused[line] = self.refused.get(line, 0) + 1
        else:
            self.find(f"{what}: exit {code}: {said[-1500:]}")
        return False

    def report(self, cases: int, seconds: float) -> str:
        """In a line."""
        n_refused = sum(self.refused.values())
        return (
            f"{cases} cases: {self.same} with the reference's bytes, {n_refused} refused in one line, "
            f"{len(self.findings)} findings, {seconds:.0f} s"
        )
