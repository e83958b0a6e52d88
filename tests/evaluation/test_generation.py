"""Greedy agreement with the original, and loops."""

from functools import partial
from pathlib import Path

import pytest
import torch

from quantkit.calibration import corpus
from quantkit.evaluation.generation import GREEDY, check, loop_period, top_tokens
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Opener, generate
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.runtime.stream import final_hidden, head_tiles


@pytest.fixture(scope="module")
def reference(tiny) -> CheckpointSource:
    return CheckpointSource(tiny)


def opener(path: Path) -> Opener:
    return partial(open_engine, open_gguf(path), 1)


@pytest.fixture(scope="module")
def chunks(reference) -> corpus.Chunks:
    return corpus.chunk(corpus.default("evaluation"), reference.tokenizer(), reference.config.bos, 128, 8 * 128)


@pytest.mark.parametrize(
    ("tokens", "period"),
    [
        ([*range(100), *[7] * 40], 1),
        ([*range(100), *[1, 2, 3] * 20], 3),
        ([*range(50), *list(range(60)) * 4], 60),
        ([*range(50), *list(range(60)) * 3], 0),  # three times is rhetoric
        ([*[5] * 200, *range(30)], 0),  # it found its way out
        (list(range(300)), 0),
        ([1, 1, 1, 1], 0),
        ([], 0),
    ],
)
def test_loops(tokens, period):
    assert loop_period(tokens) == period


@torch.inference_mode()
def test_top_tokens_over_slabs(reference, chunks, monkeypatch):
    hidden = final_hidden(reference, chunks.tokens[:1])[0]
    whole = torch.cat(list(head_tiles(reference, reference.head(), hidden))).argmax(-1)
    monkeypatch.setattr("quantkit.evaluation.generation.VOCAB_SLAB", 100)
    assert torch.equal(top_tokens(reference, hidden), whole)


@torch.inference_mode()
def test_agreement_is_what_two_greedy_runs_share(made, reference, chunks):
    """The original's own greedy run, token by token, against the one streamed pass over the file's text."""
    path = made / "tiny-r1-1.58bit.gguf"
    found = check(opener(path), reference, chunks, 2, n_prompt=24, n_new=8, n_long=8)
    assert found == check(opener(path), reference, chunks, 2, n_prompt=24, n_new=8, n_long=8)
    ours, theirs = opener(path)(40), TorchEngine(reference, 1, 40)
    for prompt, row in zip(chunks.tokens[:2, :24].tolist(), found["continuations"], strict=True):
        a, b = (list(generate(engine, prompt, 8, GREEDY)) for engine in (ours, theirs))
        shared = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert row["matched"] in (shared, shared + 1), (row, a, b)  # both may have ended with EOS there
        assert row["loop_original"] is not None
    assert found["loops"] == 0 and "2 prompts" in found["summary"]


@torch.inference_mode()
def test_a_lossless_file_agrees_in_every_token(tiny, reference, chunks, tmp_path):
    """An F32 file is the original; only ties could part them."""
    from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
    from quantkit.models import family
    from quantkit.planning.assign import make_plan
    from quantkit.planning.recipe import Recipe

    text = 'name = "f32"\ndescription = "x"\ntarget = "llama.cpp"\nmla = "split"\n'
    (tmp_path / "f32.toml").write_text(text + '[[rules]]\nmatch = "*"\nqtype = "F32"\nwhy = "a test"\n')
    plan = make_plan(family.specs(reference.config), Recipe.load(tmp_path / "f32.toml"), model="tiny")
    files = quantize(tiny, plan, {}, Output(tmp_path / "f32.gguf"), GgmlEncoder(), workers=1)
    found = check(opener(files[0]), reference, chunks, 2, n_prompt=24, n_new=12, n_long=8)
    assert found["agreed"] == 100 and all(c["matched"] == c["tokens"] for c in found["continuations"])
    assert found["loops"] == sum(c["loop_original"] > 0 for c in found["continuations"])
