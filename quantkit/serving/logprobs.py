"""Log probabilities of tokens in the two forms of OpenAI's API."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from quantkit.serving.logits import Chance


def _byte_letters() -> dict[str, int]:
    """The letter by which byte-level BPE writes each byte (GPT-2's `bytes_to_unicode`) -> the byte."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


LETTERS = _byte_letters()


@lru_cache(1 << 18)  # of a vocabulary; thousands of a prompt's tokens are told at once
def shown(tokenizer: Tokenizer, token: int) -> tuple[str, tuple[int, ...]]:
    """A token's text (U+FFFD for pieces of characters) and bytes."""
    text = tokenizer.decode([token], skip_special_tokens=False)
    name = tokenizer.id_to_token(token) or ""
    if "\ufffd" in text and all(letter in LETTERS for letter in name):
        return text, tuple(LETTERS[letter] for letter in name)
    return text, tuple(text.encode())


def of_chat(tokenizer: Tokenizer, chances: Sequence[Chance]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/chat/completions."""

    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        text, data = shown(tokenizer, token)
        return {"token": text, "logprob": logprob, "bytes": list(data)}

    content = [
        entry(chance.token, chance.logprob) | {"top_logprobs": [entry(*each) for each in chance.best]}
        for chance in chances
    ]
    return {"content": content, "refusal": None}


def of_completion(tokenizer: Tokenizer, chances: Sequence[Chance], starts: Sequence[int]) -> dict[str, Any]:
    """`logprobs` of a choice of /v1/completions. starts: where each token's text begins in the answer. A first token
    has none: null."""
    tops = [
        None if chance.logprob is None else {shown(tokenizer, token)[0]: logprob for token, logprob in reversed(best)}
        for chance in chances
        for best in (chance.best,)
    ]
    return {
        "tokens": [shown(tokenizer, chance.token)[0] for chance in chances],
        "token_logprobs": [chance.logprob for chance in chances],
        "top_logprobs": tops if any(tops) else None,
        "text_offset": list(starts),
    }
