"""DeepSeek-V4 in stock llama.cpp: files of ours against our reference and transformers."""

import json

import pytest
import torch
from oracle_files import make, one_type, quantkit, twin
from v4_models import T, made

from quantkit.errors import QuantkitError
from quantkit.evaluation.certify import certify
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf, llama
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.runtime.engines.open import open_engine, opener
from quantkit.runtime.sources.gguf import GGUFSource, open_gguf, open_source
from quantkit.runtime.sources.tiled import Tiled
from quantkit.runtime.stream import final_hidden, head_logits

pytestmark = [
    pytest.mark.skipif(not llama.available(), reason=f"needs {llama.WHEEL}"),
    pytest.mark.skipif(not hf.available(), reason="needs transformers"),
]
N = 150  # of the last tokens, what the engine's logits are compared of
LOSSLESS = """name = "lossless"
description = "experts as they are, all else in float32"
target = "llama.cpp"
mla = "split"

[[rules]]
match = "ffn_{gate,up,down}_exps"
qtype = "MXFP4"
why = "a test"

[[rules]]
match = "*"
qtype = "F32"
why = "a test"
"""


def streamed(source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(source, source.head(), final_hidden(source, tokens)[0])[None]


def kld(what: str, first: torch.Tensor, second: torch.Tensor) -> float:
    """Nats a token of the second from the first."""
    found = divergence(first, second)
    print(f"{what}: {found:.1e}")
    return found


def by_engine(path, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the last tokens by what `run` computes with: a prompt in two pieces, then token by token."""
    engine, ids = open_engine(open_gguf(path, n_threads=1), 1, T), tokens[0].tolist()
    engine.prefill(0, ids[:130], 0)
    rows = [engine.prefill(0, ids[130 : T - N + 1], 130).clone()]
    return torch.stack(rows + [engine.decode([0], [token])[0].clone() for token in ids[T - N + 1 :]])


@pytest.fixture(scope="module")
def imatrix(tmp_path_factory):
    path = tmp_path_factory.mktemp("v4") / "imatrix.gguf"
    quantkit("calibrate", made().folder, "--tokens", 512, "--device", "cpu", "--output", path)
    return path


def passes(path, small, oracle: bool) -> None:
    """Every check of the file against its model. oracle: also of what programs compute."""
    certificate = certify(path, "llama.cpp", Checkpoint.open(small.folder), oracle=oracle)
    assert not certificate.failed(), [check for check in certificate.checks if check.status == "fail"]


def test_file_of_floats(imatrix, tmp_path):
    small = made()
    path = make(tmp_path / "f32.gguf", one_type(tmp_path, "F32"), imatrix, model=small.folder)
    theirs = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
    ours = streamed(open_source(path), small.tokens)
    assert kld("our layers from transformers", small.logits, ours) < 1e-6
    assert kld("llama.cpp from ours", ours, theirs) < 1e-4
    passes(path, small, oracle=True)
    run = by_engine(path, small.tokens)
    assert kld("what `run` computes with, from our layers", ours[0, T - N :], run) < 1e-6
    assert kld("what `run` computes with, from llama.cpp", theirs[0, T - N :], run) < 1e-4
    on_gpu = open_gguf(path, "cuda", n_threads=1)
    for call in (lambda: open_engine(on_gpu, 1, 64), lambda: opener(on_gpu)):
        with pytest.raises(QuantkitError, match=r"deepseek4 is computed on the CPU only here: give --device cpu"):
            call()


def test_lossless_copies_of_experts(imatrix, tmp_path):
    """The same numbers in our reader; llama.cpp rounds their inputs to 8 bits."""
    small, recipe = made(), tmp_path / "lossless.toml"
    recipe.write_text(LOSSLESS)
    path = make(tmp_path / "mxfp4.gguf", recipe, imatrix, model=small.folder)
    assert (
        kld("copies of FP4: our layers from transformers", small.logits, streamed(open_source(path), small.tokens))
        < 1e-6
    )
    theirs = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
    assert kld("copies of FP4: llama.cpp from transformers", small.logits, theirs) < 1e-3
    passes(path, small, oracle=False)
    run = by_engine(path, small.tokens)
    assert kld("copies of FP4: what `run` computes with, from llama.cpp", theirs[0, T - N :], run) < 1e-3


def test_made_at_two_bits(tmp_path):
    """By our encoder, in one pass, and judged; run, and judged as it runs."""
    small, options = made(), ("--tokens", 512, "--eval-tokens", 512, "--device", "cpu", "--target", "llama.cpp")
    quantkit("make", small.folder, "--recipe", "1.58bit", "--output", tmp_path / "out", "--effort", "fast", *options)
    (path,) = (tmp_path / "out").glob("*bit.gguf")
    tensors = GGUFFile.open(path).tensors
    kinds = {name.split(".", 2)[-1]: tensor.qtype for name, tensor in tensors.items()}
    assert kinds["attn_compressor_kv.weight"] == "Q8_0" and kinds["ffn_up_exps.weight"] == "IQ1_S"
    assert kinds["ffn_gate_tid2eid.weight"] == "I32" and kinds["hc_attn_fn.weight"] == "F32"
    assert torch.from_numpy(llama.logits(path, small.tokens.numpy())).isfinite().all()
    theirs = torch.from_numpy(llama.logits(twin(path, tmp_path / "twin.gguf"), small.tokens.numpy()))
    assert kld("2-bit weights: llama.cpp from ours", streamed(open_source(path), small.tokens), theirs) < 1e-4
    ours, tiled = streamed(open_source(path), small.tokens), Tiled(open_gguf(path, n_threads=1), torch.float32)
    assert (
        kld("2-bit file: dequantized in tiles", ours, streamed(GGUFSource(tiled.weights, tiled), small.tokens)) < 1e-3
    )
    assert (
        kld("2-bit file: what `run` computes with, from our layers", ours[0, T - N :], by_engine(path, small.tokens))
        < 0.05
    )
    options = ("--tokens", 512, "--runtime-tokens", 512, "--prompts", 1, "--device", "cpu")
    quantkit("verify", path, "--reference", small.folder, *options)
    found = json.loads((path.parent / "verify.json").read_text())
    print("as it runs:", found["runtime"])
    assert found["runtime"]["agreement"]["kld_mean"] < 0.05 and found["generation"]["prompts"] == 1
    quantkit("run", path, "-p", "It was", "-n", 4, "--context", 256)
