"""Our runtime against stock llama.cpp, on the same tokens.

llama.cpp rounds the input of every quantized matrix product to 8 bits. In a model of four layers that alone moves the
logits by a KLD of about 0.005 and changes 5 % of the top tokens, and any other order of summation re-rolls it:
llama.cpp differs from itself by as much with one flag or another (docs/results/oracles.md). So there are two
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
from oracle_files import reference, twin

from quantkit.evaluation.oracles import llama
from quantkit.models.tokenizer import tokenize
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.sources.gguf import GGUFSource, open_gguf, open_source
from quantkit.runtime.sources.quantized import Quantized
from quantkit.runtime.stream import Source, final_hidden, head_tiles

pytestmark = pytest.mark.skipif(not llama.available(), reason=f"needs {llama.WHEEL}")

MAX_KLD, MIN_TOP1 = 0.002, 99.0  # what agreement means: mean KLD in nats, equal top tokens in percent
EXACT_MEDIAN = 5e-6  # both compute in float32: only orders of summation and llama.cpp's F16 cache differ
NOISE = 1.6  # how far beyond llama.cpp's own spread a difference on the same file may be

Chunks = Callable[[int, int], torch.Tensor]


@dataclass
class Agreement:
    """KLD in nats of the second from the first, share of equal top tokens in percent.

    kld_but_ties: mean of the three quarters of the tokens that differ least: where router scores are tied, rounding
    decides between experts; that token may differ by a nat, and those after it attend to another one.
    """

    kld: float
    kld_but_ties: float
    kld_median: float
    top1: float


def agreement(first: np.ndarray | torch.Tensor, second: np.ndarray | torch.Tensor) -> Agreement:
    log_p, log_q = (torch.as_tensor(x).double().flatten(0, -2).log_softmax(-1) for x in (first, second))
    kld = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double()
    rest = kld.sort().values[: 3 * len(kld) // 4].mean()
    found = Agreement(float(kld.mean()), float(rest), float(kld.median()), 100 * float(same.mean()))
    print(found)
    return found


def assert_agrees(first, second) -> None:
    found = agreement(first, second)
    assert found.kld < MAX_KLD and found.top1 > MIN_TOP1, found


def assert_exact(first, second) -> None:
    """Nothing but rounding, a few tokens aside whose router scores are tied."""
    found = agreement(first, second)
    assert found.kld_but_ties < MAX_KLD / 10 and found.kld_median < EXACT_MEDIAN and found.top1 > MIN_TOP1, found


@torch.inference_mode()
def streamed(source: Source, tokens: torch.Tensor) -> torch.Tensor:
    """float32 [n_chunk, t, n_vocab] by runtime.stream."""
    hidden = final_hidden(source, tokens)
    return torch.cat(list(head_tiles(source, source.head(), hidden.view(-1, source.config.d)))).view(*tokens.shape, -1)


def stepped(source: Source, tokens: torch.Tensor, prompt: int = 1) -> torch.Tensor:
    """The same by the torch engine: a prompt, then token by token through the KV cache."""
    engine = TorchEngine(source, 1, tokens.shape[1])
    caches = engine.caches(len(tokens))
    parts = [tokens[:, :prompt], *tokens[:, prompt:].split(1, dim=1)]
    return torch.cat([engine.forward(part, caches, all_logits=True) for part in parts], dim=1)


FILES = [("llama.cpp", "split"), ("llama.cpp", "combined"), ("ktransformers", "split"), ("ktransformers", "combined")]
MADE = [FILES[0], FILES[3]]  # as `make` makes them


@pytest.mark.parametrize(("target", "mla"), FILES)
def test_quantized_weights_in_exact_arithmetic(target, mla, quantized, chunks: Chunks, work: Path):
    recipe = "1.58bit" if (target, mla) in MADE else "Q6_K"  # the file's form is what differs
    path = quantized(recipe, target, mla)
    tokens = chunks(2, 256)
    theirs = llama.logits(twin(path, work / f"twin-{target}-{mla}.gguf"), tokens.numpy())
    source = open_source(path)
    assert_exact(theirs, streamed(source, tokens))
    assert_exact(theirs[:, :96], stepped(source, tokens[:, :96], prompt=5))


@pytest.mark.parametrize(("target", "mla"), MADE)
def test_same_file_within_the_spread_of_llama_cpp(target, mla, quantized, chunks: Chunks):
    path = quantized("1.58bit", target, mla)
    tokens = chunks(4, 256)
    theirs = llama.logits(path, tokens.numpy())
    again = llama.logits(path, tokens.numpy(), cache="f32", flash_attention=0)
    exact = streamed(open_source(path), tokens)
    weights = open_gguf(path)
    source = GGUFSource(weights, Quantized(weights))
    spread, error = agreement(theirs, again), agreement(exact, theirs)
    for logits in (streamed(source, tokens), stepped(source, tokens, prompt=224)):
        found, from_exact = agreement(theirs, logits), agreement(exact, logits)
        assert found.kld_but_ties < max(MAX_KLD, NOISE * spread.kld_but_ties), (found, spread)
        assert 100 - found.top1 < max(100 - MIN_TOP1, NOISE * (100 - spread.top1)), (found, spread)
        assert from_exact.kld < max(MAX_KLD, NOISE * error.kld), (from_exact, error)


@pytest.mark.parametrize("mla", ["split", "combined"])
def test_original_against_f32_file(mla, plain, chunks: Chunks):
    tokens = chunks(2, 256)
    theirs = llama.logits(plain("F32", mla), tokens.numpy())
    assert_exact(theirs, streamed(reference(), tokens))


def test_original_against_bf16_file(plain, chunks: Chunks):
    tokens = chunks(4, 256)
    theirs = llama.logits(plain("BF16"), tokens.numpy())
    assert_agrees(theirs, streamed(reference(), tokens))


def test_long_context(plain, chunks: Chunks):
    tokens = chunks(1, 2048)
    theirs = llama.logits(plain("F32"), tokens.numpy())
    ours = streamed(reference(), tokens)
    assert_exact(theirs, ours)
    assert_exact(theirs[:, 1792:], ours[:, 1792:])


@pytest.mark.parametrize("n", [4400, pytest.param(16384, marks=pytest.mark.large)])
def test_engine_of_run_and_serve_over_a_long_context(n, plain, chunks: Chunks):
    """Beyond the 4,096 positions before YaRN: pieces through whole layers (512) and through the graph (100), of each
    its last token, then 16 tokens one by one."""
    tokens = chunks(1, n)
    theirs = torch.from_numpy(llama.logits(plain("F32"), tokens.numpy(), step=512)[0])
    prompt, last = tokens[0].tolist(), n - 16
    for piece in (512, 100):
        engine = open_engine(open_gguf(plain("F32"), n_threads=1), 1, n)
        ours, places = [], []
        for at in range(0, last, piece):
            part = prompt[at : min(at + piece, last)]
            ours.append(engine.prefill(0, part, at).clone())
            places.append(at + len(part) - 1)
        for place in range(last, n):
            ours.append(engine.decode([0], [prompt[place]])[0].clone())
            places.append(place)
        late = torch.tensor(places) >= 4096
        assert agreement(theirs[places], torch.stack(ours)).kld < MAX_KLD
        assert agreement(theirs[places][late], torch.stack(ours)[late]).kld < MAX_KLD


TEXTS = [
    "The quick brown fox jumps over the lazy dog; it's 12:30, isn't it?",
    'def f(x):\n    return x**2 + 3.14159e-10  # π\n\n\tif x != 0: print(f"{x!r}")\r\n',
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


def test_tokenizer(plain):
    path = plain("F32")
    theirs = llama.tokenize(path, TEXTS)
    original, from_file = reference().tokenizer(), open_source(path).tokenizer()
    for text, ids in zip(TEXTS, theirs, strict=True):
        assert tokenize(original, text) == ids, text
        assert tokenize(from_file, text) == ids, text
