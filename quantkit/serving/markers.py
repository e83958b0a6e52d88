"""Which control tokens of a prompt its template wrote, and which stand in what people wrote and are only text.

Before a template is rendered, characters of people's strings are replaced by stand-ins: characters of the private use
area that occur nowhere else. After it, a control token with a stand-in is not the template's.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, islice
from typing import Any, TypeVar

import gguf
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.models.tokenizer import tokenize, tokenizer_of_gguf
from quantkit.serving.renderer import TooLong

STAND_INS = (range(0xE000, 0xF900), range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))  # Unicode's private use areas
REASONING = re.compile("(</?think>)")  # what a model writes in its answers, and templates look for in them
SURE = frozenset("/_")  # characters that much text has, and no token consists of

Nested = TypeVar("Nested")


def strings(value: Any) -> Iterator[str]:
    """All of a nest of lists and dicts, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from chain.from_iterable(strings(each) for each in chain(value, value.values()))
    elif isinstance(value, Sequence):
        yield from chain.from_iterable(map(strings, value))


class Markers:
    """The control tokens of a file with this metadata, and others that it adds to its vocabulary in angle brackets."""

    def __init__(self, metadata: Mapping[str, Any], tokenizer: Tokenizer):
        self.metadata, self.tokenizer = metadata, tokenizer
        tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
        self.ids = {
            token: i
            for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
            if token and (kind == gguf.TokenType.CONTROL or (kind == gguf.TokenType.USER_DEFINED and _bracketed(token)))
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        ends = {character for token in self.ids for character in token[:2] + token[-2:]}
        self.edges = {c for c in ends if not c.isalnum() and not c.isspace()} - SURE
        self.edges |= {token[0] for token in self.ids if not self.edges & set(token)}

    @cached_property
    def longest(self) -> int:
        """Bytes of the file's longest token: no text of n tokens has more than n times that."""
        tokens, types = self.metadata["tokenizer.ggml.tokens"], self.metadata["tokenizer.ggml.token_type"]
        normal = gguf.TokenType.NORMAL  # a letter for each byte
        return max(len(token if kind == normal else token.encode()) for token, kind in zip(tokens, types, strict=True))

    @cached_property
    def plain(self) -> Tokenizer:
        """The file's tokenizer without them."""
        types = list(self.metadata["tokenizer.ggml.token_type"])
        for i in self.ids.values():
            types[i] = int(gguf.TokenType.NORMAL)
        return tokenizer_of_gguf({**self.metadata, "tokenizer.ggml.token_type": types}, family.PRE)

    def may_hide(self, value: Any) -> bool:
        """Whether some string has a character of theirs."""
        return any(self.edges & set(text) for text in strings(value))

    def hidden(self, value: Any) -> "Hidden":
        """A way to hide characters in strings of `value`; no stand-in occurs in any of them."""
        text = "\0".join(strings(value))
        taken = set(text)
        free = (c for c in map(chr, chain(*STAND_INS)) if c not in taken and _escaped(c) not in text)
        needed = sorted({*self.edges, *(token[0] for token in self.ids)})
        stand_ins = list(islice(free, len(needed)))
        if len(stand_ins) < len(needed):
            raise QuantkitError("the text consists of all of Unicode's private use characters")
        return Hidden(self, dict(zip(needed, stand_ins, strict=True)))

    def tokenize(self, prompt: "Prompt") -> list[int]:
        """Ids without BOS."""
        own = list(self.pattern.finditer(prompt.own))
        if [each.span() for each in own] == [each.span() for each in self.pattern.finditer(prompt.text)]:
            return tokenize(self.tokenizer, prompt.text)
        assert prompt.hide
        ids, at = list[int](), 0
        for marker in own:
            ids += self._plain(prompt.hide.shown(prompt.hidden[at : marker.start()]))
            ids.append(self.ids[marker[0]])
            at = marker.end()
        return ids + self._plain(prompt.hide.shown(prompt.hidden[at:]))

    def _plain(self, text: str) -> list[int]:
        return tokenize(self.plain, text) if text else []


def _escaped(character: str) -> str:
    """In JSON of ASCII."""
    return json.dumps(character)[1:-1]


def _bracketed(token: str) -> bool:
    return len(token) > 2 and token[0] == "<" and token[-1] == ">"


class Hidden:
    """Characters and their stand-ins, for one prompt."""

    def __init__(self, markers: Markers, stand_ins: Mapping[str, str]):
        self.markers, self.stand_ins = markers, stand_ins
        self.edges = {ord(c): stand_in for c, stand_in in stand_ins.items() if c in markers.edges}
        self.back = {ord(stand_in): c for c, stand_in in stand_ins.items()}

    def strings(self, value: Nested, whole: bool) -> Nested:
        """A nest of lists and dicts with hidden characters. whole: only of whole control tokens."""
        return self._nest(value, whole, own=False)

    def shown(self, text: str) -> str:
        """What was hidden is there again, also where a template made JSON of it."""
        for stand_in, character in self.back.items() if "\\u" in text else ():
            text = text.replace(_escaped(chr(stand_in)), character)
        return text.translate(self.back)

    def _nest(self, value: Any, whole: bool, own: bool) -> Any:
        """own: the model wrote it, in whose words reasoning is marked."""
        if isinstance(value, str):
            parts = REASONING.split(value) if own else [value]  # every second one is a mark
            return "".join(part if i % 2 else self._text(part, whole) for i, part in enumerate(parts))
        if isinstance(value, Mapping):
            own = own or value.get("role") == "assistant"
            return {self._nest(key, whole, False): self._nest(each, whole, own) for key, each in value.items()}
        return [self._nest(each, whole, own) for each in value] if isinstance(value, list | tuple) else value

    def _text(self, text: str, whole: bool) -> str:
        if not whole:
            return text.translate(self.edges)
        return self.markers.pattern.sub(lambda found: self.stand_ins[found[0][0]] + found[0][1:], text)


@dataclass(frozen=True)
class Prompt:
    """A text to be continued. hidden: with stand-ins for what only looks like control tokens, if there may be any."""

    text: str
    hidden: str = ""
    hide: Hidden | None = None

    @property
    def own(self) -> str:
        """The text, but that people's control tokens are none in it."""
        return self.hidden if self.hide else self.text


def tokenize_prompt(markers: Markers, prompt: Prompt, bos: int, capacity: int) -> list[int]:
    """Token ids beginning with exactly one BOS, whether or not the prompt (a rendered template) has it.
    `renderer.TooLong` for a text that no tokens of a context of `capacity` can be, before it is tokenized."""
    if (size := len(prompt.text.encode())) > capacity * markers.longest:
        raise TooLong(
            f"{size:,} bytes of text do not fit the context of {capacity} tokens: none is longer than "
            f"{markers.longest} bytes"
        )
    ids = markers.tokenize(prompt)
    return ids if ids[:1] == [bos] else [bos, *ids]
