"""Several processes, one file: the bytes of one process, whatever their number, and no orphan of a lost rank."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from quantkit import bundle, ranks
from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.planning.budget import BudgetOptions
from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns
from quantkit.runtime.watch import Watcher

TOKENS = 512
TEXT = Path(__file__).parents[2] / "docs" / "architecture.md"  # the bundled one takes a second to be cut into tokens
OURS = MakeOptions(
    recipe="2.51bit",  # of types without tables: ggml builds those of IQ1_S for ten seconds in every process
    calibration=Calibration(TextChoice((str(TEXT),), n_tokens=TOKENS)),
    encoder="quantkit",
    effort="fast",
    device="cpu",
    verify=False,
)
NAME = "tiny-r1-2.51bit.gguf"
SCRIPTS = Path(__file__).parents[2] / "scripts" / "bench"
# As the launcher gives each rank: the last bits of products depend on how many threads share them.
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def launch(n: int, *arguments: object) -> subprocess.Popen:
    """`accelerate launch` of n ranks; what they say comes on stderr, with the launcher's own report of a failure."""
    return launch_script(n, "-m", "quantkit", *arguments)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_script(n: int, *arguments: object) -> subprocess.Popen:
    launcher = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_machines",
        1,
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        free_port(),
    ]
    command = [*launcher, "--num_processes", n, *arguments]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(n: int, *arguments: object) -> None:
    """n ranks to their end, without a launcher, which takes longer to start than they do."""
    around = ONE_THREAD | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(n)}
    command = list(map(str, [sys.executable, "-m", "quantkit", *arguments]))
    started = []
    for rank in map(str, range(n)):
        env = around | {"RANK": rank, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": str(n)}
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env))
    said = [process.communicate(timeout=300) for process in started]  # a pipe holds all that one says
    assert [process.returncode for process in started] == [0] * n, said
    assert [bool(stdout) for stdout, _ in said] == [True] + [False] * (n - 1)


def make_words(folder: Path, *more: object) -> list[object]:
    text = ("--data", TEXT, "--tokens", TOKENS)
    return ["make", "tiny-r1", "-o", folder, *text, "--device", "cpu", "--no-verify", *more]


BY_US = ("--recipe", "2.51bit", "--encoder", "quantkit", "--effort", "fast")


def ours(n: int, folder: Path) -> subprocess.Popen:
    return launch(n, *make_words(folder, *BY_US))


def end(process: subprocess.Popen) -> tuple[int, str]:
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode or len(stdout.splitlines()) == len({*stdout.splitlines()}) > 0  # rank 0 alone prints
    return process.returncode, stderr


def complaints(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("quantkit: ")]


def processes_of(launcher: int) -> dict[int, int]:
    """rank -> process, of those that a launcher has started."""
    found = {}
    for pid in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        around = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        found |= {int(value[5:]): int(pid) for value in around if value.startswith(b"RANK=")}
    return found


def gone(pids: Iterable[int]) -> bool:
    """Whether they end soon: who inherits the dead may bury them a little later."""
    until = time.monotonic() + 60
    while (left := [pid for pid in pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    return not left


@pytest.fixture(scope="module")
def calm(tmp_path_factory) -> Path:
    """One process."""
    folder = tmp_path_factory.mktemp("calm")
    make("tiny-r1", folder, OURS)
    return folder


@pytest.mark.parametrize("n", [pytest.param(2, marks=pytest.mark.large), 3, pytest.param(4, marks=pytest.mark.large)])
def test_one_pass_has_the_bytes_of_one_process(calm, tmp_path, n):
    """3: shares of experts that differ."""
    together(n, *make_words(tmp_path, *BY_US))
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in calm.iterdir()}
    for name in (NAME, "imatrix.gguf", "plan.json"):
        assert (tmp_path / name).read_bytes() == (calm / name).read_bytes(), name


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.large)])
def test_ggml_has_the_bytes_of_one_process(tmp_path, n):
    """Jobs shared out, in split files, of types that are quick to encode."""
    options = dataclasses.replace(
        OURS, recipe=None, encoder="ggml", budget=BudgetOptions(bpw=6), split_max_bytes=4_000_000
    )
    make("tiny-r1", tmp_path / "one", options)
    together(n, *make_words(tmp_path / "n", "--encoder", "ggml", "--size", "6bpw", "--split-max-size", "4M"))
    names = {path.name for path in (tmp_path / "one").glob("*.gguf")}
    assert len(names) >= 4 and names == {path.name for path in (tmp_path / "n").glob("*.gguf")}
    for name in names:
        assert (tmp_path / "n" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.large
@pytest.mark.parametrize("n", [2, 4])
def test_ggml_in_one_pass_and_verification(made, tmp_path, n):
    """All of `make` as ranks: the file and its imatrix, then rank 0 measures it."""
    process = launch(
        n,
        "make",
        "tiny-r1",
        "-o",
        tmp_path,
        "--encoder",
        "ggml",
        "--tokens",
        8192,
        "--eval-tokens",
        4096,
        "--device",
        "cpu",
    )
    stdout, stderr = process.communicate(timeout=400)
    assert process.returncode == 0 and "same top-1" in stdout, stderr
    for name in ("tiny-r1-1.58bit.gguf", "imatrix.gguf"):
        assert (tmp_path / name).read_bytes() == (made / name).read_bytes(), name
    mine, theirs = (json.loads((folder / "verify.json").read_text()) for folder in (tmp_path, made))
    assert mine["kld_mean"] == pytest.approx(theirs["kld_mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("n", "victim", "again"),
    [(2, 1, 1), pytest.param(4, 0, 2, marks=pytest.mark.large), pytest.param(2, 0, 4, marks=pytest.mark.large)],
)
def test_a_rank_that_is_killed_ends_all_and_another_number_goes_on(calm, tmp_path, n, victim, again):
    process = ours(n, tmp_path)
    ledgers = [tmp_path / f"{NAME}.part.ledger", tmp_path / f"{NAME}.part.ledger.1"]
    until = time.monotonic() + 400
    while not all(path.exists() and path.read_bytes().count(b"\n") > 4 for path in ledgers):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)
    started = processes_of(process.pid)
    assert sorted(started) == list(range(n))
    os.kill(started[victim], signal.SIGKILL)
    code, stderr = end(process)
    assert code != 0 and len(complaints(stderr)) == 1, stderr
    assert "same command" in complaints(stderr)[0]  # the loss, or the launcher's signal, whichever comes first
    assert gone(started.values())
    assert not (tmp_path / NAME).exists()
    recorded = sum(path.read_bytes().count(b"\n") - 1 for path in tmp_path.glob("*.ledger*"))
    assert recorded >= 8
    if again == 1:
        make("tiny-r1", tmp_path, OURS)
    else:
        assert end(ours(again, tmp_path))[0] == 0
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in calm.iterdir()}
    assert (tmp_path / NAME).read_bytes() == (calm / NAME).read_bytes()


@pytest.fixture(scope="module")
def derived(tmp_path_factory) -> tuple[list[object], dict[str, bytes]]:
    """What to ask for, and the files of one process."""
    folder = tmp_path_factory.mktemp("derived")
    (folder / "text.txt").write_text(
        "".join(f"{i} is {'odd' if i % 2 else 'even'}, and {i * i} too.\n" for i in range(99))
    )
    asked = ["calibrate", "tiny-r1", "--data", folder / "text.txt", "--tokens", 1024, "--gradient-tokens", 512]
    asked += ["--device", "cpu"]
    derive(asked, folder)
    return asked, files_of(folder / "g")


def alone(*arguments: object) -> None:
    """In this process, with one thread as each rank has."""
    before = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        try:
            main(list(map(str, arguments)), standalone_mode=False)
        finally:
            torch.set_num_threads(before)


def derive(asked: list[object], folder: Path) -> None:
    alone(*asked, "-o", folder / "imatrix.gguf", "--gradients", folder / "g")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_gradients_have_the_bytes_of_one_process_though_ranks_were_killed(derived, tmp_path):
    """Two ranks, stopped in the middle of the way back; then one goes on."""
    asked, expected = derived
    process = launch(2, *asked, "-o", tmp_path / "imatrix.gguf", "--gradients", tmp_path / "g")
    until = time.monotonic() + 400
    while not (tmp_path / "g" / "gradients-002.safetensors").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.002)
    os.kill(processes_of(process.pid)[1], signal.SIGKILL)
    code, stderr = end(process)
    assert code != 0 and len(complaints(stderr)) == 1 and "same command" in complaints(stderr)[0], stderr
    done = {path.name: path.read_bytes() for path in (tmp_path / "g").glob("*.safetensors")}
    assert len(done) >= 2 and done.items() <= expected.items()
    derive(asked, tmp_path)
    assert files_of(tmp_path / "g") == expected


@pytest.mark.parametrize("n", [2, pytest.param(4, marks=pytest.mark.large)])
def test_gradients_and_estimates_of_ranks_are_those_of_one(derived, tmp_path, n):
    """Each layer's file is written by all of them; then a sample of experts is encoded."""
    asked, expected = derived
    together(n, *asked, "-o", tmp_path / "imatrix.gguf", "--gradients", tmp_path / "g")
    assert files_of(tmp_path / "g") == expected
    about = ["sensitivity", *asked[1:4], "--gradients", tmp_path / "g", "--tokens", 512, "--device", "cpu"]
    about += ["--types", "IQ4_NL", "--other-types", "Q8_0", "-o"]
    together(n, *about, tmp_path / "several")
    alone(*about, tmp_path / "one")
    name = "sensitivity.json"
    assert (tmp_path / "several" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_what_all_ranks_refuse_is_said_once(tmp_path):
    code, stderr = end(launch(2, *make_words(tmp_path / "out", "--recipe", "9bit")))
    assert code != 0 and len(complaints(stderr)) == 1 and "9bit" in complaints(stderr)[0]
    assert not (tmp_path / "out").exists()


FAILING = """
from quantkit import ranks
from quantkit.__main__ import main
from quantkit.encoding.layer import LayerEncoder
from quantkit.errors import QuantkitError

def fail(self, waiting):
    raise QuantkitError("this expert is damaged")

encode = LayerEncoder._encode_experts
LayerEncoder._encode_experts = lambda self, waiting: (fail if ranks.index() == 1 else encode)(self, waiting)
main()
"""


def test_an_error_of_one_rank_ends_all(tmp_path):
    script = tmp_path / "failing.py"
    script.write_text(FAILING)
    process = launch_script(
        2,
        script,
        *make_words(tmp_path / "out", *BY_US),
    )
    code, stderr = end(process)
    assert code != 0 and complaints(stderr) == ["quantkit: rank 1: this expert is damaged"], stderr
    assert not (tmp_path / "out" / NAME).exists()


def test_a_launcher_that_starts_one_of_several_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    with pytest.raises(QuantkitError, match="with --multi_gpu it starts them all"):
        ranks.join()


class Table:
    """The launcher's store, with another rank in it that beats no more."""

    def __init__(self):
        self.values = {ranks.ALIVE + "1": b"7"}

    def set(self, key, value):
        self.values[key] = value

    def get(self, key):
        return self.values[key]

    def check(self, keys):
        return all(key in self.values for key in keys)

    def add(self, key, amount):
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]


def test_a_rank_that_falls_silent_ends_the_others(monkeypatch, capfd):
    """Not the process but its host is gone, and this one's main thread waits for it."""
    signals, exits = [], []
    monkeypatch.setattr(ranks, "BEAT", 0.01)
    monkeypatch.setattr(ranks, "LOST", 0.1)
    monkeypatch.setattr(ranks, "GRACE", 0.05)
    monkeypatch.setattr(signal, "pthread_kill", lambda _, number: signals.append(number))
    monkeypatch.setattr(os, "_exit", exits.append)
    table, began = Table(), time.monotonic()
    ranks._watch(table, 0, 2, threading.Event())
    assert 0.1 <= time.monotonic() - began < 10
    assert signals == [signal.SIGTERM] and exits == [1]
    assert "rank 1 was not heard of" in capfd.readouterr().err
    assert table.values[ranks.FAILED] == 1


@pytest.mark.parametrize("n_ranks", [2, 3, 5])
def test_shared_experts_add_up_as_one_rank_does(monkeypatch, n_ranks):
    """Every rank's part, run after another, with the rows that the others would send: sums equal to the bit."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(16, 3, 24, 24, generator=generator)
    x, share = torch.randn(50, 24, generator=generator), torch.rand(50, 4, generator=generator)
    expert = torch.rand(50, 13, generator=generator).topk(4).indices  # three are never chosen

    class Seen(Watcher):
        def __init__(self):
            self.experts: list[int] = []

        def observe_expert(self, visit):
            self.experts.append(visit.expert)

    def compute(turns: Turns, watcher: Seen) -> torch.Tensor:
        return StreamedExperts(lambda e: tuple(weights[e]), 16, turns)(x, expert, share, watcher=watcher)

    seen, met = Seen(), Seen()
    expected = compute(ALONE, seen)
    handed: dict[int, list[torch.Tensor]] = {}

    def run(rank: int, exchange) -> torch.Tensor:
        monkeypatch.setattr(ranks, "index", lambda: rank)
        monkeypatch.setattr(ranks, "spread", exchange)
        return compute(Turns(size=2, shared=True), met)

    def note(t: torch.Tensor, owner: int) -> torch.Tensor:
        if owner == ranks.index() and t.shape[1] == x.shape[1]:  # rows, not the routing
            handed.setdefault(owner, []).append(t)
        return t

    def receive(t: torch.Tensor, owner: int) -> torch.Tensor:
        return next(waiting[owner]) if t.shape[1] == x.shape[1] else t

    monkeypatch.setattr(ranks, "count", lambda: n_ranks)
    for rank in range(n_ranks):
        run(rank, note)
    assert sorted(met.experts) == seen.experts == list(range(13))
    for rank in range(n_ranks):
        waiting = {owner: iter(rows) for owner, rows in handed.items()}
        assert torch.equal(run(rank, receive), expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_have_the_bytes_of_one(tmp_path):
    """Compares one and two ranks, rows travelling by NCCL."""
    command = [sys.executable, SCRIPTS / "ranks.py", bundle.models_dir() / "tiny-r1", "--out", tmp_path]
    done = subprocess.run([*command, "--tokens", "8192", "--device", "cuda"], capture_output=True, text=True)
    assert done.returncode == 0 and "same bytes" in done.stdout, done.stdout + done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("victim", [0, 1])
def test_a_rank_that_is_killed_on_a_gpu_does_not_leave_the_other_waiting(tmp_path, victim):
    process = launch_script(
        2,
        SCRIPTS / "onepass.py",
        bundle.models_dir() / "tiny-r1",
        "--out",
        tmp_path,
        "--tokens",
        65536,
        "--device",
        "cuda",
    )
    until = time.monotonic() + 400
    while not (tmp_path / "synthetic.gguf.part.ledger.1").exists():
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)
    started = processes_of(process.pid)
    os.kill(started[victim], signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=100)
    assert process.returncode != 0 and time.monotonic() - began < 60
    assert gone(started.values())
    assert not (tmp_path / "synthetic.gguf").exists()
