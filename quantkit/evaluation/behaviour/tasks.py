"""What is asked, in tokens: the same of a file and of its original."""

import random
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.evaluation.behaviour.items import Amount, Item, Kind, Mode
from quantkit.progress import say
from quantkit.runtime.generate import Sampling
from quantkit.serving.markers import Markers, Prompt, tokenize_prompt
from quantkit.serving.template import ChatTemplate, opening

GREEDY = Sampling(temperature=0.0)
SUMS, SHOTS = 40, 6  # sums that are asked for, and that each shows before
SHORT = 32  # tokens of an answer that is one number or one line
DEPTHS = (0.1, 0.5, 0.9)  # where in its text the needle lies
LENGTHS = (0.25, 0.5, 1.0)  # of the context


@cache
def prompts() -> dict[str, list[str]]:
    """Those that come along."""
    return tomllib.loads(Path(__file__).with_name("prompts.toml").read_text(encoding="utf-8"))


class Tasks:
    """For a file with this metadata."""

    def __init__(self, metadata: Mapping[str, Any], tokenizer: Tokenizer, bos: int, amount: Amount):
        self.metadata, self.tokenizer, self.bos, self.amount = metadata, tokenizer, bos, amount
        self.markers = Markers(metadata, tokenizer)

    def items(self) -> list[Item]:
        """All, those that take longest last."""
        chats = self._chats()
        texts = [("text", self._ids(Prompt(text)), text, False) for text in prompts()["text"]] + chats
        code = [("code", self._ids(Prompt(text)), text, False) for text in prompts()["code"]]
        n = self.amount.continuations
        return [
            *self._sums(),
            *self._short("call", ((text, "") for text in prompts()["calls"])),
            *self._short("needle", self._needles()),
            *self._long(code, -(-n // 10)),
            *self._long(texts, n),
        ]

    def _ids(self, prompt: Prompt) -> tuple[int, ...]:
        return tuple(tokenize_prompt(self.markers, prompt, self.bos, 1 << 20))

    def _chats(self) -> list[tuple[str, tuple[int, ...], str, bool]]:
        made = []
        for text in prompts()["chat"]:
            try:
                prompt = ChatTemplate(self.metadata).prompt([{"role": "user", "content": text}], self.markers)
            except QuantkitError as error:
                say(f"chats are left out: {error}")
                return []
            made.append(("chat", self._ids(prompt), text, bool(opening(prompt.own))))
        return made

    def _long(self, asked: list, n_sampled: int) -> Iterator[Item]:
        for i in range(len(asked) + n_sampled):
            sampled = i >= len(asked)
            kind, ids, lead, begun = asked[(i - len(asked)) % len(asked) if sampled else i]
            seed = i - len(asked)
            mode: Mode = "sampled" if sampled else "greedy"
            how = Sampling(seed=seed) if sampled else GREEDY
            key = f"{kind}/{mode}/{i:05}"
            yield Item(key, kind, mode, ids, self.amount.n_tokens, how, lead, begun=begun)

    def _short(self, kind: Kind, asked: Iterator[tuple[str, str]]) -> Iterator[Item]:
        for i, (text, wanted) in enumerate(asked):
            ids = self._ids(Prompt(text))
            yield Item(f"{kind}/greedy/{i:05}", kind, "greedy", ids, SHORT, GREEDY, text, wanted)

    def _sums(self) -> Iterator[Item]:
        draw = random.Random(0)

        def asked() -> Iterator[tuple[str, str]]:
            for _ in range(SUMS):
                pairs = [(draw.randint(2, 60), draw.randint(2, 39)) for _ in range(SHOTS + 1)]
                (a, b), shown = pairs[-1], "\n".join(f"{a} + {b} = {a + b}" for a, b in pairs[:-1])
                yield f"{shown}\n{a} + {b} =", str(a + b)

        return self._short("sum", asked())

    def _needles(self) -> Iterator[tuple[str, str]]:
        draw, hay = random.Random(1), prompts()["hay"]
        per_sentence = sum(len(self._ids(Prompt(text + " "))) - 1 for text in hay) / len(hay)
        for share in LENGTHS:
            n = int(share * (self.amount.context - 3 * SHORT) / per_sentence)
            for depth in DEPTHS:
                wanted = str(draw.randint(1000, 9999))
                sentences = [draw.choice(hay) for _ in range(max(1, n))]
                sentences.insert(int(depth * len(sentences)), f"The number of the lighthouse is {wanted}.")
                yield " ".join(sentences) + " The number of the lighthouse is", wanted
