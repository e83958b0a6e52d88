"""Text in, text out: the prompt by the file's chat template, and a conversation."""

import time
from collections.abc import Iterator, Mapping
from typing import Any

from quantkit.progress import say
from quantkit.runtime.generate import Engine, Sampling, generate
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.serving.markers import Markers, Prompt, tokenize_prompt
from quantkit.serving.pieces import Pieces, thoughts
from quantkit.serving.template import ChatTemplate, opening
from quantkit.sizes import both_units

LONG = 1024  # tokens of a prompt: on a CPU they may take minutes, in which nothing is to be seen


class Conversation:
    """Turns with one model. What the cache holds of earlier turns is not computed again."""

    def __init__(self, weights: GGUFWeights, engine: Engine, how: Sampling, given: Mapping[str, Any] | None = None):
        """engine: of these weights; its slot 0 is taken. given: variables of the template, such as `thinking`."""
        self.residency = weights.residency
        self.engine, self.how, self.metadata = engine, how, weights.file.metadata
        self.tokenizer = weights.tokenizer()
        self.markers = Markers(self.metadata, self.tokenizer)
        self.given = dict(given or {})
        self.messages: list[dict[str, str]] = []
        self.cached: list[int] = []  # tokens in the cache
        self.speed = ""
        self.used = 0  # tokens of the last turn and all before it

    @property
    def context(self) -> str:
        """How full it is, in words."""
        return f"context {self.used:,} of {self.engine.capacity:,} tokens"

    def ask(self, text: str, n_tokens: int) -> Iterator[tuple[str, bool]]:
        """A person's turn -> pieces of the answer, and whether each is reasoning. Both turns are kept in `messages`
        once the answer is complete (or left early)."""
        messages = [*self.messages, {"role": "user", "content": text}]
        most = self.engine.capacity * self.markers.longest
        prompt = ChatTemplate(self.metadata, most=most).prompt(messages, self.markers, **self.given)
        begun = opening(prompt.own)
        answer = [begun] if begun else []
        try:
            if begun:
                yield begun, True
            for piece, thought in thoughts(self.complete(prompt, n_tokens), bool(begun)):
                answer.append(piece)
                yield piece, thought
        finally:
            if len(answer) > bool(begun):  # a question that does not fit must not stand in the way of the next
                self.messages = [*messages, {"role": "assistant", "content": "".join(answer)}]

    def complete(self, text: str | Prompt, n_tokens: int) -> Iterator[str]:
        """The text's continuation, piece by piece. `speed` then says how fast it was."""
        whole = Prompt(text) if isinstance(text, str) else text
        prompt = tokenize_prompt(self.markers, whole, self.engine.config.bos, self.engine.capacity)
        same = next((i for i, (a, b) in enumerate(zip(prompt, self.cached, strict=False)) if a != b), len(self.cached))
        begin = min(same, len(prompt) - 1)
        pieces, times = Pieces(self.tokenizer), [time.perf_counter()]
        read = self.residency.read if self.residency else 0
        if len(prompt) - begin >= LONG and len(prompt) < self.engine.capacity:
            say(f"reading {len(prompt) - begin:,} tokens")
        self.cached = self.cached[:begin]
        last: list[int] = []
        for token in generate(self.engine, prompt, n_tokens, self.how, begin):
            self.cached += last or prompt[begin:]  # in the cache for certain: a token came after it
            last = [token]
            times.append(time.perf_counter())
            self.used = len(prompt) + len(times) - 1
            yield pieces.add(token)
        yield pieces.rest()
        n = len(times) - 1
        self.speed = f"prompt {len(prompt) - begin:,} tokens"
        if n:
            self.speed += f", {(len(prompt) - begin) / (times[1] - times[0]):,.1f} tok/s"
        if n > 1:
            self.speed += f" · answer {n:,} tokens, {(n - 1) / (times[-1] - times[1]):,.1f} tok/s"
        if len(prompt) + n >= self.engine.capacity:
            self.speed += f" · the context of {self.engine.capacity:,} tokens is full"
        if self.residency:
            self.speed += f" · {both_units(self.residency.read - read)} of experts read"
