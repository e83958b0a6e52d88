"""`import quantkit`: the command line as typed functions, with the names and defaults of its options (docs/api.md).

What a command would print is returned; progress goes to stderr (`quantkit.progress.set_level("quiet")`). Errors are
QuantkitErrors. Sizes are bytes, or text like "150GB".
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from quantkit import machine
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.container import writable_caches
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_folder import model_in
from quantkit.formats.lock import locked
from quantkit.job import make as making
from quantkit.job import stages
from quantkit.job.folder import PLAN
from quantkit.job.options import MakeOptions
from quantkit.job.plan import plan_model
from quantkit.models.open import open_weights
from quantkit.planning import targets
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.plan import Plan
from quantkit.runtime.engines.open import open_engine, opener
from quantkit.runtime.generate import Engine, Sampling
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving.chat import Conversation
from quantkit.serving.template import reasoning
from quantkit.sizes import parse_size

Size = int | str
Place = str | Path
SPLIT = "50GB"


class PlanKeywords(TypedDict, total=False):
    """What decides types. recipe: a name, a TOML file or a plan.json. Budgets: size of the whole file; bpw; ram, vram
    where it will run, with a KV cache of `context` tokens. sensitivity: a sensitivity.json. mtp: False for a file
    without the layer that drafts the token after the next."""

    recipe: Place | None
    target: str | None
    size: Size | None
    bpw: float | None
    ram: Size | None
    vram: Size | None
    context: int
    sensitivity: Place | None
    mtp: bool


class MakeKeywords(PlanKeywords, total=False):
    """What `make` takes besides. data, eval_data: texts to calibrate and to judge by, as --data, one or several;
    tokens, eval_tokens: how much of them. gradients: a folder of `calibrate --gradients`. split_max_size: of one file,
    0 for a single one."""

    data: Sequence[str] | None
    tokens: int | None
    memory: Size | None
    eval_data: Sequence[str] | None
    eval_tokens: int
    imatrix: Place | None
    encoder: Literal["auto", "quantkit", "ggml"]
    effort: Literal["fast", "normal", "best"]
    gradients: Place | None
    device: str | None
    split_max_size: Size
    restart: bool
    recover: bool
    verify: bool
    baseline: bool


class VerifyKeywords(TypedDict, total=False):
    """As of the command `verify`. score: half or all of each chunk."""

    data: Sequence[str] | None
    tokens: int
    target: str | None
    score: Literal["half", "all"]
    runtime_tokens: int
    prompts: int
    memory: Size | None
    device: str | None


class SamplingKeywords(TypedDict, total=False):
    """How tokens are drawn, as in `runtime.generate.Sampling`; temperature 0 is greedy."""

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    typical_p: float
    seed: int


@dataclass(frozen=True)
class Made:
    """What `make` left in `folder`. files: the GGUF, or its splits. scores: what verify.json holds; None without
    verification."""

    folder: Path
    files: tuple[Path, ...]
    plan: Plan
    scores: Mapping[str, Any] | None

    @property
    def kld(self) -> float | None:
        """Mean KL divergence from the original, nats a token."""
        return None if self.scores is None else float(self.scores["kld_mean"])


def plan(model: Place = "tiny-r1", **how: Unpack[PlanKeywords]) -> Plan:
    """A type for every tensor; needs no weights. QuantkitError for a budget that cannot be met."""
    _check(how, PlanKeywords)
    return plan_model(str(model), how.get("recipe"), how.get("target"), _budget(how), mtp=how.get("mtp", True))


def make(model: Place = "tiny-r1", output: Place | None = None, **how: Unpack[MakeKeywords]) -> Made:
    """Calibrate, plan, encode, verify; resumes. output: folder, default MODEL-RECIPE here. QuantkitError for whatever
    cannot be made, before any long work where that can be known."""
    _check(how, MakeKeywords)
    options = MakeOptions(
        recipe=how.get("recipe"),
        target=how.get("target"),
        budget=_budget(how),
        calibration=Calibration(_text(how.get("data"), how.get("tokens")), memory=_bytes(how.get("memory"), "memory")),
        evaluation=_text(how.get("eval_data"), how.get("eval_tokens", 32768)),
        imatrix=_path(how.get("imatrix")),
        gradients=_path(how.get("gradients")),
        encoder=how.get("encoder", "auto"),
        effort=how.get("effort", "normal"),
        device=how.get("device"),
        split_max_bytes=_bytes(how.get("split_max_size", SPLIT), "split_max_size") or None,
        restart=how.get("restart", False),
        recover=how.get("recover", False),
        verify=how.get("verify", True),
        baseline=how.get("baseline", False),
        mtp=how.get("mtp", True),
    )
    files, scores = making.make(str(model), _path(output), options)
    folder = files[0].parent
    return Made(folder, tuple(files), plan_model(str(model), folder / PLAN), scores)


def verify(
    file: Place, reference: Place = "tiny-r1", output: Place | None = None, **how: Unpack[VerifyKeywords]
) -> dict[str, Any]:
    """Perplexity and KL divergence of a file (or the folder that holds it) from its original: what verify.json holds
    (docs/verify.md). output: where to write that; None: nowhere."""
    _check(how, VerifyKeywords)
    path, out = _model(file), _path(output)
    name = how.get("target")
    options = stages.VerifyOptions(
        _text(how.get("data"), how.get("tokens", 32768)),
        target=targets.parse(name).name if name else None,
        score=how.get("score", "half"),
        runtime_tokens=how.get("runtime_tokens", 0),
        prompts=how.get("prompts", 0),
        ram=_bytes(how.get("memory"), "memory"),
        configuration=True,
    )
    device = machine.chosen_device(how.get("device"))
    run = opener(open_gguf(path, device)) if options.runtime_tokens or options.prompts else None
    with locked(out.parent, shared=True) if out else nullcontext():
        return stages.verify_file(path, open_weights(str(reference)), device, options, out, runtime=run)


class Model:
    """A GGUF that generates text; one sequence at a time, from one thread."""

    def __init__(self, weights: GGUFWeights, engine: Engine) -> None:
        self.weights, self.engine = weights, engine

    @classmethod
    def load(
        cls,
        file: Place,
        *,
        device: str | None = None,
        context: int = 4096,
        ram: Size | None = None,
        gpu_layers: int | Literal["auto"] = "auto",
    ) -> "Model":
        """A file, the first of its splits, or the folder that holds it. ram: bytes for it, experts beyond are read as
        needed; gpu_layers: whose routed experts stay in GPU memory. QuantkitError if it cannot be computed."""
        _prepare()
        weights = open_gguf(_model(file), machine.chosen_device(device), ram=_bytes(ram, "ram"))
        return cls(weights, open_engine(weights, 1, context, gpu_layers))

    def generate(self, prompt: str, n_tokens: int = 128, **how: Unpack[SamplingKeywords]) -> str:
        """The prompt's continuation, of at most n_tokens. QuantkitError if the prompt does not fit the context."""
        return "".join(self.stream(prompt, n_tokens, **how))

    def stream(self, prompt: str, n_tokens: int = 128, **how: Unpack[SamplingKeywords]) -> Iterator[str]:
        """As `generate`, piece by piece as they come."""
        return self._conversation(how).complete(prompt, n_tokens)

    def chat(
        self,
        messages: str | Sequence[Mapping[str, str]],
        n_tokens: int = 1024,
        *,
        thinking: bool | None = None,
        **how: Unpack[SamplingKeywords],
    ) -> str:
        """The answer, reasoning included, to messages `{"role": "user", "content": ...}` of which the last is a
        person's (or to that alone, as text), by the file's chat template. thinking: whether to reason, where the
        template has a switch."""
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        if not turns or turns[-1].get("role") != "user":
            raise QuantkitError("messages: the last one must be the user's")
        talk = self._conversation(how, thinking)
        talk.messages = turns[:-1]
        return "".join(piece for piece, _ in talk.ask(turns[-1]["content"], n_tokens))

    def _conversation(self, how: SamplingKeywords, thinking: bool | None = None) -> Conversation:
        _check(how, SamplingKeywords)
        given = {} if thinking is None else reasoning(self.weights.file.metadata, thinking)
        return Conversation(self.weights, self.engine, Sampling(**how), given)


def _check(how: Mapping[str, Any], known: type) -> None:
    """TypeError for a keyword that there is not; and what every command does first."""
    if unknown := how.keys() - known.__annotations__.keys():
        raise TypeError(f"unexpected keyword {min(unknown)!r}; there are {', '.join(known.__annotations__)}")
    _prepare()


@cache
def _prepare() -> None:
    machine.bound_threads()
    writable_caches()


def _budget(how: PlanKeywords) -> BudgetOptions:
    given = {"size": how.get("size"), "ram": how.get("ram"), "vram": how.get("vram")}
    size, ram, vram = (_bytes(value, name) for name, value in given.items())
    return BudgetOptions(size, how.get("bpw"), ram, vram, how.get("context", 16384), _path(how.get("sensitivity")))


def _text(data: Sequence[str] | None, n_tokens: int | None) -> TextChoice:
    return TextChoice((data,) if isinstance(data, str) else tuple(data or ()), n_tokens=n_tokens)


def _bytes(value: Size | None, name: str) -> int | None:
    return parse_size(value, name) if isinstance(value, str) else value


def _path(value: Place | None) -> Path | None:
    return None if value is None else Path(value).expanduser()


def _model(file: Place) -> Path:
    path = Path(file).expanduser()
    return model_in(path) if path.is_dir() else path
