"""DeepSeek-V3.2 and GLM-5 in stock llama.cpp: files of ours against our reference, dense and sparse, and our engines
against both."""

from pathlib import Path

import pytest
import torch
from dsa_models import GLM, V32, Small, T, drafted, made
from oracle_files import make, one_type, quantkit, twin
from test_llama import streamed

from quantkit.errors import QuantkitError
from quantkit.evaluation.certify import certify
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf, llama
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.plan import plan_model
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf, open_source

pytestmark = [
    pytest.mark.skipif(not llama.available(), reason=f"needs {llama.WHEEL}"),
    pytest.mark.skipif(not hf.available(), reason="needs transformers"),
]


def as_f32(small: Small, folder: Path) -> Path:
    """A file of ours with every matrix in float32."""
    imatrix = folder / "imatrix.gguf"
    quantkit("calibrate", small.folder, "--tokens", 512, "--device", "cpu", "--output", imatrix)
    return make(folder / "f32.gguf", one_type(folder, "F32"), imatrix, model=small.folder)


def passes(path: Path, small: Small, oracle: bool = True) -> None:
    """Every check of the file against its model. oracle: also of what programs compute."""
    certificate = certify(path, "llama.cpp", Checkpoint.open(small.folder), oracle=oracle)
    assert not certificate.failed(), [check for check in certificate.checks if check.status == "fail"]


def kld(what: str, first: torch.Tensor, second: torch.Tensor) -> float:
    """Nats a token of the second from the first."""
    found = divergence(first, second)
    print(f"{what}: {found:.1e}")
    return found


def by_engine(path: Path, small: Small) -> torch.Tensor:
    """Logits of the last tokens by what `run` computes with: a prompt, then token by token."""
    engine = open_engine(open_gguf(path, n_threads=1), 1, T)
    tokens = small.tokens[0].tolist()
    rows = [engine.prefill(0, tokens[: T - 8], 0).clone()]
    return torch.stack(rows + [engine.decode([0], [token])[0].clone() for token in tokens[T - 8 :]])


@pytest.mark.parametrize("name", [V32, GLM])
@pytest.mark.parametrize(("layers", "top_k"), [(3, 2048), (1, 32)])
def test_file_of_floats(name, layers, top_k, tmp_path):
    """Dense below the top-k, sparse above it: there in one layer, for a position that another order of summation makes
    another choice of shows in all later layers."""
    small = made(name, layers, top_k)
    path = as_f32(small, tmp_path)
    theirs = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
    assert kld("transformers from llama.cpp", theirs, small.logits) < 1e-4
    assert kld("our layers from transformers", small.logits, streamed(open_source(path), small.tokens)) < 1e-6
    if top_k > T:
        passes(path, small)
    assert kld("our engine from transformers", small.logits[0, T - 9 :], by_engine(path, small)) < 1e-4


@pytest.mark.parametrize("name", [V32, GLM])
def test_file_with_an_mtp_layer(name, tmp_path):
    """The layer that drafts the token after the next: of the checkpoint and of a file of ours as llama.cpp computes it
    on the same hidden states; and the model itself is what it is without."""
    small = made(name, mtp=1)
    path, checkpoint = as_f32(small, tmp_path), CheckpointSource(Checkpoint.open(small.folder))
    assert {"blk.3.nextn.eh_proj.weight", "blk.3.indexer.proj.weight"} < GGUFFile.open(path).tensors.keys()
    seen, ours = drafted(checkpoint, small.tokens)
    theirs = llama.logits(path, small.tokens[:, 1:].numpy(), hidden=seen.numpy())
    assert kld("MTP: our layers from llama.cpp", torch.from_numpy(theirs), ours) < 1e-4
    assert kld("MTP: the file's from the checkpoint's", ours, drafted(open_source(path), small.tokens)[1]) < 1e-6
    main = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
    assert kld("beside an MTP layer: transformers from llama.cpp", main, small.logits) < 1e-4
    assert kld("our engine from transformers", small.logits[0, T - 9 :], by_engine(path, small)) < 1e-4
    passes(path, small)


@pytest.mark.parametrize("name", [V32, GLM])
def test_made_at_two_bits(name, tmp_path):
    small, options = (
        made(name, mtp=1),
        ("--tokens", 2048, "--eval-tokens", 2048, "--encoder", "ggml", "--device", "cpu"),
    )
    quantkit("make", small.folder, "--recipe", "1.58bit", "--output", tmp_path / "out", *options)
    (path,) = (tmp_path / "out").glob("*bit.gguf")
    tensors = GGUFFile.open(path).tensors
    assert tensors["blk.0.indexer.attn_q_b.weight"].qtype == "Q8_0" and "IQ1_S" in {t.qtype for t in tensors.values()}
    assert tensors["blk.3.nextn.eh_proj.weight"].qtype == "Q6_K"
    assert not certify(path, "llama.cpp", oracle=False).failed()  # without the original to compare with
    ours = streamed(open_source(path), small.tokens)
    assert torch.from_numpy(llama.logits(path, small.tokens.numpy())).isfinite().all()
    # On the same weights as F32, for llama.cpp rounds the inputs of quantized products to 8 bits.
    theirs = torch.from_numpy(llama.logits(twin(path, tmp_path / "twin.gguf"), small.tokens.numpy()))
    assert kld("2-bit weights: our layers from llama.cpp", theirs, ours) < 1e-4
    passes(path, small, oracle=False)  # whose limit is for trained models: these are thrown off by 8 bits
    for context in (4096, 256):  # in torch, for it is beyond the top-k, and as a graph
        quantkit("run", path, "-p", "It was", "-n", 4, "--context", context)


def test_v32_as_deepseek2(tmp_path):
    """The same weights without the indexer, in any program that knows R1."""
    small = made(V32)
    imatrix, path = tmp_path / "imatrix.gguf", tmp_path / "as-r1.gguf"
    quantkit("calibrate", small.folder, "--tokens", 512, "--device", "cpu", "--output", imatrix)
    make(path, one_type(tmp_path, "F32"), imatrix, "--target", "llama.cpp/deepseek2", model=small.folder)
    file = GGUFFile.open(path)
    assert file.metadata["general.architecture"] == "deepseek2" and not any("indexer" in name for name in file.tensors)
    theirs = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
    assert kld("as deepseek2: transformers from llama.cpp", theirs, small.logits) < 1e-4
    passes(path, small)
    with pytest.raises(QuantkitError, match="it cannot be written as deepseek2"):
        plan_model(made(GLM).folder, "1.58bit", "llama.cpp/deepseek2")
