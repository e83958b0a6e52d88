"""What clients send, validated: each field here works, whatever else they send is judged by `serving/fields.py`."""

import contextlib
import gc
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

import pydantic_core
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from quantkit.runtime.bounds import BOUNDS
from quantkit.runtime.generate import Sampling
from quantkit.serving import grammar
from quantkit.serving.fields import CHAT_NEUTRAL, COMPLETION_NEUTRAL, screen, shown
from quantkit.serving.logits import Penalties
from quantkit.serving.parts import Known, Message, Thinking, ToolChoice, Word
from quantkit.serving.refusals import Refused

MAX_CHOICES = 128  # answers to one request: prompts times n
MAX_BIASES = 1024
MAX_TOLD = 1 << 18  # log probabilities of one request's prompts, alternatives included
MAX_TOLD_NEW = 1 << 19  # of its answers: each takes about 120 bytes until it is written
KINDS = {
    "str",
    "bool",
    "int",
    "float",
    "Thinking",
    "ToolChoice",
}  # of a field that may be one of several: pydantic's names

Parsed = TypeVar("Parsed", bound="Asked")


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _no_limit(value: Any) -> Any:
    """-1 is how llama-server and vLLM's clients say "as many as fit"."""
    return None if type(value) in (int, float) and value == -1 else _number(value)


def _at_least_none(value: Any) -> Any:
    return 0 if type(value) in (int, float) and value == -1 else _number(value)


Float: TypeAlias = Annotated[float, BeforeValidator(_number)]
Int: TypeAlias = Annotated[int, BeforeValidator(_number)]
Bias: TypeAlias = Annotated[Float, Field(ge=-100, le=100)]
Ids: TypeAlias = Annotated[list[Int], Field(min_length=1)]
Length: TypeAlias = Annotated[Annotated[int, Field(ge=1)] | None, BeforeValidator(_no_limit)]
LengthOrNone: TypeAlias = Annotated[Annotated[int, Field(ge=0)] | None, BeforeValidator(_no_limit)]
Penalty: TypeAlias = Annotated[Float, Field(ge=-2, le=2)]
Divisor: TypeAlias = Annotated[Float, Field(gt=0, le=100)]


class StreamOptions(Known):
    """include_usage: the stream's last chunk counts tokens. include_obfuscation: padding against eavesdroppers; none
    is sent, which no client can depend on."""

    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: Literal[False] = False


class Asked(Known):
    """A request's body. neutral: of other fields, the values that are accepted."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]]

    model: str = ""


class Body(Asked, ABC):
    """What both endpoints that answer understand."""

    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Annotated[Int, Field(ge=1, le=MAX_CHOICES)] = 1
    temperature: Annotated[Float, Field(ge=0, le=BOUNDS["temperature"][1])] | None = None
    top_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, BeforeValidator(_at_least_none), Field(ge=0, le=BOUNDS["top_k"][1])] | None = None
    min_p: Annotated[Float, Field(ge=0, le=1)] | None = None
    typical_p: Annotated[Float, Field(gt=0, le=1)] | None = None
    seed: Annotated[Int, Field(ge=-(2**63), lt=2**63)] | None = None
    cache_prompt: bool | None = None  # llama-server's
    cache_salt: str | None = None  # vLLM's
    max_tokens: Length = None
    n_predict: Length = None  # llama-server's name of max_tokens
    min_tokens: Annotated[Int, Field(ge=0)] = 0
    stop: Word | Annotated[list[Word], Field(max_length=16)] | None = None
    stop_token_ids: list[Int] = []
    ignore_eos: bool = False
    bad_words: Annotated[list[Word], Field(max_length=64)] = []
    logit_bias: (
        Annotated[dict[int, Bias], Field(max_length=MAX_BIASES)]
        | Annotated[list[tuple[Int, Bias | Literal[False]]], Field(max_length=MAX_BIASES)]
    ) = {}
    skip_special_tokens: bool = False
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: Divisor = 1.0  # vLLM's: of prompt and answer
    repeat_penalty: Divisor = 1.0  # llama-server's: of the last tokens
    repeat_last_n: Annotated[Int, Field(ge=-1)] = 64
    response_format: dict[str, Any] = {}
    json_schema: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _agree(self) -> "Body":
        asked = {key: value for key in self.lengths() if (value := getattr(self, key)) is not None}
        if len(set(asked.values())) > 1:
            raise ValueError(f"{' and '.join(f'{k} {v}' for k, v in asked.items())} contradict each other")
        longest = next(iter(asked.values()), None)
        if longest is not None and self.min_tokens > longest:
            raise ValueError(f"min_tokens {self.min_tokens} is more than {next(iter(asked))} {longest}")
        if self.schema_wanted() is not None and (self.ignore_eos or self.min_tokens):
            raise ValueError("response_format says where the answer ends: leave ignore_eos and min_tokens out")
        return self

    def lengths(self) -> tuple[str, ...]:
        """Fields that say how long an answer may be."""
        return "max_tokens", "n_predict"

    def n_tokens(self) -> int | None:
        """Most tokens of an answer; None: as many as fit."""
        return next((value for key in self.lengths() if (value := getattr(self, key)) is not None), None)

    def max_tokens_given(self) -> bool:
        """Whether the client says anything of it, "as many as fit" included."""
        return bool(self.model_fields_set & set(self.lengths()))

    def sampling(self, index: int = 0) -> Sampling:
        """Of the index-th answer. What is not given is as by default; a seed is drawn (-1 asks for that)."""
        names = {"temperature", "top_p", "top_k", "min_p", "typical_p"}
        given: dict[str, Any] = self.model_dump(include=names, exclude_none=True)
        seed = secrets.randbits(63) if self.seed in (None, -1) else self.seed + index
        return Sampling(seed=(seed + 2**63) % 2**64 - 2**63, **given)

    def reuses(self) -> bool:
        """Whether a prompt may go on from what an earlier one left, and later ones from it. Last digits then depend on
        how that was read: who gives a seed wants the same again, so only if asked for. Who gives a salt shares nothing:
        nobody is to find out what they asked."""
        if self.cache_salt:
            return False
        return self.seed in (None, -1) if self.cache_prompt is None else self.cache_prompt

    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]

    def biases(self) -> dict[int, float]:
        """What is added to tokens' logits; llama-server's false bans one."""
        pairs = self.logit_bias.items() if isinstance(self.logit_bias, dict) else self.logit_bias
        return {token: -math.inf if bias is False else bias for token, bias in pairs}

    def penalties(self) -> Penalties:
        """Against tokens that came already."""
        return Penalties(
            self.frequency_penalty,
            self.presence_penalty,
            self.repetition_penalty,
            self.repeat_penalty,
            self.repeat_last_n,
        )

    def schema_wanted(self) -> Mapping[str, Any] | None:
        """The JSON schema that the answer has to keep, if any. Refused for a format that is none."""
        return grammar.wanted(self.response_format, self.json_schema or None)

    @abstractmethod
    def n_logprobs(self) -> int | None:
        """How many alternatives of each token the client wants to see; None: not even the token's own probability."""


class ChatBody(Body):
    """Front ends send `tools` with every chat. R1's template has no place for them, so the model answers as without,
    and a call cannot be required (`serving/prompts.py`)."""

    neutral = CHAT_NEUTRAL

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Length = None
    logprobs: bool = False
    top_logprobs: Annotated[Int, Field(ge=0, le=20)] = 0
    tools: Annotated[list[dict[str, Any]], Field(max_length=128)] = []
    tool_choice: Literal["auto", "none", "required"] | ToolChoice = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    enable_thinking: bool | None = None
    thinking: bool | Thinking | None = None
    think: bool | None = None
    reasoning_effort: str | None = None
    reasoning_format: Literal["none", "auto", "deepseek"] = "auto"  # llama-server's
    separate_reasoning: bool = False  # SGLang's

    @model_validator(mode="after")
    def _logprobs_first(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise ValueError(f"top_logprobs {self.top_logprobs} needs logprobs true")
        if self.requires_call() and not self.tools:
            raise ValueError("tool_choice requires a call, and there are no tools")
        if self.requires_call() and (self.schema_wanted() is not None or self.ignore_eos or self.min_tokens):
            raise ValueError(
                "tool_choice that requires a call says what the answer is: leave response_format, ignore_eos and "
                "min_tokens out"
            )
        return self

    def requires_call(self) -> bool:
        """Whether the answer has to be a call of a tool."""
        return self.tool_choice not in ("auto", "none")

    def tool_required(self) -> str | None:
        """The tool that has to be called; None: any."""
        return self.tool_choice.function.name if isinstance(self.tool_choice, ToolChoice) else None

    def lengths(self) -> tuple[str, ...]:
        """As `Body`."""
        return "max_completion_tokens", "max_tokens", "n_predict"

    def n_logprobs(self) -> int | None:
        """As `Body`."""
        return self.top_logprobs if self.logprobs else None

    def parts_reasoning(self, tools: bool, by_default: bool) -> bool:
        """Whether reasoning goes to a field of its own. tools: the model was told of some; then, and in answers of
        JSON, content is what a program reads. by_default: what the server does."""
        if self.reasoning_format == "auto":
            return self.separate_reasoning or by_default or tools or self.schema_wanted() is not None
        return self.separate_reasoning or self.reasoning_format == "deepseek"

    def thinks(self) -> bool | None:
        """Whether the client wants reasoning, by any of the names of that switch; None: it does not say."""
        thinking = self.thinking
        if isinstance(thinking, Thinking):
            thinking = {"enabled": True, "disabled": False}.get(thinking.type)
        given = {self.enable_thinking, thinking, self.think} - {None}
        if len(given) > 1:
            raise Refused(400, "enable_thinking, thinking and think contradict each other", param="thinking")
        return next(iter(given), None)


class CompletionBody(Body):
    """prompt: text, or the ids of its tokens; or a list of either."""

    neutral = COMPLETION_NEUTRAL

    prompt: (
        str
        | Ids
        | Annotated[list[str], Field(min_length=1, max_length=MAX_CHOICES)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MAX_CHOICES)]
    )
    max_tokens: LengthOrNone = None  # 0: the prompt is only read, for its log probabilities
    n_predict: LengthOrNone = None
    echo: bool = False
    logprobs: Annotated[Int, Field(ge=0, le=20)] | None = None

    def n_logprobs(self) -> int | None:
        """As `Body`."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """A million small lists would be walked through again and again, which takes ten times as long as they do."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _check_amount(given: dict[str, Any], context: int) -> None:
    """Refused for more than fits a context of so many tokens, before each of it is looked at: that stops all others."""
    messages, prompt = given.get("messages"), given.get("prompt")
    for field, most in (("logit_bias", MAX_BIASES), ("stop_token_ids", MAX_BIASES), ("stop", 16), ("bad_words", 64)):
        if isinstance(given.get(field), dict | list) and len(given[field]) > most:
            raise Refused(400, f"{field}: {len(given[field])} are more than {most}", param=field)
    if isinstance(messages, list):
        parts = (len(m["content"]) for m in messages if isinstance(m, dict) and isinstance(m.get("content"), list))
        if len(messages) + sum(parts) > context:
            raise Refused(
                400,
                f"messages: {len(messages)} of them and their parts do not fit the context of {context} tokens",
                "context_length_exceeded",
                param="messages",
            )
    if isinstance(tokens := given.get("tokens"), list) and len(tokens) > context:
        raise Refused(400, f"tokens: {len(tokens)} are more than the context of {context}", param="tokens")
    if isinstance(prompt, list):
        if len(prompt) > MAX_CHOICES and not isinstance(prompt[0], int):
            raise Refused(400, f"prompt: {len(prompt)} prompts are more than {MAX_CHOICES} answers", param="prompt")
        longest = max([len(prompt) * isinstance((prompt or [0])[0], int), *map(len, filter(_is_list, prompt))])
        if longest > context:
            raise Refused(
                400,
                f"{longest} prompt tokens do not fit the context of {context}",
                "context_length_exceeded",
                param="prompt",
            )


def _is_list(value: Any) -> bool:
    return isinstance(value, list)


def parse(data: bytes, kind: type[Parsed], context: int) -> Parsed:
    """A body of that kind. context: tokens of a sequence. Refused for what is no JSON object, for a field that would
    have to be ignored, and for a wrong value: by the field's name."""
    try:
        with _no_collection():
            given = pydantic_core.from_json(data, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(400, f"Invalid JSON: {error}") from None
    if not isinstance(given, dict):
        raise Refused(400, "Invalid JSON: a request is an object")
    _check_amount(given, context)
    try:
        return kind.model_validate(screen(given, kind.model_fields, kind.neutral))
    except ValidationError as error:
        errors = error.errors(include_url=False)
        worst = max(errors, key=lambda each: len(each["loc"]))  # of a union: the kind that came closest
        where = ".".join(str(each) for each in worst["loc"] if str(each) not in KINDS and "[" not in str(each))
        what = worst["msg"].removeprefix("Value error, ")
        field = str(worst["loc"][0]) if worst["loc"] else what.partition(" ")[0]
        if worst["type"] == "extra_forbidden":
            what = f"{shown(worst['input'])}: this server knows no such field; leave it out"
        elif where and worst["type"] != "missing":
            what += f", not {shown(worst['input'])}"
        raise Refused(400, f"{where}: {what}" if where else what, param=field) from None
