"""What breaks under a run: disks, signals, workers, memory, changed jobs, and weights that are nothing but zeros."""

import dataclasses
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from patience import wait_for

from quantkit import machine
from quantkit.__main__ import main
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.encoding import jobs
from quantkit.encoding.jobs import GgmlEncoder
from quantkit.encoding.layer import LayerEncoder
from quantkit.errors import QuantkitError, out_of_memory
from quantkit.formats.checkpoint import INDEX, Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.ledger import Ledger
from quantkit.formats.safetensors_header import load_json
from quantkit.job import stages
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models import family
from quantkit.planning.plan import Plan
from quantkit.runtime.sources.gguf import open_gguf

ROOT = Path(__file__).parents[2]
KILL_TEST = ROOT / "scripts" / "torture" / "kill_test.py"
TEXT = ROOT / "docs" / "architecture.md"  # little of it: the bundled text takes a second to be cut into tokens
SMALL = MakeOptions(
    recipe="Q6_K",  # which ggml packs quickly, and without tables
    calibration=Calibration(TextChoice((str(TEXT),), n_tokens=1024)),
    evaluation=TextChoice(n_tokens=512),
    encoder="ggml",
    device="cpu",
    verify=False,
)
OURS = dataclasses.replace(SMALL, recipe="2.51bit", encoder="quantkit", effort="fast")
NAME = "tiny-r1-Q6_K.gguf"


def command(folder: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "quantkit",
        "make",
        "--recipe",
        SMALL.recipe,
        "-o",
        str(folder),
        "--data",
        str(TEXT),
        "--tokens",
        "1024",
        "--encoder",
        "ggml",
        "--no-verify",
        "--device",
        "cpu",
        *more,
    ]


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if line.startswith("quantkit: ")]
    assert len(lines) == 1 and "Traceback" not in stderr, stderr
    return lines[0]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    make("tiny-r1", folder, SMALL)
    return folder


@pytest.fixture(scope="module")
def calm(undisturbed) -> bytes:
    return (undisturbed / NAME).read_bytes()


@pytest.mark.parametrize(("encoder", "recipe"), [("ggml", SMALL.recipe), ("quantkit", OURS.recipe)])
def test_sigkill_at_random_moments(encoder, recipe):
    """The script checks: every rerun resumes, bytes are those of a calm run, at most one job a worker is lost, and no
    unfinished file has its final name."""
    asked = ["--kills", "2", "--encoder", encoder, "--tokens", "512", "--recipe", recipe]
    done = subprocess.run([sys.executable, KILL_TEST, *asked], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "ended with the same bytes" in done.stdout


@pytest.mark.parametrize(
    ("stage", "limit", "says"),
    [("calibrate", 400_000, "cannot save layer"), ("make", 1_500_000, "no room for " + NAME)],
)
def test_full_disk(tmp_path, calm, stage, limit, says):
    """No file may grow beyond `limit`: the calibration's state, or the model, hits it. With room the run goes on."""
    calibrate = [
        sys.executable,
        "-m",
        "quantkit",
        "calibrate",
        "-o",
        str(tmp_path / "imatrix.gguf"),
        "--data",
        str(TEXT),
        "--tokens",
        "1024",
        "--device",
        "cpu",
    ]
    run = calibrate if stage == "calibrate" else command(tmp_path)

    def small_disk() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(run, capture_output=True, text=True, preexec_fn=small_disk, timeout=400)
    assert done.returncode == 1 and says in one_line(done.stderr)
    assert not (tmp_path / NAME).exists() and not (tmp_path / "imatrix.gguf").exists()
    make("tiny-r1", tmp_path, SMALL)
    assert (tmp_path / NAME).read_bytes() == calm


def test_a_ledger_on_a_full_disk_stays_readable(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path / "l")
    ledger.start({"plan": "p"})
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if len(data) < 8:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, data[:-4])

    with monkeypatch.context() as patch, pytest.raises(QuantkitError, match=r"l: writing failed \(No space"):
        patch.setattr(os, "write", full)
        ledger.add([("a", 0, 5, 0)])
    ledger.add([("b", 0, 5, 0)])
    assert ledger.load() == ({"plan": "p"}, [("b", 0, 5, 0)])
    ledger.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_end_with_one_line_and_the_run_goes_on(tmp_path, calm, number):
    # A suite that runs in the background of a shell hands its children a SIGINT that is ignored.
    process = subprocess.Popen(
        command(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: list(tmp_path.glob("*.gguf.state/*.safetensors")), 200)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=400)
    assert process.returncode == 130 and "interrupted; what is done is kept" in one_line(stderr)
    assert not (tmp_path / NAME).exists()
    make("tiny-r1", tmp_path, SMALL)
    assert (tmp_path / NAME).read_bytes() == calm


class Failing(GgmlEncoder):
    """Raises in one job, as a worker that dies."""

    def __init__(self, error: BaseException, after: int):
        self.error, self.left = error, after

    def __call__(self, *arguments):
        self.left -= 1
        if self.left == 0:
            raise self.error
        return super().__call__(*arguments)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_worker_that_dies_costs_its_own_job(undisturbed, calm, tmp_path, tiny, monkeypatch, workers):
    plan, out = Plan.from_json((undisturbed / "plan.json").read_bytes()), tmp_path / NAME
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="died"):
        patch.setattr(stages, "GgmlEncoder", lambda: Failing(RuntimeError("died"), 40))
        patch.setattr(machine, "threads", lambda: workers)
        stages.quantize_model(tiny, plan, undisturbed / "imatrix.gguf", out)
    assert not out.exists()
    recorded = len((tmp_path / (NAME + ".part.ledger")).read_bytes().splitlines()) - 1
    assert recorded >= 39 - (workers - 1)
    again = Failing(AssertionError(), 1 << 30)
    monkeypatch.setattr(stages, "GgmlEncoder", lambda: again)
    stages.quantize_model(tiny, plan, undisturbed / "imatrix.gguf", out)
    specs = {spec.name: spec for spec in family.specs(family.from_hf(tiny.config))}
    n_jobs = sum(len(list(family.slices(spec))) for spec in specs.values())
    assert (1 << 30) - again.left == n_jobs - recorded
    assert out.read_bytes() == calm


def test_a_shard_that_shrinks_under_the_run(undisturbed, calm, tmp_path, model_copy, monkeypatch):
    plan, out = Plan.from_json((undisturbed / "plan.json").read_bytes()), tmp_path / NAME
    checkpoint, shard = Checkpoint.open(model_copy), sorted(model_copy.glob("*.safetensors"))[2]
    good = shard.read_bytes()
    os.truncate(shard, len(good) // 2)
    with pytest.raises(QuantkitError, match=rf"{shard.name}: truncated: tensor '.*' ends"):
        stages.quantize_model(checkpoint, plan, undisturbed / "imatrix.gguf", out)
    shard.write_bytes(good)
    stages.quantize_model(Checkpoint.open(model_copy), plan, undisturbed / "imatrix.gguf", out)
    assert out.read_bytes() == calm


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of GPU memory"),
    ],
)
def test_too_little_memory_is_one_line(tmp_path, monkeypatch, error, what):
    monkeypatch.setattr("quantkit.job.make.make", lambda *_: (_ for _ in ()).throw(error))
    handler = signal.getsignal(signal.SIGTERM)
    try:
        done = CliRunner().invoke(main, ["make", "-o", str(tmp_path)])
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert done.exit_code == 1 and what in one_line(done.output) and "same command again" in done.output
    assert out_of_memory(RuntimeError("another")) is None


def test_experts_that_do_not_fit_together_are_encoded_in_halves(tmp_path, monkeypatch):
    expected = make("tiny-r1", tmp_path / "calm", OURS)[0][0].read_bytes()
    init, encode, sizes = LayerEncoder.__init__, LayerEncoder._encode_experts, []

    def grouped(self, *arguments):
        init(self, *arguments)
        self.group = 7

    def short(self, waiting):
        sizes.append(len(waiting))
        if len(waiting) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        encode(self, waiting)

    monkeypatch.setattr(LayerEncoder, "__init__", grouped)
    monkeypatch.setattr(LayerEncoder, "_encode_experts", short)
    assert make("tiny-r1", tmp_path / "short", OURS)[0][0].read_bytes() == expected
    assert sizes[0] == 7 and sizes.count(7) <= 3  # once a layer, then the smaller group stays


def test_another_job_in_the_folder_is_refused_by_its_difference(tmp_path, calm, model_copy):
    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(jobs, "_encode", stop)
        make("tiny-r1", tmp_path / "out", SMALL)
    more = dataclasses.replace(SMALL, calibration=Calibration(TextChoice((str(TEXT),), n_tokens=2048)))
    with pytest.raises(QuantkitError, match=r"calibration\.text\.n_tokens was 1024, now 2048; choose another --output"):
        make("tiny-r1", tmp_path / "out", more)
    with pytest.raises(QuantkitError, match=r"recipe was Q6_K, now Q8_0"):
        make("tiny-r1", tmp_path / "out", dataclasses.replace(SMALL, recipe="Q8_0"))
    shard = sorted(model_copy.glob("*.safetensors"))[0]
    data = shard.read_bytes()
    n = int.from_bytes(data[:8], "little")
    shard.write_bytes((n + 8).to_bytes(8, "little") + data[8 : 8 + n] + b" " * 8 + data[8 + n :])
    with pytest.raises(QuantkitError, match="checkpoint was"):
        make(model_copy, tmp_path / "out", SMALL)
    other = dataclasses.replace(SMALL, recipe="Q8_0", restart=True)
    (tmp_path / "out" / "download.gguf.part").write_bytes(b"not ours")
    writing = Ledger(tmp_path / "out" / (NAME + ".part.ledger"))
    with pytest.raises(QuantkitError, match="another process is writing"):
        make("tiny-r1", tmp_path / "out", other)
    writing.close()
    assert [file.name for file in make("tiny-r1", tmp_path / "out", other)[0]] == ["tiny-r1-Q8_0.gguf"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "tiny-r1-Q8_0.gguf",
        "imatrix.gguf",
        "plan.json",
        "recipe.toml",
        "provenance.json",
        "checksums.json",
        "download.gguf.part",
    }
    make("tiny-r1", tmp_path / "out", dataclasses.replace(SMALL, restart=True))
    assert (tmp_path / "out" / NAME).read_bytes() == calm
    assert (tmp_path / "out" / "tiny-r1-Q8_0.gguf").exists()  # a finished model is nobody's leftover


def overwrite(folder: Path, name: str, value: int) -> None:
    """Every byte of a stored tensor."""
    shard = folder / load_json((folder / INDEX).read_bytes(), "i")["weight_map"][name]
    entry = Checkpoint.open(folder).entry(name)
    with shard.open("r+b") as file:
        file.seek(entry.begin)
        file.write(bytes([value]) * entry.n_bytes)


COARSE = [dataclasses.replace(options, recipe="1.58bit") for options in (SMALL, OURS)]


@pytest.mark.parametrize("options", COARSE, ids=["ggml", "quantkit"])
def test_zero_weights_and_zero_activations(model_copy, tmp_path, options):
    """Gates of zeros: the down matrices of those experts see only zeros. Their blocks decode to finite values."""
    for expert in range(16):
        overwrite(model_copy, f"model.layers.2.mlp.experts.{expert}.gate_proj.weight", 0)
    overwrite(model_copy, "model.layers.1.mlp.experts.3.down_proj.weight", 0)
    files, _ = make(model_copy, tmp_path / "out", options)
    source = open_gguf(files[0])
    for layer, role in ((2, "gate"), (2, "down"), (1, "down")):
        assert torch.isfinite(source.dense(f"blk.{layer}.ffn_{role}_exps.weight")).all()
    assert not source.dense("blk.1.ffn_down_exps.weight")[3].any()
    assert not source.dense("blk.2.ffn_gate_exps.weight").any()
    assert GGUFFile.open(files[0]).tensors


@pytest.mark.parametrize("options", [SMALL, OURS], ids=["ggml", "quantkit"])
def test_weights_that_are_not_finite_are_named(model_copy, tmp_path, options):
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    overwrite(model_copy, name, 0x7F)  # NaN in F8_E4M3
    with pytest.raises(QuantkitError, match=f"{name}' has weights that are not finite"):
        make(model_copy, tmp_path / "out", options)
    assert not list((tmp_path / "out").glob("tiny*.gguf")) and not list((tmp_path / "out").glob("model*.gguf"))


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("options", [SMALL, OURS], ids=["ggml", "quantkit"])
def test_activations_that_are_not_finite_are_named(model_copy, tmp_path, options):
    """Weights of 5e4 (bfloat16 0x4747) and 2e4 (FP8 under scales of 49) are none too large; squares of what comes of
    them are."""
    overwrite(model_copy, "model.layers.1.post_attention_layernorm.weight", 0x47)
    for part in ("gate", "up"):
        overwrite(model_copy, f"model.layers.1.mlp.experts.3.{part}_proj.weight_scale_inv", 0x42)
    with pytest.raises(QuantkitError, match=r"blk\.1\.ffn_\w+\.weight: inputs that are not finite"):
        make(model_copy, tmp_path / "out", options)
    shutil.rmtree(tmp_path / "out")


SMALL_GPU = """
import sys, torch
from quantkit.__main__ import main
from quantkit.encoding import layer

room, total = int(sys.argv.pop(1)), torch.cuda.get_device_properties(0).total_memory
encode, layer.LEAST_GROUPS = layer.LayerEncoder._encode_experts, 1

def limited(self, waiting):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (before + room) / total))
    try:
        encode(self, waiting)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    print("group", len(waiting), torch.cuda.max_memory_reserved() - before, file=sys.stderr)

layer.LayerEncoder._encode_experts = limited
main()
"""


@pytest.mark.gpu
def test_a_gpu_that_is_really_too_small(tmp_path):
    """Encoding experts gets less and less memory: groups shrink, then one clear line. With all the run goes on."""
    everything = torch.cuda.get_device_properties(0).total_memory

    def run(room: int, folder: Path) -> tuple[int, list[int], int, str]:
        """Exit code, sizes of groups, memory that encoding took, stderr. The text is the documentation's."""
        text = ["--data", ROOT / "docs" / "encoders.md", "--tokens", "4096"]
        make = ["make", "-o", folder, "--encoder", "quantkit", "--no-verify", "--device", "cuda", *text]
        done = subprocess.run([sys.executable, "-c", SMALL_GPU, str(room), *make], capture_output=True, text=True)
        groups = [list(map(int, line.split()[1:])) for line in done.stderr.splitlines() if line.startswith("group ")]
        return done.returncode, [size for size, _ in groups], max((n for _, n in groups), default=0), done.stderr

    code, sizes, room, stderr = run(everything, tmp_path / "calm")
    assert code == 0 and min(sizes) > 2, stderr
    shrunk, folder = 0, tmp_path
    while code == 0 and room:
        room //= 2
        folder = tmp_path / str(room)
        code, found, _, stderr = run(room, folder)
        shrunk += bool(found) and min(found) < min(sizes)
    assert shrunk, stderr
    assert "out of GPU memory" in one_line(stderr) and not (folder / "tiny-r1-1.58bit.gguf").exists()
    assert run(everything, folder)[0] == 0 and (folder / "tiny-r1-1.58bit.gguf").exists()
