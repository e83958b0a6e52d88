"""What cannot succeed is refused before calibration starts, and before anything lies in the folder."""

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from quantkit import machine
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.job import checks
from quantkit.job import make as job
from quantkit.job.dry_run import what_it_takes
from quantkit.job.options import MakeOptions, Order

TEXT = TextChoice(n_tokens=1024)
OPTIONS = MakeOptions("1.58bit", calibration=Calibration(TEXT), evaluation=TextChoice(n_tokens=2048))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Of a run that must not come to calibrate."""
    monkeypatch.setattr(job, "collect", lambda *_, **__: pytest.fail("calibration began"))
    return tmp_path / "out"


def test_a_disk_without_room_for_the_file(folder, monkeypatch):
    """tiny-r1 in 1.58 bits takes 4.1 MB."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=4_000_000))
    with pytest.raises(
        QuantkitError, match=r"out: no room for 4.1 MB, 3.9 MiB; free are 4.0 MB, 3.8 MiB; choose another --output"
    ):
        job.make("tiny-r1", folder, OPTIONS)
    assert not folder.exists()


def test_a_disk_without_room_for_the_file_and_the_state(folder, monkeypatch):
    """Each of them would have it alone: 4.1 MB and 2.1 MB."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=5_000_000))
    with pytest.raises(QuantkitError, match=r"the state of the pass needs 2\.1 MB.* beside the file's 4\.1 MB"):
        job.make("tiny-r1", folder, OPTIONS)
    assert not folder.exists()


def test_importance_that_no_job_wrote_is_neither_replaced_nor_removed(folder, made):
    """It may have taken hours. Given as --imatrix it stays where it is, also when the folder is cleared."""
    folder.mkdir()
    imatrix = folder / "imatrix.gguf"
    shutil.copy(made / "imatrix.gguf", imatrix)
    for restart in (False, True):
        with pytest.raises(QuantkitError, match=r"imatrix\.gguf: no `make` wrote it, .* take it with --imatrix, or"):
            job.make("tiny-r1", folder, replace(OPTIONS, restart=restart))
    given = replace(OPTIONS, recipe="Q6_K", target="llama.cpp", imatrix=imatrix, verify=False)
    job.make("tiny-r1", folder, given)
    job.make("tiny-r1", folder, replace(given, recipe="Q8_0", restart=True))
    assert imatrix.read_bytes() == (made / "imatrix.gguf").read_bytes()


def test_memory_without_room_for_the_evaluation(folder, monkeypatch):
    """Two streams are compared at the end; calibration alone would fit."""
    monkeypatch.setattr(machine, "ram", lambda: 2_000_000_000)
    with pytest.raises(
        QuantkitError, match=r"evaluation: 2,048 tokens .*, but half of this machine's memory is 1\.0 GB.*--no-verify"
    ):
        job.make("tiny-r1", folder, OPTIONS)
    assert not folder.exists()


@pytest.mark.parametrize("recover", [False, True])
@pytest.mark.parametrize("free", [4_000_000, 5_000_000])
def test_a_dry_run_says_what_a_run_refuses(folder, monkeypatch, free, recover):
    """Disk: too little for the file; for it and the state of the pass; for recovery. All of it, the run's line among
    them."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    options = replace(OPTIONS, recover=recover)
    said = refusals(job.order_of("tiny-r1", folder, options))
    assert len(said) == (free == 4_000_000) + 1 + recover and not folder.exists()
    with pytest.raises(QuantkitError) as refused:
        job.make("tiny-r1", folder, options)
    numbers = re.compile(r"[\d,]+")  # what lies in the folder counts for recovery, and a dry run puts nothing there
    assert numbers.sub("", str(refused.value)) in [numbers.sub("", line) for line in said]


def test_a_dry_run_says_what_memory_has_no_room_for(folder, monkeypatch):
    """The evaluation by what the machine has, the pass by --memory."""
    monkeypatch.setattr(machine, "ram", lambda: 2_000_000_000)
    options = replace(OPTIONS, calibration=Calibration(TEXT, memory=10**8))
    evaluation, own = refusals(job.order_of("tiny-r1", folder, options))
    assert evaluation.startswith("evaluation: 2,048 tokens need") and own.startswith("1,024 tokens need")
    assert "--memory is 100.0 MB" in own


@pytest.mark.parametrize("recover", [False, True])
def test_a_dry_run_makes_no_place_for_hidden_states(folder, recover):
    options = replace(OPTIONS, calibration=Calibration(TEXT, hidden="disk"), recover=recover)
    assert not refusals(job.order_of("tiny-r1", folder, options)) and not folder.exists()


def refusals(order: Order) -> list[str]:
    """Of a dry run."""
    lines = (line.split(maxsplit=1) for line in what_it_takes(order))
    return [rest[0] for head, *rest in lines if head == "refused"]


def test_a_file_on_its_way_has_its_room_already(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
    folder.mkdir()
    (folder / "tiny-r1-1.58bit.gguf.part").touch()
    checks._check_disk(folder, 1 << 40)
