"""DeepSeek-V4: our reference against transformers' own class, and what is said of models that are not whole."""

import pytest
import torch
from v4_models import made

from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf
from quantkit.formats.checkpoint import Checkpoint
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits

pytestmark = pytest.mark.skipif(not hf.available(), reason="needs transformers")


def streamed(source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(source, source.head(), final_hidden(source, tokens))


@pytest.mark.parametrize(("ratios", "top_k"), [((0, 4, 128), 512), ((4,), 16)])
def test_reference_is_transformers_model(ratios, top_k):
    small = made(ratios, top_k)
    source = CheckpointSource(Checkpoint.open(small.folder))
    found = divergence(small.logits, streamed(source, small.tokens))
    print(f"ratios {ratios}, top {top_k}: KLD of our reference from transformers {found:.1e}")
    assert found < 1e-6
