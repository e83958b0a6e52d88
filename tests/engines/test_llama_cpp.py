"""Our runtime against stock llama.cpp, on the same tokens.

llama.cpp rounds the input of every quantized matrix product to 8 bits. In a model of four layers that alone moves the
logits by a KLD of about 0.005 and changes 5 % of the top tokens, and any other order of summation re-rolls it:
llama.cpp differs from itself by as much between prompt and token-by-token decoding (docs/engines.md). So there are two
kinds of test. Where weights are not quantized, the two engines must agree to rounding, on the same quantized weights
too (decoded to F32 by the `gguf` package, an independent decoder). On the quantized file itself, they must not differ
more than llama.cpp differs from itself, and ours must be as near to exact arithmetic as llama.cpp is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from quantkit import pipeline
from quantkit.arch import tokenizer as tokenizers
from quantkit.runtime.generate import Model
from quantkit.runtime.sources import CheckpointSource, GGUFSource, Source
from quantkit.runtime.stream import final_hidden, logit_tiles

from . import llama_oracle
from .conftest import MODEL, twin

pytestmark = pytest.mark.skipif(not llama_oracle.available(), reason=f"needs {llama_oracle.WHEEL}")

MAX_KLD, MIN_TOP1 = 0.002, 99.0  # what agreement means
EXACT_KLD, EXACT_TOP1 = 2e-5, 99.5  # both compute in float32: only orders of summation and an F16 cache differ
NOISE = 1.5  # how far beyond llama.cpp's own spread a difference on the same file may be

Chunks = Callable[[int, int], torch.Tensor]


@dataclass
class Agreement:
    """KLD in nats of the second from the first, share of equal top tokens in percent."""

    kld: float
    top1: float


def agreement(first: np.ndarray | torch.Tensor, second: np.ndarray | torch.Tensor) -> Agreement:
    log_p, log_q = (torch.as_tensor(x).double().flatten(0, -2).log_softmax(-1) for x in (first, second))
    kld = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    return Agreement(float(kld), 100 * float((log_p.argmax(-1) == log_q.argmax(-1)).double().mean()))


def assert_agrees(first, second, max_kld: float = MAX_KLD, min_top1: float = MIN_TOP1) -> None:
    found = agreement(first, second)
    print(found)
    assert found.kld < max_kld and found.top1 > min_top1, found


@torch.inference_mode()
def streamed(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [n_chunk, t, n_vocab] by runtime.stream."""
    hidden = final_hidden(source, tokens)
    return torch.cat(list(logit_tiles(source, hidden.view(-1, source.config.d)))).view(*tokens.shape, -1)


def stepped(source: Source, tokens: torch.Tensor, prompt: int = 1) -> torch.Tensor:
    """The same by runtime.generate.Model: a prompt, then token by token through the KV cache."""
    model = Model(source)
    caches = model.caches(tokens.shape[1], len(tokens))
    parts = [tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)]
    return torch.cat([model.forward(part, caches, all_logits=True) for part in parts], dim=1)


FILES = [("llama.cpp", "split"), ("llama.cpp", "combined"), ("ktransformers", "split"), ("ktransformers", "combined")]


@pytest.mark.parametrize(("target", "mla"), FILES)
def test_quantized_weights_in_exact_arithmetic(target, mla, quantized, chunks: Chunks, work: Path):
    path = quantized("1.58bit", target, mla)
    tokens = chunks(2, 256)
    theirs = llama_oracle.logits(twin(path, work / f"twin-{target}-{mla}.gguf"), tokens.numpy())
    source = GGUFSource(path, hybrid=False)
    assert_agrees(theirs, streamed(source, tokens), EXACT_KLD, EXACT_TOP1)
    assert_agrees(theirs[:, :96], stepped(source, tokens[:, :96], prompt=5), EXACT_KLD, EXACT_TOP1)


@pytest.mark.parametrize(("target", "mla"), FILES)
def test_same_file_within_the_spread_of_llama_cpp(target, mla, quantized, chunks: Chunks):
    path = quantized("1.58bit", target, mla)
    tokens = chunks(2, 256)
    batch = llama_oracle.logits(path, tokens.numpy())
    single = llama_oracle.logits(path, tokens.numpy(), step=1)
    exact = streamed(GGUFSource(path, hybrid=False), tokens)
    source = GGUFSource(path, hybrid=True)
    ours = {"stream": streamed(source, tokens), "generate": stepped(source, tokens)}
    spread = agreement(batch, single)
    error = max(agreement(exact, batch).kld, agreement(exact, single).kld)
    print("llama.cpp from itself", spread, "from exact arithmetic", error)
    for name, logits in ours.items():
        found, from_exact = agreement(batch, logits), agreement(exact, logits)
        print(name, found, "from exact arithmetic", from_exact)
        assert found.kld < max(MAX_KLD, NOISE * spread.kld), (name, found, spread)
        assert 100 - found.top1 < max(100 - MIN_TOP1, NOISE * (100 - spread.top1)), (name, found, spread)
        assert from_exact.kld < NOISE * error, (name, from_exact, error)


@pytest.mark.parametrize("mla", ["split", "combined"])
def test_original_against_f32_file(mla, plain, chunks: Chunks):
    tokens = chunks(2, 256)
    theirs = llama_oracle.logits(plain("F32", mla), tokens.numpy())
    assert_agrees(theirs, streamed(CheckpointSource(pipeline.open_weights(MODEL)), tokens), EXACT_KLD, EXACT_TOP1)


def test_original_against_bf16_file(plain, chunks: Chunks):
    tokens = chunks(4, 256)
    theirs = llama_oracle.logits(plain("BF16"), tokens.numpy())
    assert_agrees(theirs, streamed(CheckpointSource(pipeline.open_weights(MODEL)), tokens))


def test_long_context(plain, chunks: Chunks):
    tokens = chunks(1, 2048)
    theirs = llama_oracle.logits(plain("F32"), tokens.numpy())
    ours = streamed(CheckpointSource(pipeline.open_weights(MODEL)), tokens)
    assert_agrees(theirs, ours, EXACT_KLD, EXACT_TOP1)
    assert_agrees(theirs[:, 1792:], ours[:, 1792:], EXACT_KLD, EXACT_TOP1)


TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's 12:30, isn't it?",
    "def f(x):\n    return x**2 + 3.14159e-10  # π\n\n\tif x != 0: print(f\"{x!r}\")\r\n",
    "深度求索的模型有671B个参数，其中37B被激活。東京タワーは333メートルです。",
    "1 12 123 1234 12345678901234567890 3.1415926 0x1F ½ ²³ ٣٤٥ Ⅻ",
    "a  b   c    d\t\te\n\n\nf \n g  \r\n\r\n   h",
    "   leading and trailing   ",
    "\n\n  \n\t\n",
    "Ünïcödé naïve café e\u0301 🙂👩‍👩‍👧 \u200b\ufeff §¶ ﷽",
    "",
    " ",
    "<｜User｜>What is 2+2?<｜Assistant｜><think>\nEasy.\n</think>\n\n4<｜end▁of▁sentence｜>",
    "mixed<｜User｜> 你好 <think>x</think><｜Assistant｜>ok <notatoken> <|not|>",
    "x" * 300 + "!" * 50 + "\u4e00" * 40,
]


@pytest.mark.parametrize("special", [True])
def test_tokenizer(special, plain):
    path = plain("F32")
    theirs = llama_oracle.tokenize(path, TEXTS, special=special)
    original, from_file = CheckpointSource(pipeline.open_weights(MODEL)).tokenizer(), GGUFSource(path).tokenizer()
    for text, ids in zip(TEXTS, theirs, strict=True):
        assert tokenizers.encode(original, text) == ids, text
        assert tokenizers.encode(from_file, text) == ids, text
