"""Files made once from the bundled tiny-r1 with little calibration text: fixtures of the tests with oracles and of
tests/job/test_kt_export.py."""

from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.calibration import corpus
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.sources.checkpoint import CheckpointSource

MODEL = bundle.models_dir() / "tiny-r1"
ONE_TYPE = """name = "all-{qtype}"
description = "every matrix in one type"
target = "llama.cpp"
mla = "split"

[[rules]]
match = "*"
qtype = "{qtype}"
why = "a test"
"""


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Waiting threads spin: on a busy machine several take far longer over this small model than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("oracles")


def quantkit(*arguments: object) -> None:
    """A command in this process, where ggml's slow tables are built once."""
    with redirect_stdout(StringIO()):
        main([str(argument) for argument in arguments], standalone_mode=False)


def make(out: Path, recipe: str | Path, imatrix: Path, *options: str, model: Path = MODEL) -> Path:
    """plan and quantize, with ggml's encoders."""
    plan = out.with_suffix(".json")
    quantkit("plan", model, "--recipe", recipe, "--output", plan, *options)
    quantkit("quantize", model, "--plan", plan, "--imatrix", imatrix, "--output", out)
    return out


def reference() -> CheckpointSource:
    """The original in float32."""
    return CheckpointSource(Checkpoint.open(MODEL))


@pytest.fixture(scope="session")
def imatrix(made: Path) -> Path:
    """Of 8,192 tokens."""
    return made / "imatrix.gguf"


def one_type(folder: Path, qtype: str) -> Path:
    """A recipe file that gives every matrix the same type."""
    path = folder / f"all-{qtype}.toml"
    path.write_text(ONE_TYPE.format(qtype=qtype), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def plain(work: Path, imatrix: Path) -> Callable[..., Path]:
    """plain("F32"): a GGUF of the original with every matrix in one type."""
    made: dict[tuple[str, str], Path] = {}

    def get(qtype: str, mla: str = "split") -> Path:
        if (qtype, mla) not in made:
            out = work / f"tiny-{qtype}-{mla}.gguf"
            made[qtype, mla] = make(out, one_type(work, qtype), imatrix, "--target", f"llama.cpp/{mla}")
        return made[qtype, mla]

    return get


@pytest.fixture(scope="session")
def quantized(work: Path, made: Path, imatrix: Path) -> Callable[..., Path]:
    """quantized(recipe, target, mla): the file that `quantkit make` would write."""
    known = {("1.58bit", "ktransformers", "split"): made / "tiny-r1-1.58bit.gguf"}

    def get(recipe: str = "1.58bit", target: str = "llama.cpp", mla: str = "split") -> Path:
        key = (recipe, target, mla)
        if key not in known:
            out = work / f"tiny-{recipe}-{target}-{mla}.gguf"
            known[key] = make(out, recipe, imatrix, "--target", f"{target}/{mla}")
        return known[key]

    return get


@pytest.fixture(scope="session")
def chunks() -> Callable[[int, int], torch.Tensor]:
    """chunks(n, t): tokens int64 [n, t] of the evaluation text, each row starting with BOS."""
    source = reference()
    text, tokenizer = corpus.default("evaluation"), source.tokenizer()

    def cut(n: int, t: int) -> torch.Tensor:
        return corpus.chunk(text, tokenizer, source.config.bos, t, n * t).tokens

    return cut


def twin(path: Path, out: Path) -> Path:
    """The same file with every tensor of weights decoded to F32, by the `gguf` package alone."""
    if out.exists():
        return out
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(out, reader.fields[gguf.Keys.General.ARCHITECTURE].contents())
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
    if tensor.tensor_type == gguf.GGMLQuantizationType.I32:  # no weights: ids
        return np.ascontiguousarray(tensor.data).view(np.int32)
    return np.ascontiguousarray(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
