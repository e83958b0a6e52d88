"""`calibrate --moments`, then `quantize --moments`: the bytes that `make` chooses in one pass."""

import errno
import fcntl
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from dsa_models import V32, made

from quantkit import machine
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.measure import calibrate
from quantkit.calibration.options import Calibration
from quantkit.encoding import saved
from quantkit.encoding.saved import MATRICES, ROWS, Keeper, Kept, experts_path, moments_path
from quantkit.errors import QuantkitError
from quantkit.evaluation.oracles import hf
from quantkit.formats import lock, sealed
from quantkit.job.by_moments import check_quantize, quantize_file, tie
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.stages import QuantizeOptions, source_of
from quantkit.models import family
from quantkit.models.open import open_model, open_weights
from quantkit.planning.plan import Plan

TEXT = TextChoice(n_tokens=1024)
RECIPE = """
[[rules]]
match = "ffn_{gate,up,down}_exps"
layers = "1"
qtype = "Q2_K"

[[rules]]
match = ["blk.0.attn_output.weight", "blk.1.attn_v_b.weight"]
qtype = "Q4_K"

[[rules]]
match = "*"
qtype = "Q8_0"
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """What `make` leaves: experts of a layer, a matrix and one of heads are our encoder's."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = folder / "few.toml"
    recipe.write_text(RECIPE)
    options = MakeOptions(recipe, calibration=Calibration(TEXT), encoder="quantkit", device="cpu", verify=False)
    make("tiny-r1", folder / "made", options)
    return folder / "made"


@pytest.fixture(scope="module")
def source():
    return source_of(open_weights("tiny-r1"), "cpu")


def kept_in(folder: Path, source) -> Path:
    calibrate(source, Calibration(TEXT), folder / "imatrix.gguf", keep=partial(Keeper, folder / "moments"))
    return folder / "moments"


def stage(whole: Path, folder: Path, out: Path, model: Path | str = "tiny-r1", **how: object) -> list[Path]:
    plan = Plan.from_json((whole / "plan.json").read_bytes())
    options = replace(QuantizeOptions(moments=folder / "moments", device="cpu"), **how)
    return quantize_file(open_weights(model), plan, folder / "imatrix.gguf", out, options)


@pytest.mark.parametrize("form", [ROWS, MATRICES])
def test_stage_by_stage_the_bytes_are_those_of_one_pass(form, whole, source, tmp_path, monkeypatch):
    assert Kept(source.config, 1024, torch.float32).form == ROWS
    monkeypatch.setattr(Kept, "form", form)
    folder = kept_in(tmp_path, source)
    sizes = [sum(path.stat().st_size for path in folder.iterdir()), Kept(source.config, 1024, torch.float32).total()]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)  # what was said before
    (file,) = stage(whole, tmp_path, tmp_path / "out.gguf")
    assert file.read_bytes() == (whole / "tiny-r1-few.gguf").read_bytes()
    assert (tmp_path / "imatrix.gguf").read_bytes() == (whole / "imatrix.gguf").read_bytes()
    (worse,) = stage(whole, tmp_path, tmp_path / "ggml.gguf", encoder="ggml")
    assert worse.stat().st_size == file.stat().st_size and worse.read_bytes() != file.read_bytes()


@pytest.mark.skipif(not hf.available(), reason="needs transformers")
def test_an_mtp_layer_sees_a_token_less_of_each_chunk(tmp_path):
    """And its moments are counted, kept, asked for, and encoded by."""
    model = made(V32, 1, mtp=1).folder
    recipe = tmp_path / "few.toml"
    recipe.write_text(RECIPE.replace("blk.0.attn_output.weight", "nextn.eh_proj").replace("blk.1.attn_v_b", "output"))
    options = MakeOptions(recipe, calibration=Calibration(TEXT), encoder="quantkit", device="cpu", verify=False)
    (made_once,), _ = make(model, tmp_path / "made", options)
    source = source_of(open_weights(model), "cpu")
    folder = kept_in(tmp_path, source)
    kept = Kept(source.config, 1024, torch.float32, 1024 // TEXT.chunk)
    assert kept.form == ROWS and experts_path(folder, 1).is_file()
    assert sum(path.stat().st_size for path in folder.iterdir()) == pytest.approx(kept.total(), rel=0.01)
    (file,) = stage(tmp_path / "made", tmp_path, tmp_path / "out.gguf", model)
    assert file.read_bytes() == made_once.read_bytes()
    moments_path(folder, 1).unlink()
    with pytest.raises(QuantkitError, match=r"moments-001.safetensors: no such file; `quantkit calibrate --moments"):
        stage(tmp_path / "made", tmp_path, tmp_path / "other.gguf", model)


def test_a_stopped_pass_goes_on_and_a_missing_layer_begins_it_anew(source, tmp_path, monkeypatch, capsys):
    once: dict[str, bytes] = {}

    whole_watch = Keeper.watch

    def stop(layer: int) -> Callable[..., saved.LayerKeeper]:
        def watch(self: Keeper, now: int) -> saved.LayerKeeper:
            if now == layer:
                raise QuantkitError("stopped")
            return whole_watch(self, now)

        return watch

    for lost in (None, moments_path(tmp_path / "moments", 1)):
        with monkeypatch.context() as patch, pytest.raises(QuantkitError, match="stopped"):
            patch.setattr(Keeper, "watch", stop(3))
            kept_in(tmp_path, source)
        if lost:
            lost.unlink()
        folder = kept_in(tmp_path, source)
        found = {path.name: path.read_bytes() for path in folder.iterdir()}
        assert found == (once := once or found)
        said = capsys.readouterr().err
        assert ("the pass begins anew" if lost else "went through 3 of 4 layers") in said


def test_a_disk_that_is_full_is_said_with_the_file(source, tmp_path, monkeypatch):
    whole_write = sealed.Writer.write

    def write(self: sealed.Writer, name: str, rows: torch.Tensor, first: int = 0) -> None:
        if name == "shares" and first and (tmp_path / "moments" / "experts-001.safetensors").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        whole_write(self, name, rows, first)

    monkeypatch.setattr(sealed.Writer, "write", write)
    with pytest.raises(QuantkitError, match=r"experts-002.safetensors: cannot write \(No space left on device\); run"):
        kept_in(tmp_path, source)
    names = {path.name for path in (tmp_path / "moments").iterdir()}
    assert names == {*(f"moments-00{i}.safetensors" for i in (0, 1)), "experts-001.safetensors"}


def test_what_does_not_fit_is_refused_in_one_line(whole, source, tmp_path, monkeypatch, capsys):
    folder = kept_in(tmp_path, source)
    with pytest.raises(QuantkitError, match="--encoder quantkit needs second moments: run `quantkit calibrate"):
        stage(whole, tmp_path, tmp_path / "o.gguf", encoder="quantkit", moments=None)
    source_says = partial(check_quantize, open_weights("tiny-r1"), Plan.from_json((whole / "plan.json").read_bytes()))
    how = QuantizeOptions(moments=folder, device="cpu")
    source_says(tmp_path / "imatrix.gguf", how)
    assert "does not say which imatrix was measured with it" in capsys.readouterr().err
    tie(folder, tmp_path / "imatrix.gguf")
    source_says(tmp_path / "imatrix.gguf", how)
    assert "imatrix" not in capsys.readouterr().err
    calibrate(source, Calibration(TextChoice(n_tokens=512)), tmp_path / "other.gguf")
    source_says(tmp_path / "other.gguf", how)
    assert "other.gguf: not the one that was measured with" in capsys.readouterr().err
    with open(folder / lock.NAME, "w") as other, pytest.raises(QuantkitError, match=r"moments: .* at work here"):
        fcntl.flock(other, fcntl.LOCK_EX)  # as `calibrate --moments` has it
        stage(whole, tmp_path, tmp_path / "o.gguf")
    path = experts_path(folder, 2)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(QuantkitError, match=r"experts-002.safetensors: damaged"):
        stage(whole, tmp_path, tmp_path / "o.gguf")
    path.unlink()
    with pytest.raises(QuantkitError, match=r"experts-002.safetensors: no such file; `quantkit calibrate --moments"):
        stage(whole, tmp_path, tmp_path / "p.gguf")
    monkeypatch.setattr(machine, "free_disk", lambda _: 10**6)
    with pytest.raises(QuantkitError, match=r"moments of 1,024 tokens take .* MB, .* MiB; free are 1.0 MB"):
        kept_in(tmp_path / "full", source)


def test_r1_is_kept_as_rows():
    """57 GB a layer as matrices, as rows of 131,072 tokens a tenth of that: both exact."""
    config = family.from_hf(open_model("deepseek-r1").config)
    kept = Kept(config, 131072, torch.float32)
    assert kept.form == ROWS
    matrices = 256 * 4 * (7168**2 + 2048**2)
    assert math.isclose(matrices, 57e9, rel_tol=0.01)
    assert matrices < kept.of_layer(60, MATRICES) < matrices + 2.1e9
    assert 3.7e9 < kept.of_layer(60, ROWS) < 6e9 and kept.total() < 0.4e12
    assert "a layer, experts as the rows that theirs are sums of (as matrices: 58.8 GB" in kept.words()
