"""Text of an answer, piece by piece: characters made whole, stop strings left out, reasoning told apart."""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from tokenizers import Tokenizer

UNFINISHED_TOKENS = 16  # that many tokens without the end of a character are no text: shown as they are


class Pieces:
    """Text of tokens as they come: `add` returns what is certain, `rest` what is left at the end.

    A character may take several tokens, so an unfinished one waits; a text that may become one of the `stop` strings
    waits too. `stopped` once a stop string was met; it and all after it are left out. n_least: tokens before which
    stop strings are text like any other; skip_special: control tokens are no text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), n_least: int = 0, skip_special: bool = False):
        self.tokenizer, self.stop, self.n_least, self.skip_special = tokenizer, tuple(stop), n_least, skip_special
        self.starts: list[int] = []  # of each token: characters of text before it
        self.n_shown = 0  # characters that were returned
        self.tokens: list[int] = []
        self.held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """Text that is certain now; "" if there is none."""
        self.tokens.append(token)
        self.starts.append(self.n_shown + len(self.held))
        text = self._decoded()
        if text.endswith("\ufffd") and len(self.tokens) < UNFINISHED_TOKENS:
            return ""
        self.tokens.clear()
        return self._certain(text)

    def rest(self) -> str:
        """All that was held back, as it is."""
        text = self._certain(self._decoded()) + self.held
        self.tokens.clear()
        self.n_shown += len(self.held)
        self.held = ""
        return text

    def tokens_shown(self) -> int:
        """Tokens whose text, or some of it, was returned."""
        return bisect_left(self.starts, self.n_shown)

    def _decoded(self) -> str:
        return self.tokenizer.decode(self.tokens, skip_special_tokens=self.skip_special)

    def _certain(self, text: str) -> str:
        found = "" if self.stopped else self._unstopped(text)
        self.n_shown += len(found)
        return found

    def _unstopped(self, text: str) -> str:
        text, self.held = self.held + text, ""
        if len(self.starts) <= self.n_least:
            return text
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
