"""Whatever is read whole is a regular file of a size that its kind has: nothing hangs, nothing fills the memory."""

import os
import re
import shutil
import socket
import threading
from pathlib import Path

import pytest

import quantkit
from quantkit import bundle
from quantkit.calibration import corpus
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import MOST, read_whole
from quantkit.formats.checkpoint import INDEX, Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.imatrix import load_imatrix
from quantkit.formats.sensitivity import Sensitivity
from quantkit.job.folder import PROVENANCE, claim
from quantkit.job.plan import plan_model
from quantkit.job.publish.folder import read_folder
from quantkit.job.report.material import Material
from quantkit.models.family import PRE
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.planning.recipe import Recipe

TINY = bundle.models_dir() / "tiny-r1"
READERS = {
    "config.json": Checkpoint.open,
    INDEX: Checkpoint.open,
    "tensors.json": Geometry.load,
    "tokenizer.json": lambda folder: read_tokenizer(folder, PRE),
    "mine.toml": lambda folder: Recipe.load(folder / "mine.toml"),
    "text of mine.toml": lambda folder: Recipe.text(folder / "mine.toml"),
    "plan.json": lambda folder: plan_model(TINY, str(folder / "plan.json")),
    "imatrix.gguf": lambda folder: load_imatrix(folder / "imatrix.gguf"),
    "x.gguf": lambda folder: GGUFFile.open(folder / "x.gguf"),
    "data.txt": lambda folder: corpus.load([str(folder / "data.txt")]),
    "data.jsonl": lambda folder: corpus.load([str(folder / "data.jsonl")]),
    "s.json": lambda folder: Sensitivity.load(folder / "s.json"),
    PROVENANCE: lambda folder: claim(folder, {"a": 1}, False),
    "plan.json of a report": Material.load,
    "plan.json to publish": read_folder,
}


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)


KINDS = {
    "fifo": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "socket": make_socket,
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", READERS)
def test_only_regular_files_are_read(tmp_path, monkeypatch, what, kind):
    name, folder = what.split(" of a ")[0].split(" to ")[0].removeprefix("text of "), tmp_path / "model"
    folder.mkdir()
    for each in ("config.json", "tokenizer.json", INDEX):
        shutil.copy(TINY / each, folder)
    if name == "tensors.json":
        (folder / INDEX).unlink()
    (folder / name).unlink(missing_ok=True)
    monkeypatch.chdir(folder)  # the address of a socket is short
    KINDS[kind](folder / name)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            READERS[what](folder)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "it hangs"
    assert len(caught) == 1 and isinstance(caught[0], QuantkitError) and name in str(caught[0]), caught


@pytest.mark.parametrize(
    "what", ["config.json", INDEX, "tokenizer.json", "mine.toml", "plan.json", "s.json", PROVENANCE]
)
def test_nothing_larger_than_its_kind_is_read(tmp_path, what):
    """Holes in a file take no disk; all of it would take memory."""
    folder = Path(shutil.copytree(TINY, tmp_path / "model"))
    with (folder / what).open("ab") as file:
        file.truncate(3 << 30)
    with pytest.raises(QuantkitError, match=r"larger than [0-9,]+ bytes; not a \w+ file"):
        READERS[what](folder)


def test_a_file_as_large_as_it_may_be_is_read(tmp_path, monkeypatch):
    monkeypatch.setitem(MOST, "recipe", 1000)
    path = tmp_path / "r"
    path.write_bytes(bytes(1000))
    assert read_whole(path, "recipe") == bytes(1000)
    path.write_bytes(bytes(1001))
    with pytest.raises(QuantkitError, match="larger than 1,000 bytes; not a recipe file"):
        read_whole(path, "recipe")
    path.write_bytes(b"\xff")
    with pytest.raises(QuantkitError, match="not UTF-8"):
        corpus.load([str(path)])


UNGUARDED = re.compile(r"\.read_bytes\(\)|\.read_text\(|\bfrom_file\(|\bopen\([^)]*\"rb?\"")
OWN = {  # reads only what this process, its package or the kernel wrote
    "planning/published.py",
    "runtime/native/compiler.py",
    "formats/gradients.py",
    "formats/ledger.py",
    "formats/part_file.py",
    "calibration/corpus.py",
    "evaluation/behaviour/tasks.py",
    "evaluation/oracles/llama.py",
    "evaluation/oracles/llama_tool.py",
    "job/publish/card.py",
    "container.py",
    "ggml/library.py",
    "evaluation/oracles/hf.py",
    "job/recovery/twin.py",
    "job/recovery/recover.py",
    "machine.py",
    "remote/cache.py",
    "runtime/room.py",
    "serving/extras.py",
}


def test_nothing_else_opens_files_by_itself():
    package = Path(quantkit.__file__).parent
    found = {str(path.relative_to(package)) for path in package.rglob("*.py") if UNGUARDED.search(path.read_text())}
    assert not found - OWN, f"read these by byte_source.read_whole or read_text: {sorted(found - OWN)}"
