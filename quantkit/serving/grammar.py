"""Answers that are JSON, by a schema if the request has one: which tokens may come next is llguidance's business.

The library is an extra. It bounds most of its work, by steps that it counts: a schema that needs more is refused, and
an answer that comes to need more ends. What it does before it counts is tried in a process that can be ended
(`serving/trial.py`).
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError, needs
from quantkit.serving import trial
from quantkit.serving.forced import Wanted, Writer, lark
from quantkit.serving.logits import Unanswerable
from quantkit.serving.refusals import Refused
from quantkit.serving.renderer import INHERITED

LONGEST = 64 << 10  # characters of a schema
MOST_STATES = 50_000  # of the lexer of one answer, about 2 kB each
SPACE = r"[ \n\t]{0,40}"  # a small model that may write spaces without end, does
CALL_SPACE = r"[ \n\t]{0,12}"  # in arguments of calls
ANY_OBJECT = {"type": "object"}
TOO_HARD = (
    "the schema takes more than a second, or too much memory, to be made ready; a smaller multipleOf, or fewer "
    "patterns that hold at once, take less"
)
PREFIX = "response_format: "
THOUGHT = "</think>"
SECONDS = 3.0  # for trying a schema, on a busy machine
TRIED = 256  # schemas that are remembered to be harmless
TAIL = 24  # tokens at the end of an answer in which the end of its reasoning is looked for


def wanted(response_format: Mapping[str, Any], json_schema: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The schema that a body asks for, by OpenAI's `response_format` (also with llama-server's `schema` in it), or by
    llama-server's `json_schema`; None: any text. Refused for what is neither, and for both."""
    kind = response_format.get("type", "text")
    if kind not in ("text", "json_object", "json_schema"):
        raise _refused("type must be text, json_object or json_schema")
    found = None
    if kind == "json_schema":
        told = response_format.get("json_schema")
        found = told.get("schema") if isinstance(told, dict) else None
        if not isinstance(found, dict):
            raise _refused("json_schema.schema must be an object")
    elif kind == "json_object":
        found = response_format.get("schema", ANY_OBJECT)
        if not isinstance(found, dict):
            raise _refused("schema must be an object")
    if unknown := set(response_format) - {"type", "json_schema", "schema"}:
        raise _refused(f"{', '.join(sorted(unknown))}: this server knows no such field; leave it out")
    if found is not None and json_schema is not None:
        raise _refused("and json_schema contradict each other")
    return found if json_schema is None else json_schema


def _refused(what: str) -> Refused:
    return Refused(400, f"{PREFIX}{what}", "invalid_value", param="response_format")


@dataclass
class Constraint:
    """Of one answer. matcher: llguidance's. thinking: the answer begins with reasoning, which is free text; the
    constraint begins after it."""

    matcher: Any
    tokenizer: Tokenizer
    thinking: bool = False

    def __post_init__(self) -> None:
        self.tail: list[int] = []

    def allowed(self, n_vocab: int) -> np.ndarray | None:
        """Which tokens can come next: uint8 [n_vocab], 0 for those that cannot; None: all."""
        if self.thinking:
            return None
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self._check()
        found = np.unpackbits(bits, count=min(n_vocab, 8 * len(bits)), bitorder="little")
        return np.pad(found, (0, n_vocab - len(found))) if len(found) < n_vocab else found

    def take(self, token: int) -> None:
        """What came."""
        if not self.thinking:
            self.matcher.consume_token(token)
            return self._check()
        self.tail = [*self.tail, token][-TAIL:]
        self.thinking = THOUGHT not in self.tokenizer.decode(self.tail, skip_special_tokens=False)

    def _check(self) -> None:
        if self.matcher.is_error():
            raise Unanswerable(f"the answer's format: {self.matcher.get_error().splitlines()[0]}")


class Grammars:
    """Makes constraints for answers in tokens of this tokenizer; from any thread. ends: ids that end an answer."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int, ends: Sequence[int]):
        self.tokenizer, self.n_vocab, self.ends = tokenizer, n_vocab, list(ends)
        self.lock = threading.Lock()
        self.vocabulary: Any = None
        self.tried: dict[str, None] = {}  # the last one last

    def of(self, schema: Mapping[str, Any]) -> Any:
        """llguidance's matcher, of which each answer takes a copy. Refused for a schema that is none, that the library
        does not know, or that needs too much; and if the library is not installed."""
        text = json.dumps(schema)
        if len(text) > LONGEST:
            raise _refused(f"a schema of {len(text):,} characters is longer than {LONGEST:,}")
        return self._matcher(
            [text], lambda made: made.grammar_from_json_schema(text, overrides={"whitespace_pattern": SPACE})
        )

    def of_calls(self, asked: Wanted) -> Any:
        """The same for an answer that has to be calls of tools."""
        schemas = [json.dumps(schema) for schema in asked.tools.values()]
        try:
            if sum(map(len, schemas)) > LONGEST:
                raise _refused(f"parameters of {sum(map(len, schemas)):,} characters are longer than {LONGEST:,}")
            text = lark(asked, Writer(self.tokenizer.token_to_id, CALL_SPACE))
            return self._matcher(schemas, lambda made: made.grammar_from_lark(text))
        except Refused as error:
            what = error.detail.removeprefix(PREFIX)
            raise Refused(error.status_code, f"tools: {what}", error.code, param="tools") from None

    def _matcher(self, schemas: Sequence[str], grammar: Callable[[Any], str]) -> Any:
        """schemas: what the grammar has of JSON, to be tried before it is made."""
        try:
            with needs("grammar"):
                import llguidance
        except QuantkitError as error:
            raise _refused(str(error)) from None
        for schema in schemas:
            self._try(schema)
        with self.lock:
            if self.vocabulary is None:
                self.vocabulary = llguidance.LLTokenizer(
                    self.tokenizer.to_str(), n_vocab=self.n_vocab, eos_token=self.ends
                )
        limits = llguidance.LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        try:
            made = grammar(llguidance.LLMatcher)
            matcher = llguidance.LLMatcher(self.vocabulary, made, log_level=0, limits=limits)
            if not matcher.is_error():
                matcher.compute_bitmask()  # some find out here that they need too much
        except ValueError as error:
            raise _refused(str(error)) from None
        if matcher.is_error():
            raise _refused(matcher.get_error().splitlines()[0][:300])
        return matcher

    def _try(self, text: str) -> None:
        with self.lock:
            known = text in self.tried
        if not known:
            _try(text)
        with self.lock:
            self.tried.pop(text, None)
            self.tried[text] = None
            if len(self.tried) > TRIED:
                del self.tried[next(iter(self.tried))]

    def constraint(self, matcher: Any, thinking: bool) -> Constraint:
        """For one answer."""
        return Constraint(matcher.deep_copy(), self.tokenizer, thinking)


def _try(text: str) -> None:
    """Refused for a schema that takes too long, or too much memory, to be made ready."""
    try:
        done = subprocess.run(
            [sys.executable, "-P", trial.__file__],
            input=json.dumps({"schema": text, "space": SPACE, "states": MOST_STATES}).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in INHERITED if name in os.environ},
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise _refused(TOO_HARD) from None
    except OSError as error:
        raise Refused(503, f"the process that tries schemas does not start ({error.strerror})") from None
    if done.returncode:
        raise (
            _refused(TOO_HARD) if done.returncode < 0 else Refused(503, "the process that tries schemas does not start")
        )
