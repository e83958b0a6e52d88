"""What is said before, beside and after a job: forecast, status, and a finished job at once."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from patience import wait_for

from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.errors import QuantkitError
from quantkit.job import make as job
from quantkit.job.dry_run import what_it_takes
from quantkit.job.folder import begin
from quantkit.job.make import make, order_of
from quantkit.job.options import MakeOptions
from quantkit.job.status import status

SHORT = Calibration(TextChoice(n_tokens=8192))
AS_MADE = MakeOptions(calibration=SHORT, evaluation=TextChoice(n_tokens=4096), encoder="ggml")  # as the fixture is


def left(model: str, folder: Path, options: MakeOptions) -> list[str]:
    return what_it_takes(order_of(model, folder, options))


def test_a_dry_run_says_all_and_writes_nothing(tmp_path):
    out = tmp_path / "out"
    done = CliRunner().invoke(main, ["make", "--dry-run", "-o", str(out)])
    assert done.exit_code == 0 and not out.exists()
    heads = [line.split()[0] for line in done.output.splitlines()]
    assert heads == ["encoder", "reads", "writes", "disk", "RAM", "time"]
    said = dict(zip(heads, done.output.splitlines(), strict=True))
    assert "12.5 MB, 11.9 MiB" in said["reads"] and "4.1 MB, 3.9 MiB, 1 file in" in said["writes"]
    assert re.search(r"about \d+ (seconds|minutes)", said["time"])


def test_a_dry_run_says_what_is_left(made, tmp_path):
    """Of a finished job, of its scores, of a damaged one, of another's folder; nothing is written."""
    folder = Path(shutil.copytree(made, tmp_path / "made"))
    make("tiny-r1", folder, AS_MADE)  # once more if the fixture's scores are of other options
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    file, scores = left("tiny-r1", folder, AS_MADE)
    assert re.fullmatch(r"finished +tiny-r1-1.58bit.gguf, 4\.1 MB, .* nothing is encoded", file)
    assert scores.split() == ["scores", "known", "(verify.json)"]
    other = replace(AS_MADE, evaluation=TextChoice(n_tokens=2048))
    assert "not yet: this file and the original are read" in left("tiny-r1", folder, other)[1]
    with pytest.raises(QuantkitError, match="holds another job"):
        left("tiny-r1", folder, replace(AS_MADE, recipe="2.51bit"))
    assert left("tiny-r1", folder, replace(AS_MADE, restart=True))[0].startswith("encoder ")
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    imatrix, kept = folder / "imatrix.gguf", (folder / "imatrix.gguf").read_bytes()
    imatrix.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    for refused in (left, make):
        with pytest.raises(QuantkitError, match=r"the bytes of imatrix\.gguf were changed since the run ended; put it"):
            refused("tiny-r1", folder, AS_MADE)
    imatrix.write_bytes(kept)
    with (folder / "tiny-r1-1.58bit.gguf").open("ab") as cut:
        cut.write(b"x")
    again = left("tiny-r1", folder, AS_MADE)
    assert re.match(r"again .* has 4,066,209 bytes, not 4,066,208", again[0]) and again[1].startswith("encoder ")


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "quantkit, effort normal: a small model, 12 M weights"),
        ({"encoder": "ggml"}, "about twice the KLD"),
        ({"encoder": "ggml", "recipe": "Q4_K_M"}, "a larger KLD than quantkit's"),
        ({"encoder": "ggml", "recipe": "Q8_0"}, "quantkit too leaves these types to it"),
        ({"encoder": "quantkit", "effort": "fast"}, "quantkit, effort fast, as asked"),
        ({"imatrix": "imatrix.gguf"}, "ggml, for --imatrix holds no second moments: about twice the KLD"),
    ],
)
def test_the_encoder_is_named_with_its_reason(changed, says, made, tmp_path):
    if "imatrix" in changed:
        changed = {"imatrix": made / changed["imatrix"]}
    lines = left("tiny-r1", tmp_path / "out", MakeOptions(calibration=SHORT, device="cpu", **changed))
    assert says in lines[0]


def test_a_large_model_on_a_cpu_gets_the_better_encoder_if_that_takes_less_than_a_day(monkeypatch, tmp_path):
    for module in ("options", "forecast"):
        monkeypatch.setattr(f"quantkit.job.{module}.SMALL_WEIGHTS", 1)
    asked = MakeOptions(calibration=SHORT, device="cpu")
    line = left("tiny-r1", tmp_path / "out", asked)[0]
    assert "quantkit, effort normal: encodes in about" in line and "--encoder ggml" in line
    monkeypatch.setattr("quantkit.job.options.A_DAY", 0)
    line = left("tiny-r1", tmp_path / "out", asked)[0]
    assert "ggml, a large model on a CPU" in line and "--encoder quantkit" in line
    order = order_of("tiny-r1", tmp_path / "begun", asked)  # a job that was begun goes on with what it took
    begin(order.folder, order.identity, {"packed_by": "quantkit"}, {}, restart=False)
    assert order.encoder == "ggml" and order_of("tiny-r1", order.folder, asked).encoder == "quantkit"
    assert order_of("tiny-r1", order.folder, replace(asked, restart=True)).encoder == "ggml"


def test_a_finished_job_is_not_measured_again(made, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "made"
    shutil.copytree(made, folder)
    first = make("tiny-r1", folder, AS_MADE)[1]  # once more if the fixture's scores are of other options
    monkeypatch.setattr(job, "verify_file", lambda *_, **__: pytest.fail("measured again"))
    assert make("tiny-r1", folder, AS_MADE)[1] == first
    assert "verify.json from an earlier run" in capsys.readouterr().err
    assert any("finished" in line for line in status(folder)) and "KLD" in "\n".join(status(folder))
    monkeypatch.setattr(job, "verify_file", lambda *_, **__: {"measured": "anew"})
    other = MakeOptions(calibration=SHORT, evaluation=TextChoice(n_tokens=2048), encoder="ggml")
    monkeypatch.setattr(job, "write_scores", lambda *_: None)
    assert make("tiny-r1", folder, other)[1] == {"measured": "anew"}


def test_status_reads_a_job_at_work_and_a_stopped_one(tmp_path):
    """A real run, looked at and then interrupted; the next one says where it goes on."""
    folder = tmp_path / "out"
    asked = ["make", "-o", str(folder), "--recipe", "2.51bit", "--tokens", "4096", "--no-verify", "--device", "cpu"]
    command = [sys.executable, "-m", "quantkit", *asked]
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for((folder / "tiny-r1-2.51bit.gguf.state" / "layer-1.safetensors").exists, 200)
    said = "\n".join(status(folder))
    assert f"process {run.pid} on " in said and "is at work" in said
    run.send_signal(2)
    _, stderr = run.communicate(timeout=200)
    if run.returncode == 0:
        pytest.skip("it was done before it could be stopped")
    assert run.returncode == 130 and "what is done is kept, and the same command goes on" in stderr
    said = "\n".join(status(folder))
    assert "stopped, last write" in said and re.search(r"pass +[1-4] of 4 layers done", said)
    assert re.search(r"file +\d+% of 5\.\d MB, \d\.\d MiB, \d+ of 70 tensors", said)
    forecast = CliRunner().invoke(main, [*asked, "--dry-run"]).stdout
    assert re.search(r"pass +[1-4] of 4 .*\nfile +\d+% of .*\n +is done already; all of it, with that:\nenc", forecast)
    done = CliRunner().invoke(main, asked)
    assert done.exit_code == 0 and re.search(r"went through [1-4] of 4 layers; going on", done.stderr)


def test_status_of_no_job_is_refused(tmp_path):
    (tmp_path / "verify.json").write_text(json.dumps({}))
    with pytest.raises(QuantkitError, match="no job is at work here"):
        status(tmp_path)
