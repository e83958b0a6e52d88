"""A finished file is taken by a rerun only if it is what this very job made."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from quantkit.bundle import models_dir
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.job.make import make
from quantkit.job.options import MakeOptions

NAME = "tiny-r1-Q6_K.gguf"  # which ggml packs quickly


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"Line {i} says that {i} and {i} are {2 * i}." for i in range(200)))
    return path


def options(text: Path, **changed) -> MakeOptions:
    how = Calibration(text=TextChoice(data=(str(text),), n_tokens=512, chunk=128))
    return replace(MakeOptions("Q6_K", calibration=how, encoder="ggml", verify=False, device="cpu"), **changed)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A copy of the bundled model, whose small files may be edited."""
    folder = tmp_path_factory.mktemp("model") / "tiny-r1"
    shutil.copytree(models_dir() / "tiny-r1", folder, copy_function=os.link)
    for name in ("tokenizer_config.json", "config.json"):
        data = (folder / name).read_bytes()
        (folder / name).unlink()
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def finished(model, text, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    make(model, folder, options(text))
    assert not list(folder.glob("*.ledger"))
    return folder


@pytest.fixture
def folder(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "job"))


def test_the_same_job_takes_its_file(folder, model, text, capsys):
    before = (folder / NAME).stat().st_ino
    make(model, folder, options(text))
    assert (folder / NAME).stat().st_ino == before and "from an earlier run" in capsys.readouterr().err
    os.utime(folder / NAME)  # touched: it is read, and found to be the same
    make(model, folder, options(text))
    assert (folder / NAME).stat().st_ino == before


def garbage(path: Path) -> None:
    path.write_bytes(os.urandom(path.stat().st_size))


def shorter(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def a_page_of_zeros(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 4096] = bytes(4096)
    path.write_bytes(data)


def unknown(path: Path) -> None:
    path.with_name("checksums.json").unlink()


@pytest.mark.parametrize(
    ("damage", "says"),
    [(garbage, "bytes of"), (shorter, "has "), (a_page_of_zeros, "bytes of"), (unknown, "no checksums")],
)
def test_another_file_under_its_name_is_made_again(folder, finished, model, text, capsys, damage, says):
    damage(folder / NAME)
    make(model, folder, options(text))
    said = capsys.readouterr().err
    assert says in said and "it is made again" in said
    assert (folder / NAME).read_bytes() == (finished / NAME).read_bytes()


def test_a_missing_split_is_made_again(model, text, tmp_path, capsys):
    files, _ = make(model, tmp_path, options(text, split_max_bytes=2_000_000))
    whole = [file.read_bytes() for file in files]
    files[1].unlink()
    again, _ = make(model, tmp_path, options(text, split_max_bytes=2_000_000))
    assert f"{files[1].name} is missing; it is made again" in capsys.readouterr().err
    assert [file.read_bytes() for file in again] == whole


def test_a_run_stopped_between_the_renames_is_finished(model, text, tmp_path, monkeypatch):
    """Also one that was stopped before it could note what it had made."""
    split = options(text, split_max_bytes=2_000_000)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", _stop_after(2, os.replace))
        make(model, tmp_path, split)
    assert len(list(tmp_path.glob("*-of-*.gguf"))) == 1 and list(tmp_path.glob("*.part"))
    files, _ = make(model, tmp_path, split)
    assert len(files) == len(list(tmp_path.glob("*-of-*.gguf"))) > 2 and not list(tmp_path.glob("*.part*"))
    (tmp_path / "again").mkdir()
    whole, _ = make(model, tmp_path / "again", split)
    assert [file.read_bytes() for file in files] == [file.read_bytes() for file in whole]


def _stop_after(count: int, replace_file):
    """os.replace that is interrupted at the count-th file of the model."""
    seen = []

    def stopping(old, new):
        if Path(new).name.startswith("tiny-r1-Q6_K-0"):
            seen.append(new)
            if len(seen) == count:
                raise KeyboardInterrupt
        replace_file(old, new)

    return stopping


def test_other_text_tokenizer_or_splits_are_another_job(folder, model, text):
    with pytest.raises(QuantkitError, match="split_max_bytes was None, now 2000000"):
        make(model, folder, options(text, split_max_bytes=2_000_000))
    settings = model / "tokenizer_config.json"
    before, edited = settings.read_text(), text.read_text()
    try:
        settings.write_text(before.replace("{%", "{# edited #}{%", 1))
        with pytest.raises(QuantkitError, match="metadata was"):
            make(model, folder, options(text))
    finally:
        settings.write_text(before)
    try:
        text.write_text(edited + " more")
        with pytest.raises(QuantkitError, match="calibration_sha256 was"):
            make(model, folder, options(text))
    finally:
        text.write_text(edited)


def test_restart_measures_anew(folder, model, text):
    (folder / "imatrix.gguf").write_bytes(b"of another run")
    make(model, folder, options(text, restart=True))
    assert (folder / "imatrix.gguf").stat().st_size > 10_000
