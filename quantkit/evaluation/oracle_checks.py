"""The program that a file is made for loads it, runs it, and its numbers are compared with the decoded weights.

No list of types is trusted here: a kernel that returns zeros, or something else than the product, is caught because
its answer is wrong.
"""

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from quantkit.errors import QuantkitError
from quantkit.evaluation.certificate import Check, Engine, Status
from quantkit.evaluation.divergence import HeadLogits, HeldLogits, diverge
from quantkit.evaluation.oracles import kt, llama, llama_tool
from quantkit.evaluation.oracles.child import IllegalInstruction, NotRun, OracleError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml.library import processor_flags
from quantkit.machine import threads
from quantkit.models.config import ModelConfig
from quantkit.models.tokenizer import tokenize
from quantkit.planning import targets
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import route
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import stream

NATIVE = "oracle llama.cpp build"
NOT_RUN = "not run: "
ILLEGAL = (
    f"{NOT_RUN}it dies by an illegal instruction: built for another CPU, or for AMX by GCC 12.2 or older "
    "(docs/results/amx.md)"
)
OTHER_TOKENS = "it cuts the sample text into other tokens than we do"
ITSELF = {
    "ollama": "Ollama was not run; since June 2026 it starts llama.cpp's llama-server, before that engines of its own",
    "ktransformers": "KTransformers was not run; kt-kernel computed experts of one layer for each combination of types",
}
TOKENS, REPEATED = 192, 4
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


@dataclass(frozen=True)
class Sample:
    """Tokens of TEXT and what our runtime makes of them. ids: of the text, without BOS; tokens: int64 [1, TOKENS], with
    it where the file says so (GLM-5's do not), as llama.cpp begins a text; hidden: float32 [TOKENS, d], after the last
    layer."""

    source: GGUFSource
    ids: list[int]
    tokens: torch.Tensor
    hidden: torch.Tensor

    def logits(self, first: int = 0) -> HeadLogits:
        """After tokens `first` to the last but one."""
        return HeadLogits(self.source, self.hidden[first:-1])


class SamplePass:
    """TOKENS tokens going through a file's decoded weights, a layer at a time beside another reading of the file."""

    @torch.inference_mode()
    def __init__(self, path: Path | GGUFFile, device: str) -> None:
        self.source = open_source(path, device)
        self.ids = tokenize(self.source.tokenizer(), TEXT * REPEATED)
        bos = self.source.file.metadata.get("tokenizer.ggml.add_bos_token", False)
        begin = [self.source.config.bos] if bos else []
        self.tokens = torch.tensor([[*begin, *self.ids][:TOKENS]])
        self.hidden, self.done = torch.empty(0), 0
        self._steps = stream(self.source, self.tokens)

    @torch.inference_mode()
    def advance(self, n_layers: int) -> None:
        """Be through the first n_layers; those that predict the token after the next are no part of it."""
        while self.done < min(n_layers, self.source.config.n_layer):
            step = next(self._steps)
            self.hidden, self.done = step.compute(), step.layer + 1

    def whole(self) -> Sample:
        """Does what is left of the pass; the last layer's weights need not be held then."""
        self.advance(self.source.config.n_layer)
        self._steps = iter(())
        return Sample(self.source, self.ids, self.tokens, self.hidden[0])


def sample(path: Path, device: str) -> Sample:
    """One pass of TOKENS tokens through the file, decoded."""
    return SamplePass(path, device).whole()


@dataclass(frozen=True)
class Programs:
    """What of llama.cpp can be asked: the installed package; a build, or None and why not."""

    package: bool
    build: llama_tool.Build | None
    why: str

    @classmethod
    def found(cls) -> "Programs":
        """On this machine. A build is started to know what it is.

        QuantkitError if the one that the environment names is none: who named it is told, not left without.
        """
        try:
            return cls(llama.available(), llama_tool.program(), why_no_build())
        except QuantkitError as error:
            if os.environ.get(llama_tool.FOLDER):
                raise
            return cls(llama.available(), None, str(error))

    @property
    def n(self) -> int:
        """How many there are."""
        return self.package + (self.build is not None)


@dataclass(frozen=True)
class Begun:
    """What is known before llama.cpp is asked: its programs, and our numbers if they went through the file already."""

    programs: Programs
    sample: SamplePass | None = None


def run(path: Path, file: GGUFFile, target: str, device: str, begun: Begun | None = None) -> Iterator[Check]:
    """All checks by running the file; an oracle that is not installed is skipped, and says so."""
    if target == "ktransformers":
        yield from kt_kernel(path, file)
    else:
        yield from llama_cpp(path, file, device, begun)
    if why := ITSELF.get(target):
        yield Check(f"oracle {target} itself", "skip", why)


@torch.inference_mode()
def llama_cpp(path: Path, file: GGUFFile, device: str, begun: Begun | None = None) -> Iterator[Check]:
    """Tokens and logits of stock llama.cpp, against ours from the decoded weights: of the installed package, and of a
    build for this machine."""
    begun = begun or Begun(Programs.found())
    build, why = begun.programs.build, begun.programs.why
    ours = (begun.sample.whole() if begun.sample else sample(path, device)) if begun.programs.n else None
    if ours and begun.programs.package:
        yield from installed(file, ours)
    else:
        yield Check("oracle llama.cpp", "skip", f"not installed: pip install {llama.WHEEL} (or llama-cpp-python)")
    if ours and build:
        yield from built(build, file, ours)
    else:
        yield Check(NATIVE, "skip", why)


def why_no_build() -> str:
    """What a native build would compute otherwise, and how to have one."""
    amx = (
        "this CPU has AMX, which a build uses and a wheel does not" if "amx_int8" in processor_flags() else "none found"
    )
    return (
        f"{amx}: build llama.cpp (cmake -B build && cmake --build build --target {llama_tool.PROGRAM}) and set "
        f"{llama_tool.FOLDER} to build/bin"
    )


def installed(file: GGUFFile, ours: Sample) -> Iterator[Check]:
    """The package's library, with the flags that the model needs, and then also without them, to show what they are
    worth; what it computes with them counts, whatever becomes of it without."""
    name = "oracle llama.cpp"
    config = ours.source.config
    flags = targets.start_flags("llama.cpp", config)
    betas = (config.yarn.beta_fast, config.yarn.beta_slow) if flags and config.yarn else None
    ask = partial(llama.logits, file.files[0], ours.tokens.numpy(), n_threads=threads())
    try:
        theirs = llama.tokenize(file.files[0], [TEXT * REPEATED])[0]
        logits = ask(yarn_betas=betas)
        engine = Engine("llama.cpp", llama.version(), llama_tool.widest(llama.system_info()), flags)
    except OracleError as error:
        yield unanswered(name, error)
        return
    if theirs != ours.ids:
        yield Check(name, "fail", "llama.cpp cuts the sample text into other tokens than we do")
        return
    found = compared(name + flags, engine, ours, torch.from_numpy(logits)[0, :-1])
    yield _unless_misrouted(found, config)
    if not flags:
        return
    try:
        plain = ask()
    except OracleError as error:
        yield unanswered(name, error)
        return
    without = compared(name, replace(engine, flags=""), ours, torch.from_numpy(plain)[0, :-1], math.inf)
    yield replace(without, status="warn", detail=f"without{flags}: {without.detail}")


def built(program: llama_tool.Build, file: GGUFFile, ours: Sample) -> Iterator[Check]:
    """llama-perplexity of a build: with its defaults and, where these fail, with --no-repack, which then is a flag that
    this file needs on this CPU. One that dies by illegal instructions in either way says nothing of the file."""
    flags = targets.start_flags("llama.cpp", ours.source.config)
    first = _by_build(program, file, ours, flags)
    if first.detail != ILLEGAL and (first.status != "fail" or first.detail == OTHER_TOKENS):
        yield first
        return
    again = _by_build(program, file, ours, flags + targets.NO_REPACK)
    if again.status in ("pass", "warn"):
        told = f"start it with{targets.NO_REPACK} on this CPU; without: {first.detail.removeprefix(NOT_RUN)}"
        yield from (again, replace(first, status="warn", detail=told))
    else:
        yield again if first.status == "skip" else first


def _by_build(program: llama_tool.Build, file: GGUFFile, ours: Sample, flags: str) -> Check:
    config, name = ours.source.config, NATIVE + flags
    try:
        found = llama_tool.score(program, file.files[0], TEXT * 2 * REPEATED, TOKENS, flags=flags, n_threads=threads())
    except IllegalInstruction:
        return Check(name, "skip", ILLEGAL)
    except OracleError as error:
        return unanswered(name, error)
    engine = Engine("llama.cpp", program.version, found.cpu, flags)
    if found.tokens.tolist() != ours.tokens[0].tolist():
        return Check(name, "fail", OTHER_TOKENS, engine)
    return _unless_misrouted(compared(name, engine, ours, torch.from_numpy(found.log_probs)), config)


def _unless_misrouted(check: Check, config: ModelConfig) -> Check:
    """A failure is a warning for models that llama.cpp routes wrongly, whatever the file."""
    misrouted = targets.routes_wrongly("llama.cpp", config)
    return replace(check, status="warn") if misrouted and check.status == "fail" else check


def unanswered(name: str, error: OracleError, engine: Engine | None = None) -> Check:
    """Of a program that came to no answer: a failure of the file, unless something else was to blame; then it was not
    run."""
    if isinstance(error, NotRun):
        return Check(name, "skip", f"{NOT_RUN}{error}", engine)
    return Check(name, "fail", error.reason(), engine)


def compared(name: str, engine: Engine, ours: Sample, theirs: torch.Tensor, most: float = MOST_KLD) -> Check:
    """theirs: logits or log-probabilities [n, n_vocab] after the last n tokens but one. most: KLD that passes."""
    if not torch.isfinite(theirs).all():
        return Check(name, "fail", "llama.cpp computes logits that are not finite", engine)
    first = TOKENS - 1 - len(theirs)
    following = ours.tokens[0, first + 1 :]
    found = diverge(ours.logits(first), HeldLogits(theirs), following, theirs.shape[-1]).summary()
    kld, top = found["kld_mean"], found["top1_agreement"]
    what = (
        f"{engine.version}, {engine.cpu}: {len(theirs)} tokens, KLD {kld:.4f} from our decoded weights, same top "
        f"{top:.0f} %, PPL {found['ppl']:.2f} (ours {found['ppl_reference']:.2f})"
    )
    return Check(name, "pass" if kld < most else "fail", what, engine)


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
            except NotRun as failure:
                yield unanswered(f"oracle kt-kernel {kinds}", failure, Engine("kt-kernel", kt.version(), variant or ""))
                continue
            except OracleError as failure:
                yield Check(f"oracle kt-kernel {kinds}", "fail", _last_line(str(failure)))
                continue
            error = float((got - want).norm() / want.norm())
            said = "silent zeros" if not got.any() else f"relative error {error:.3f} from decoded weights"
            # Written so that an answer that is not a number fails.
            status: Status = "pass" if error <= MOST_ERROR else "fail"
            engine = Engine("kt-kernel", kt.version(), variant)
            yield Check(f"oracle kt-kernel {kinds}", status, f"layer {layer}, {variant} variant: {said}", engine)


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
