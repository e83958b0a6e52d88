"""The main job: what it leaves behind, that it resumes to the same bytes, and how it refuses."""

import dataclasses
import json
import shutil
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner, Result

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.gradients import GradientPass
from quantkit.calibration.options import Calibration
from quantkit.calibration.variants import Candidates
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.job.plan import plan_model
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.plan import Plan

SMALL = ["--tokens", "2048", "--eval-tokens", "1024"]


def run(*arguments: object, check: bool = True) -> Result:
    """A command in this process, where ggml's slow tables are built once."""
    done = CliRunner().invoke(main, list(map(str, arguments)))
    if check and done.exit_code:
        raise AssertionError(done.output) from done.exception
    return done


def test_make_leaves_everything(made):
    names = {path.name for path in made.iterdir()}
    records = {"plan.json", "recipe.toml", "verify.json", "provenance.json", "checksums.json"}
    assert names == {"tiny-r1-1.58bit.gguf", "imatrix.gguf"} | records
    result = json.loads((made / "verify.json").read_text())
    needed = {"tokens", "ppl", "ppl_reference", "kld_mean", "kld_median", "kld_p99", "top1_agreement", "bpw", "bytes"}
    assert needed <= result.keys()
    assert result["bytes"] == (made / "tiny-r1-1.58bit.gguf").stat().st_size
    assert result["ppl_reference"] < result["ppl"] < 10 * result["ppl_reference"]


def test_file_is_what_the_plan_says_and_gguf_reads_it(made):
    plan = Plan.from_json((made / "plan.json").read_bytes())
    reader = gguf.GGUFReader(made / "tiny-r1-1.58bit.gguf")
    assert [tensor.name for tensor in reader.tensors] == [tensor.name for tensor in plan.tensors]
    for tensor, planned in zip(reader.tensors, plan.tensors, strict=True):
        assert tensor.tensor_type.name == planned.qtype
        assert tuple(reversed(tensor.shape.tolist())) == planned.shape
    assert all(len(field.parts) for field in reader.fields.values())


def test_rerun_uses_what_is_there_and_another_job_is_refused(made, tmp_path):
    made = Path(shutil.copytree(made, tmp_path / "made"))
    before = (made / "tiny-r1-1.58bit.gguf").stat().st_mtime_ns
    options = MakeOptions(
        calibration=Calibration(TextChoice(n_tokens=8192)),
        evaluation=TextChoice(n_tokens=4096),
        encoder="ggml",
        verify=False,
    )
    make("tiny-r1", made, options)
    assert (made / "tiny-r1-1.58bit.gguf").stat().st_mtime_ns == before
    with pytest.raises(QuantkitError, match=r"holds another job: recipe was 1\.58bit, now 2\.51bit"):
        make("tiny-r1", made, dataclasses.replace(options, recipe="2.51bit"))


def test_stages_by_hand_give_the_same_file(made, tmp_path):
    run("plan", "tiny-r1", "--recipe", "1.58bit", "-o", tmp_path / "plan.json")
    run(
        "quantize",
        "tiny-r1",
        "--plan",
        tmp_path / "plan.json",
        "--imatrix",
        made / "imatrix.gguf",
        "-o",
        tmp_path / "out.gguf",
    )
    ours, theirs = GGUFFile.open(tmp_path / "out.gguf"), GGUFFile.open(made / "tiny-r1-1.58bit.gguf")
    for name in theirs.tensors:
        assert (ours.data(name) == theirs.data(name)).all(), name
    out = run("inspect", tmp_path / "out.gguf").stdout
    assert "IQ1_S" in out and "16 routed + 1 shared" in out


def test_splits_load_and_measure_the_same(made, tmp_path):
    run(
        "quantize",
        "tiny-r1",
        "--plan",
        made / "plan.json",
        "--imatrix",
        made / "imatrix.gguf",
        "-o",
        tmp_path / "s.gguf",
        "--split-max-size",
        "1500K",
    )
    files = sorted(tmp_path.glob("s-0000*-of-*.gguf"))
    assert len(files) >= 3 and max(f.stat().st_size for f in files) <= 1_500_000
    done = run("verify", files[0], "--json", tmp_path / "v.json", "--tokens", "1024")
    assert "same top-1" in done.stdout
    whole = run("verify", made / "tiny-r1-1.58bit.gguf", "--json", tmp_path / "w.json", "--tokens", "1024")
    assert whole.exit_code == 0
    a, b = (json.loads((tmp_path / name).read_text())["kld_mean"] for name in ("v.json", "w.json"))
    assert a == pytest.approx(b, rel=1e-6)


def test_a_budget_makes_a_file_of_that_size(made, tmp_path):
    size = 8 << 20  # of types that ggml packs quickly
    done = run(
        "plan",
        "tiny-r1",
        "--size",
        "8MiB",
        "--target",
        "llama.cpp",
        "-o",
        tmp_path / "p.json",
        "-o",
        tmp_path / "p.png",
    )
    planned = Plan.from_json((tmp_path / "p.json").read_bytes())
    assert "predicted   KLD" in done.stdout and (tmp_path / "p.png").stat().st_size > 10_000
    run(
        "make",
        "tiny-r1",
        "--size",
        "8MiB",
        "--target",
        "llama.cpp",
        "--imatrix",
        made / "imatrix.gguf",
        "--no-verify",
        "-o",
        tmp_path / "out",
    )
    assert (tmp_path / "out" / "plan.json").read_text() == (tmp_path / "p.json").read_text()
    written = (tmp_path / "out" / "tiny-r1-auto.gguf").stat().st_size
    assert 0.998 * size < written <= size
    assert {t.name: t.qtype for t in GGUFFile.open(tmp_path / "out" / "tiny-r1-auto.gguf").tensors.values()} == {
        t.name: t.qtype for t in planned.tensors
    }
    both = run("plan", "tiny-r1", "--target", "llama.cpp", "--compare", "1.58bit", tmp_path / "p.json")
    assert "A: 1.58bit" in both.stdout and "B: auto" in both.stdout


def test_a_plan_serves_as_a_recipe(made, tmp_path):
    """The plan of one folder makes the same file in another; nothing is left for a budget or a target to decide."""
    imatrix, plan = made / "imatrix.gguf", made / "plan.json"
    run("make", "tiny-r1", "--recipe", plan, "--imatrix", imatrix, "--no-verify", "-o", tmp_path / "out")
    assert (tmp_path / "out" / "plan.json").read_bytes() == plan.read_bytes()
    assert not (tmp_path / "out" / "recipe.toml").exists()
    ours, theirs = (GGUFFile.open(folder / "tiny-r1-1.58bit.gguf") for folder in (tmp_path / "out", made))
    assert all((ours.data(name) == theirs.data(name)).all() for name in theirs.tensors)
    for option, says in (("--size=4MiB", "fixes every type"), ("--target=ollama", "is made for ktransformers/split")):
        done = run("plan", "tiny-r1", "--recipe", plan, option, check=False)
        assert done.exit_code == 1 and says in done.stderr
    done = run("plan", "deepseek-r1", "--recipe", plan, check=False)
    assert done.exit_code == 1 and "it is for another" in done.stderr


BROKEN = [
    (["make", "no-such-model"], "no-such-model: no such folder"),
    (["make", "--recipe", "9bit"], "9bit"),
    (["make", "--target", "vllm"], "vllm"),
    (["make", "deepseek-r1", "-o", "{tmp}/x"], "description without weights"),
    (["make", "--encoder", "magic", "-o", "{tmp}/y", *SMALL, "--no-verify"], "--encoder magic"),
    (["make", "--data", "{tmp}/none.txt", "-o", "{tmp}/z"], "none.txt: no such file"),
    (
        [
            "quantize",
            "tiny-r1",
            "--plan",
            "{made}/verify.json",
            "--imatrix",
            "{made}/imatrix.gguf",
            "-o",
            "{tmp}/o.gguf",
        ],
        "verify.json",
    ),
    (
        [
            "quantize",
            "tiny-r1",
            "--plan",
            "{made}/plan.json",
            "--imatrix",
            "{made}/tiny-r1-1.58bit.gguf",
            "-o",
            "{tmp}/o.gguf",
        ],
        "imatrix",
    ),
    (["verify", "{made}/imatrix.gguf"], "deepseek2"),
    (["make", "--split-max-size", "huge"], "--split-max-size huge: not a size"),
    (["hardware", "--context", "many"], "--context many: not a number of tokens"),
    (["run", "{made}/tiny-r1-1.58bit.gguf", "--gpu-layers", "all"], "--gpu-layers all: write auto"),
    (["make", "--size", "1MB"], "smallest feasible size is"),
    (["plan", "--size", "4MiB", "--ram", "2GB"], "--size and --ram contradict each other"),
    (["plan", "--size", "99bpw"], "--size 99bpw: bits per weight are a number up to 32"),
    (["plan", "--size", "much"], "--size much: not a size"),
    (["plan", "--vram", "1GB"], "--vram needs --ram"),
    (["plan", "--recipe", "1.58bit", "--size", "4MiB"], "its rules fix every type"),
    (["plan", "--recipe", "auto"], "give one, such as --size"),
    (["plan", "--size", "4MiB", "--sensitivity", "{made}/verify.json"], "not a sensitivity file"),
    (["plan", "-o", "{tmp}/map.svg", "--size", "1"], "smallest feasible size is"),
]


@pytest.mark.parametrize(("arguments", "says"), BROKEN, ids=lambda value: value if isinstance(value, str) else "")
def test_one_clear_line_and_nothing_half_written(arguments, says, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run(*(a.format(tmp=tmp_path, made=made) for a in arguments), check=False)
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("quantkit: ")]
    assert done.exit_code != 0 and len(lines) == 1 and says in lines[0]
    assert isinstance(done.exception, SystemExit)  # by the one who says it, not by a traceback
    assert not [p for p in tmp_path.rglob("*.gguf") if p.name != "imatrix.gguf"]


def test_damaged_checkpoint_is_refused_before_work(model_copy, tmp_path):
    shard = sorted(model_copy.glob("*.safetensors"))[1]
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    done = run("make", model_copy, "-o", tmp_path / "out", check=False)
    assert done.exit_code == 1 and shard.name in done.stderr
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").glob("*.gguf*"))  # nor a state or a part


def test_recipe_with_a_type_that_kt_kernel_gets_wrong_is_refused(tmp_path):
    source = (Path(bundle.recipes_dir()) / "1.58bit.toml").read_text()
    shutil.copy(Path(bundle.recipes_dir()) / "1.58bit.toml", tmp_path / "r.toml")
    (tmp_path / "r.toml").write_text(source.replace('qtype = "IQ1_S"', 'qtype = "IQ2_XXS"'))
    done = run("plan", "deepseek-r1", "--recipe", tmp_path / "r.toml", check=False)
    assert done.exit_code == 1 and "IQ2_XXS is refused for ktransformers" in done.stderr


class Stopped(Exception):
    pass


def test_best_within_a_budget_goes_by_an_estimate(tmp_path, monkeypatch):
    """Gradients, then what types cost, then the plan; a rerun takes what is there."""

    def stopped(order, out, reference):
        raise Stopped(order.plan.digest())

    text = TextChoice(n_tokens=1024)
    asked = MakeOptions(
        calibration=Calibration(text),
        budget=BudgetOptions(size=6_000_000),
        effort="best",
        encoder="quantkit",
        device="cpu",
        verify=False,
    )
    monkeypatch.setattr("quantkit.job.make.make_in_one_pass", stopped)
    monkeypatch.setattr("quantkit.job.stages.EVERY", Candidates(("Q2_K", "Q4_K"), ("Q4_K", "Q8_0")))
    with pytest.raises(Stopped) as first:
        make("tiny-r1", tmp_path, asked)
    plan = Plan.from_json((tmp_path / "plan.json").read_bytes(), "plan")
    assert plan.outlook is not None and plan.outlook.damage == "sensitivity.json of tiny-r1"
    assert plan.digest() == str(first.value) != plan_model("tiny-r1", budget=asked.budget).digest()
    measured = dataclasses.replace(asked.budget, measured=tmp_path / "sensitivity.json")
    assert plan_model("tiny-r1", budget=measured).digest() == plan.digest()
    assert json.loads((tmp_path / "provenance.json").read_text())["plan"].startswith("by gradients, ")

    monkeypatch.setattr("quantkit.job.make.estimate_damage", lambda *_: pytest.fail("it was there"))
    monkeypatch.setattr(GradientPass, "run", lambda *_: pytest.fail("they were there"))
    with pytest.raises(Stopped) as second:
        make("tiny-r1", tmp_path, asked)
    assert str(second.value) == plan.digest()
    assert Plan.from_json((tmp_path / "plan.json").read_bytes(), "plan").digest() == plan.digest()
    with pytest.raises(QuantkitError, match=r"plan was by gradients, 6,000,000 .*; choose another --output"):
        make("tiny-r1", tmp_path, dataclasses.replace(asked, budget=BudgetOptions(size=6_100_000)))
