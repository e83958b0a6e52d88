"""Text in, text out: prompt, chat template, generation and streaming decode."""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.models import tokenizer as tokenizers
from quantkit.runtime.generate import Engine, Sampling, generate
from quantkit.runtime.sources.weights import GGUFWeights
from quantkit.sizes import gib

UNFINISHED_TOKENS = 16  # that many tokens without the end of a character are no text: shown as they are


def apply_template(metadata: Mapping[str, Any], messages: list[dict[str, str]], **given: Any) -> str:
    """The file's own chat template, in jinja2's sandbox: templates come from strangers. given: what else it may name,
    such as `tools`."""
    if "tokenizer.chat_template" not in metadata:
        raise QuantkitError("this file has no chat template; run without --chat")
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {f"{k}_token": tokens[metadata.get(f"tokenizer.ggml.{k}_token_id", 0)] for k in ("bos", "eos")}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(metadata["tokenizer.chat_template"])
        return template.render(messages=messages, add_generation_prompt=True, **names, **given)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise QuantkitError(f"the file's chat template fails: {error}") from None


def tokenize_prompt(tokenizer: Tokenizer, text: str, bos: int) -> list[int]:
    """Token ids beginning with exactly one BOS, whether or not the text (a rendered template) has it."""
    ids = tokenizers.encode(tokenizer, text)
    return ids if ids[:1] == [bos] else [bos, *ids]


class Pieces:
    """Text of tokens as they come: `add` returns what is certain, `rest` what is left at the end.

    A character may take several tokens, so an unfinished one waits; a text that may become one of the `stop` strings
    waits too. `stopped` once a stop string was met; it and all after it are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain now; "" if there is none."""
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self.tokens) < UNFINISHED_TOKENS:
            return ""
        self.tokens.clear()
        return self._certain(text)

    def rest(self) -> str:
        """All that was held back, as it is."""
        text = self._certain(self.tokenizer.decode(self.tokens, skip_special_tokens=False)) + self.held
        self.tokens.clear()
        self.held = ""
        return text

    def _certain(self, text: str) -> str:
        if self.stopped:
            return ""
        text, self.held = self.held + text, ""
        if found := [at for stop in self.stop if (at := text.find(stop)) >= 0]:
            self.stopped = True
            return text[: min(found)]
        for size in range(min(len(text), max(map(len, self.stop), default=1) - 1), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                self.held = text[-size:]
                return text[:-size]
        return text


def thoughts(pieces: Iterable[str], thinking: bool) -> Iterator[tuple[str, bool]]:
    """(text, whether it is reasoning): the tags <think> and </think> count as reasoning."""
    text = ""
    for piece in chain(pieces, [None]):
        text += piece or ""
        while (at := text.find(tag := "</think>" if thinking else "<think>")) >= 0:
            end = at + len(tag) if thinking else at
            yield text[:end], thinking
            text, thinking = text[end:], not thinking
            if thinking:
                yield tag, True
                text = text.removeprefix(tag)
        unsure = 0 if piece is None else next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
        yield text[: len(text) - unsure], thinking
        text = text[len(text) - unsure :]


class Conversation:
    """Turns with one model. What the cache holds of earlier turns is not computed again."""

    def __init__(self, weights: GGUFWeights, engine: Engine, how: Sampling):
        """engine: of these weights; its slot 0 is taken."""
        self.residency = weights.residency
        self.metadata, self.tokenizer, self.how = weights.file.metadata, weights.tokenizer(), how
        self.engine = engine
        self.messages: list[dict[str, str]] = []
        self.cached: list[int] = []  # tokens in the cache
        self.speed = ""

    def ask(self, text: str, n_tokens: int) -> Iterator[tuple[str, bool]]:
        """A person's turn -> pieces of the answer, and whether each is reasoning. Both turns are kept in `messages`
        once the answer is complete (or left early)."""
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = apply_template(self.metadata, messages)
        thinking = prompt.endswith("<think>\n")
        answer = ["<think>\n"] if thinking else []
        try:
            if thinking:
                yield answer[0], True
            for piece, thought in thoughts(self.complete(prompt, n_tokens), thinking):
                answer.append(piece)
                yield piece, thought
        finally:
            if len(answer) > thinking:  # a question that does not fit must not stand in the way of the next
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def complete(self, text: str, n_tokens: int) -> Iterator[str]:
        """The text's continuation, piece by piece. `speed` then says how fast it was."""
        prompt = tokenize_prompt(self.tokenizer, text, self.engine.config.bos)
        same = next((i for i, (a, b) in enumerate(zip(prompt, self.cached, strict=False)) if a != b), len(self.cached))
        begin = min(same, len(prompt) - 1)
        pieces, times = Pieces(self.tokenizer), [time.perf_counter()]
        read = self.residency.read if self.residency else 0
        self.cached = self.cached[:begin]
        last: list[int] = []
        for token in generate(self.engine, prompt, n_tokens, self.how, begin):
            self.cached += last or prompt[begin:]  # in the cache for certain: a token came after it
            last = [token]
            times.append(time.perf_counter())
            yield pieces.add(token)
        yield pieces.rest()
        n = len(times) - 1
        self.speed = f"prompt {len(prompt) - begin:,} tokens"
        if n:
            self.speed += f", {(len(prompt) - begin) / (times[1] - times[0]):,.1f} tok/s"
        if n > 1:
            self.speed += f" · answer {n:,} tokens, {(n - 1) / (times[-1] - times[1]):,.1f} tok/s"
        if self.residency:
            self.speed += f" · {gib(self.residency.read - read)} of experts read"
