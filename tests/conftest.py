"""The bundled model, and one file made of it that several tests look at."""

import fcntl
import os
import shutil
import sys
from pathlib import Path

import pytest

if n_workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # Before torch is imported, and for child processes: threads of one worker spin where another computes.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // n_workers)))
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):  # or a hundred child processes would compile the package, each anew
    sys.dont_write_bytecode = False

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is first imported, which `make` does

from warm_transformers import WarmTransformers

from quantkit import bundle
from quantkit.calibration import corpus
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.evaluation.oracles import hf
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.progress import say_once

TINY = bundle.models_dir() / "tiny-r1"


# The heaviest files, in this order, before all others, so that no worker is left with one of them at the end.
FIRST = (
    "job/test_recovery.py",
    "evaluation/oracles/test_llama.py",  # compiles nothing, while the other worker compiles what all others load
    "job/test_faults.py",
    "job/test_ranks.py",
    "encoding/test_layer.py",
    "runtime/test_kernels.py",
    "job/test_report.py",
    "evaluation/oracles/test_v4_files.py",
    "job/test_make.py",
    "calibration/test_sensitivity.py",
    "scripts/test_torture.py",
    "remote/test_make_from_hub.py",
    "runtime/engines/test_streams_engine.py",
    "evaluation/test_verify.py",
    "evaluation/test_behaviour.py",
    "encoding/test_estimate.py",
    "runtime/engines/test_gpu.py",
    "serving/test_answers.py",
    "evaluation/oracles/test_dsa_files.py",
    "encoding/backends/test_triton_levels.py",
    "encoding/backends/test_numba.py",
    "serving/test_http.py",
    "planning/test_r1_plans.py",
    "job/test_by_moments.py",
    "cli/test_streams.py",
    "test_machine.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(FIRST)))


@pytest.fixture(scope="session")
def tiny() -> Checkpoint:
    return Checkpoint.open(TINY)


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """The folder that `make --recipe 1.58bit --encoder ggml` leaves, with little text. Made by one worker of
    pytest-xdist for all: read it, or work on a copy."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if n_workers else base) / "made"
    options = MakeOptions(
        calibration=Calibration(TextChoice(n_tokens=8192)),
        evaluation=TextChoice(n_tokens=4096),
        encoder="ggml",
    )
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.with_suffix(".done").exists():
            make("tiny-r1", folder, options)
            folder.with_suffix(".done").touch()
    return folder


@pytest.fixture(scope="session", autouse=True)
def _one_transformers():
    """tests/evaluation/test_configuration.py starts it as users do."""
    warm = WarmTransformers()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "run_module", warm)
        yield
    warm.close()


@pytest.fixture(scope="session", autouse=True)
def _tokens_once():
    """A worker cuts the bundled text into tokens once: it takes a second, more than most of what tests do with it."""
    tokens_of, known = corpus.tokens_of, {}

    def remembered(text, tokenizer, bos):
        key = text.documents, tokenizer.to_str(), bos
        if key not in known:
            known[key] = tokens_of(text, tokenizer, bos)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "tokens_of", remembered)
        yield


@pytest.fixture
def model_copy(tmp_path) -> Path:
    """A copy of the bundled model, to be damaged."""
    return Path(shutil.copytree(TINY, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
    say_once.cache_clear()  # what one test was told, the next has not heard
