"""`make` straight from a Hub: the same bytes as from the folder, each needed byte once, within the cache's limit."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models import family
from quantkit.models.open import ModelRef, open_weights
from quantkit.remote.cache import home_of

DOCS = Path(__file__).parents[2] / "docs"  # texts that are cut into tokens at once
TEXT, OTHER = (TextChoice((str(DOCS / name),), n_tokens=1024) for name in ("architecture.md", "serve.md"))
HOW = Calibration(TEXT)
OPTIONS = MakeOptions(recipe="Q6_K", calibration=HOW, evaluation=OTHER, encoder="ggml")
LIMIT = 9_600_000  # two of the model's four layers, and its embeddings; the whole would be 13.2 MB


@pytest.fixture(scope="module")
def from_folder(sharded, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("from_folder")
    make(sharded, folder, OPTIONS)
    return results(folder)


def results(folder: Path) -> dict:
    """Bytes of every file; of the scores only what both ways of verifying give (a Hub model's layers are not compared),
    to four digits: rows of one product are summed in another order if others stand beside them."""
    skipped = ("provenance.json", "verify.json", "checksums.json")
    found: dict = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name not in skipped}
    scores = json.loads((folder / "verify.json").read_text()) if (folder / "verify.json").exists() else {}
    for key in ("seconds", "layers", "bad_layers"):
        scores.pop(key, None)
    return found | {"scores": {k: f"{v:.4g}" for k, v in scores.items() if isinstance(v, float)}}


def needed_bytes(sharded: Path) -> int:
    """Of all tensors that a GGUF is made from, and of all headers."""
    checkpoint = Checkpoint.open(sharded)
    names = [n for group in family.reading_order(family.from_hf(checkpoint.config)) for n in flat(group)]
    entries = [checkpoint.tensors[each] for n in names for each in (n, n + "_scale_inv") if each in checkpoint.tensors]
    headers = 0
    for shard in sharded.glob("*.safetensors"):
        headers += 8 + int.from_bytes(shard.read_bytes()[:8], "little")
    return sum(entry.n_bytes for entry in entries) + headers


def flat(group):
    return [name for each in group for name in ([each] if isinstance(each, str) else each)]


def downloaded(hub) -> tuple[int, int]:
    """Bytes of weights that left the Hub, and how many of them had left before."""
    total = twice = 0
    for file, ranges in hub.ranges.items():
        if file.endswith(".safetensors"):
            position = 0
            for begin, end in sorted(ranges):
                total += end - begin
                twice += max(0, min(end, position) - begin)
                position = max(position, end)
    return total, twice


class Watch:
    """The most bytes that a folder ever held."""

    def __init__(self, folder: Path):
        self.folder, self.most, self.done = folder, 0, threading.Event()
        self.thread = threading.Thread(target=self.run)

    def run(self) -> None:
        while not self.done.wait(0.002):
            found = 0
            for root, _, names in os.walk(self.folder):
                for name in names:
                    try:
                        found += os.lstat(os.path.join(root, name)).st_size
                    except FileNotFoundError:
                        pass
            self.most = max(self.most, found)

    def __enter__(self) -> "Watch":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.thread.join()


def test_same_bytes_each_needed_byte_once_within_the_limit(hub, env, sharded, from_folder, tmp_path):
    with Watch(env / "quantkit") as watch:
        make(ModelRef("user/tiny-r1", None, LIMIT), tmp_path / "out", OPTIONS)
    assert results(tmp_path / "out") == from_folder
    total, twice = downloaded(hub)
    assert twice == 0 and total == needed_bytes(sharded)  # so nothing of the MTP layer
    print(
        f"\n{total:,} bytes downloaded, {needed_bytes(sharded):,} needed, {twice} of them twice; "
        f"the cache held at most {watch.most:,} of {LIMIT:,} bytes"
    )
    listing = sum(path.stat().st_size for path in (home_of(hub.url) / "models").rglob("*") if not path.is_symlink())
    assert LIMIT // 2 < watch.most <= LIMIT + listing


def test_fifty_dropped_connections(hub, env, from_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("quantkit.remote.client.FIRST_WAIT", 0.01)
    count = hub.drop_randomly(50)
    make(ModelRef("user/tiny-r1", None, LIMIT), tmp_path / "out", OPTIONS)
    assert count["dropped"] == 50
    assert results(tmp_path / "out") == from_folder
    total, twice = downloaded(hub)
    print(f"\n50 connections dropped: {total:,} bytes left the Hub, {twice:,} of them twice")
    assert twice < total // 2  # what a broken connection had on its way


def test_killed_and_run_again(hub, env, sharded, from_folder, tmp_path, monkeypatch):
    """SIGKILL three times, each time after more of the weights have arrived."""
    command = [
        sys.executable,
        "-m",
        "quantkit",
        "make",
        "user/tiny-r1",
        "-o",
        tmp_path / "out",
        "--recipe",
        OPTIONS.recipe,
        "--encoder",
        "ggml",
        "--data",
        *TEXT.data,
        "--tokens",
        "1024",
        "--eval-data",
        *OTHER.data,
        "--eval-tokens",
        "1024",
    ]
    monkeypatch.setenv("QUANTKIT_CACHE_SIZE", str(LIMIT))
    needed = needed_bytes(sharded)
    for share in (0.3, 0.6, 0.9):
        process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
        while downloaded(hub)[0] < share * needed and process.poll() is None:
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "out") == from_folder
    total, _ = downloaded(hub)
    print(f"\nkilled three times: {total:,} bytes left the Hub, {needed:,} were needed")
    assert total < 2 * needed  # a kill costs what was on its way on eight connections; nothing begins from the start


def test_a_cache_that_holds_all_serves_the_next_run(hub, env, sharded):
    local = Checkpoint.open(sharded)
    for wanted in (needed_bytes(sharded), 0):
        hub.reset()
        remote = open_weights(ModelRef("user/tiny-r1"))
        for name in flat([names for group in family.reading_order(family.from_hf(remote.config)) for names in group]):
            assert torch.equal(remote.read(name), local.read(name))
        remote.close()
        assert downloaded(hub) == (wanted, 0)


@pytest.mark.large
def test_our_encoders_and_the_scores(hub, env, sharded, tmp_path):
    """The default job of a small model: 1.58bit, quantkit's encoders, verify."""
    text = TextChoice(n_tokens=8192)
    options = MakeOptions(calibration=Calibration(text), evaluation=text)
    make(sharded, tmp_path / "local", options)
    make(ModelRef("user/tiny-r1", None, LIMIT), tmp_path / "remote", options)
    assert results(tmp_path / "remote") == results(tmp_path / "local")
    total, twice = downloaded(hub)
    print(f"\n1.58bit, our encoders: {total:,} bytes downloaded, {needed_bytes(sharded):,} needed, {twice} twice")
    assert (total, twice) == (needed_bytes(sharded), 0)
