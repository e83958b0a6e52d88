"""DeepSeek-V3.2 and GLM-5 in stock llama.cpp: files of ours against our reference, dense and sparse, and our engines
against both."""

from pathlib import Path

import pytest
import torch
from dsa_models import GLM, V32, Small, made
from oracle_files import make, one_type, quantkit
from test_llama import streamed

from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf, llama
from quantkit.runtime.sources.gguf import open_source

pytestmark = [
    pytest.mark.skipif(not llama.available(), reason=f"needs {llama.WHEEL}"),
    pytest.mark.skipif(not hf.available(), reason="needs transformers"),
]


def as_f32(small: Small, folder: Path) -> Path:
    imatrix = folder / "imatrix.gguf"
    quantkit("calibrate", small.folder, "--tokens", 512, "--device", "cpu", "--output", imatrix)
    return make(folder / "f32.gguf", one_type(folder, "F32"), imatrix, model=small.folder)


def test_dense(tmp_path):
    """Below the top-k."""
    for name in (V32, GLM):
        small = made(name)
        folder = tmp_path / name
        folder.mkdir()
        path = as_f32(small, folder)
        theirs = torch.from_numpy(llama.logits(path, small.tokens.numpy()))
        assert divergence(theirs, small.logits) < 1e-4
        assert divergence(small.logits, streamed(open_source(path), small.tokens)) < 1e-6
