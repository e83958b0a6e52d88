"""DeepSeek-V3.2 and GLM-5: our reference against transformers' own classes."""

import pytest
import torch
from dsa_models import GLM, V32, made

from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits

pytestmark = pytest.mark.skipif(not hf.available(), reason="needs transformers")


def streamed(source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(source, source.head(), final_hidden(source, tokens))


@pytest.mark.parametrize(("layers", "top_k"), [(3, 2048), (3, 64), (1, 32)])
@pytest.mark.parametrize("name", [V32, GLM])
def test_reference_is_transformers_model(name, layers, top_k):
    small = made(name, layers, top_k)
    source = CheckpointSource(Checkpoint.open(small.folder))
    assert divergence(small.logits, streamed(source, small.tokens)) < 1e-6
    engine = TorchEngine(source, 1, small.tokens.shape[1])  # a prompt beyond the top-k, and tokens one by one
    caches = engine.caches(1)
    parts = [small.tokens[:, :80], small.tokens[:, 80:120], *small.tokens[:, 120:].split(1, dim=1)]
    stepped = torch.cat([engine.forward(part, caches, all_logits=True) for part in parts], dim=1)
    assert divergence(small.logits, stepped) < 1e-6
