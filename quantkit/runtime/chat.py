"""Text in, text out: prompt, chat template, generation and streaming decode."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
from tokenizers import Tokenizer

from quantkit.arch import tokenizer as tokenizers
from quantkit.errors import QuantkitError
from quantkit.runtime.generate import Model, Sampling, generate
from quantkit.runtime.sources import GGUFSource

CHARACTER_TOKENS = 4  # a UTF-8 character has at most that many bytes, and every token at least one


def apply_template(metadata: Mapping[str, Any], messages: list[dict[str, str]]) -> str:
    """The file's own chat template, in jinja2's sandbox: templates come from strangers."""
    if "tokenizer.chat_template" not in metadata:
        raise QuantkitError("this file has no chat template; run without --chat")
    tokens = metadata["tokenizer.ggml.tokens"]
    names = {f"{k}_token": tokens[metadata.get(f"tokenizer.ggml.{k}_token_id", 0)] for k in ("bos", "eos")}
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    try:
        template = environment.from_string(metadata["tokenizer.chat_template"])
        return template.render(messages=messages, add_generation_prompt=True, **names)
    except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
        raise QuantkitError(f"the file's chat template fails: {error}") from None


def encode_prompt(tokenizer: Tokenizer, text: str, bos: int) -> list[int]:
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
        self.tokens.append(token)
        text = self.tokenizer.decode(self.tokens, skip_special_tokens=False)
        if text.endswith("\ufffd") and len(self.tokens) < CHARACTER_TOKENS:
            return ""
        self.tokens.clear()
        return self._certain(text)

    def rest(self) -> str:
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


def converse(path: Path, prompt: str, chat: bool, n_tokens: int, how: Sampling, device: str) -> Iterator[str]:
    """The prompt's continuation, piece by piece as it is generated."""
    source = GGUFSource(path, device)
    tokenizer = source.tokenizer()
    text = apply_template(source.file.metadata, [{"role": "user", "content": prompt}]) if chat else prompt
    pieces = Pieces(tokenizer)
    for token in generate(Model(source), encode_prompt(tokenizer, text, source.config.bos), n_tokens, how):
        yield pieces.add(token)
    yield pieces.rest()
