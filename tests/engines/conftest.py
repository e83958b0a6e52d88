"""Files for the engine tests, made once from the bundled tiny-r1 with little calibration text."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gguf
from quantkit import bundle, pipeline
from quantkit.calibration import corpus
from quantkit.encoding import encoder
from quantkit.planning.plan import Plan
from quantkit.quantize import quantize
from quantkit.runtime.sources import CheckpointSource

MODEL = bundle.models_dir() / "tiny-r1"
CALIBRATION = pipeline.TextChoice(n_tokens=8192, chunk=256)
ONE_TYPE = """name = "all-{qtype}"
description = "every matrix in one type"
target = "llama.cpp"
mla = "{mla}"

[[rules]]
match = "*"
qtype = "{qtype}"
why = "a test"
"""


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def imatrix(work: Path) -> Path:
    path = work / "imatrix.gguf"
    pipeline.calibrate(pipeline.open_weights(MODEL), CALIBRATION, path, "cpu")
    return path


def one_type(folder: Path, qtype: str, mla: str = "split") -> Path:
    """A recipe file that gives every matrix the same type."""
    path = folder / f"all-{qtype}-{mla}.toml"
    path.write_text(ONE_TYPE.format(qtype=qtype, mla=mla), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def plain(work: Path) -> Callable[..., Path]:
    """plain("F32"): a GGUF of the original with every matrix in one type that needs no importance."""
    made: dict[tuple[str, str], Path] = {}

    def make(qtype: str, mla: str = "split") -> Path:
        if (qtype, mla) not in made:
            plan = pipeline.plan_model(MODEL, one_type(work, qtype, mla))
            out = work / f"tiny-{qtype}-{mla}.gguf"
            quantize(pipeline.open_weights(MODEL), plan, {}, out, encoder("ggml"), fingerprint={})
            made[qtype, mla] = out
        return made[qtype, mla]

    return make


@pytest.fixture(scope="session")
def quantized(work: Path, imatrix: Path) -> Callable[..., Path]:
    """quantized(recipe, target, mla): the file that `quantkit make` would write."""
    made: dict[tuple[str, str, str], Path] = {}

    def make(recipe: str = "1.58bit", target: str = "llama.cpp", mla: str = "split") -> Path:
        key = (recipe, target, mla)
        if key not in made:
            plan: Plan = pipeline.plan_model(MODEL, recipe, target, mla)
            out = work / f"tiny-{recipe}-{target}-{mla}.gguf"
            made[key] = pipeline.quantize_model(pipeline.open_weights(MODEL), plan, imatrix, out)[0]
        return made[key]

    return make


@pytest.fixture(scope="session")
def chunks() -> Callable[[int, int], torch.Tensor]:
    """chunks(n, t): tokens int64 [n, t] of the evaluation text, each row starting with BOS."""
    source = CheckpointSource(pipeline.open_weights(MODEL))
    text, tokenizer = corpus.default("evaluation"), source.tokenizer()

    def cut(n: int, t: int) -> torch.Tensor:
        return corpus.chunk(text, tokenizer, source.config.bos, t, n * t).tokens

    return cut


def twin(path: Path, out: Path) -> Path:
    """The same file with every tensor decoded to F32, by the `gguf` package alone."""
    if out.exists():
        return out
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, "deepseek2")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != gguf.Keys.General.ARCHITECTURE:
            writer.add_key_value(key, field.contents(), field.types[0], _element(field))
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        writer.add_tensor(tensor.name, _values(tensor).reshape(shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _element(field: gguf.ReaderField) -> gguf.GGUFValueType | None:
    return field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None


def _values(tensor: Any) -> np.ndarray:
    return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
