"""A file runs the same way through every path: dequantized, quantized, and token by token with its cache."""

import time

import pytest
import torch

from quantkit.calibration import corpus
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.experts.streamed import StreamedExperts, Turns
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import GGUFSource, open_gguf, open_source
from quantkit.runtime.sources.quantized import Quantized
from quantkit.runtime.stream import final_hidden, head_tiles
from quantkit.runtime.watch import Watcher
from quantkit.runtime.workers import Workers
from quantkit.serving.template import apply_template


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def tokens(tiny) -> torch.Tensor:
    """Real text: on random tokens a low-bit model is undecided everywhere, and rounding alone changes routes."""
    return corpus.chunk(corpus.default("evaluation"), read_tokenizer(tiny.path), bos=0, length=96, limit=384).tokens


def quantized(path) -> GGUFSource:
    """As a person runs it, layer by layer."""
    weights = open_gguf(path)
    return GGUFSource(weights, Quantized(weights))


def logits(source, tokens) -> torch.Tensor:
    with torch.inference_mode():
        hidden = final_hidden(source, tokens)
        return torch.cat(list(head_tiles(source, source.head(), hidden.view(-1, hidden.shape[-1])))).view(
            *tokens.shape, -1
        )


def kld(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_quantized_agrees_with_dequantized(path, tokens):
    """ggml rounds activations to 8 bits, torch does not: close, not equal."""
    exact, rounded = (logits(open_it(path), tokens) for open_it in (open_source, quantized))
    assert kld(exact, rounded) < 0.02


@pytest.mark.parametrize(("open_it", "bound"), [(open_source, 1e-6), (quantized, 0.01)])
def test_cache_gives_what_the_whole_prompt_gives(path, tokens, open_it, bound):
    """Exactly, but for ggml's 8-bit activations: there a last bit decides a rounding, and that now and then a route."""
    source = open_it(path)
    engine = TorchEngine(source, 1, 96)
    caches = engine.caches(4)
    steps = [engine.forward(tokens[:, :80], caches, all_logits=True)]
    steps += [engine.forward(tokens[:, i : i + 1], caches) for i in range(80, 96)]
    assert kld(logits(source, tokens), torch.cat(steps, 1)) < bound


def test_cache_overflow_is_refused(path, tokens):
    engine = TorchEngine(quantized(path), 1, 8)
    with pytest.raises(QuantkitError, match="context of 8"):
        engine.forward(tokens, engine.caches(4))


def test_original_and_file_differ_but_not_wildly(path, tiny, tokens):
    divergence = kld(logits(CheckpointSource(tiny), tokens), logits(open_source(path), tokens))
    assert 1e-3 < divergence < 3


def test_chat_template_of_the_file(path):
    rendered = apply_template(GGUFFile.open(path).metadata, [{"role": "user", "content": "hello"}])
    assert rendered.endswith("<｜User｜>hello<｜Assistant｜><think>\n")


def test_missing_tensor_is_named(path, monkeypatch):
    file = GGUFFile.open(path)
    del file.tensors["blk.2.attn_k_b.weight"]
    monkeypatch.setattr(GGUFFile, "open", classmethod(lambda cls, _: file))
    with pytest.raises(QuantkitError, match=r"blk\.2\.attn_k_b\.weight is missing"):
        open_gguf(path)


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_experts_are_read_ahead_but_no_further(ahead):
    weights = torch.randn(8, 3, 16, 16)
    begun, taken = [], []

    def read(e):
        assert len(begun) <= len(taken) + ahead
        begun.append(e)
        return tuple(weights[e])

    class Slow(Watcher):
        def observe_expert(self, visit):
            until = time.monotonic() + 20
            while len(begun) < min(7, len(taken) + 1 + ahead):  # so many are read while this one is looked at
                assert time.monotonic() < until
                time.sleep(0.001)
            taken.append(visit.expert)

    experts = StreamedExperts(read, 8, Turns(ahead=ahead))
    x, expert, share = torch.randn(40, 16), torch.arange(80).view(40, 2) % 7, torch.rand(40, 2)
    expected = StreamedExperts(lambda e: tuple(weights[e]), 8)(x, expert, share)
    assert torch.equal(experts(x, expert, share, watcher=Slow()), expected)
    assert begun == taken == expert.unique().tolist()


def test_an_error_in_one_thread_ends_the_work_of_all():
    workers, done = Workers(3), []

    def work(worker, item):
        if item == 3:
            raise ValueError("three")
        time.sleep(0.01)
        done.append(item)

    with pytest.raises(ValueError, match="three"):
        workers.share_out(work, range(100))
    before = len(done)
    time.sleep(0.1)
    assert len(done) == before < 100
    assert workers.share_out(lambda worker, item: 2 * item, range(50)) == list(range(0, 100, 2))
