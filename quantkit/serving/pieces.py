"""Text of an answer, piece by piece: characters made whole, stop strings left out, reasoning told apart."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from tokenizers import Tokenizer

UNFINISHED_TOKENS = 16  # that many tokens without the end of a character are no text: shown as they are


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
