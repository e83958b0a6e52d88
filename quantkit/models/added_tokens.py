"""Tokens that only tokenizer_config.json has (`added_tokens_decoder`): transformers adds them to tokenizer.json's."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text_file
from quantkit.formats.safetensors_header import load_object

TOKENIZER, SETTINGS, KEY = "tokenizer.json", "tokenizer_config.json", "added_tokens_decoder"
FLAGS = ("lstrip", "rstrip", "single_word")
"""How an added token is looked for in a text; two files must not differ in it."""


def with_settings(raw: dict[str, Any], folder: Path) -> dict[str, Any]:
    """tokenizer.json (raw) with the tokens that only tokenizer_config.json has.

    QuantkitError, naming the token, if the two contradict each other, or if transformers would number a token otherwise
    than the file does: a new one gets the next free id, whatever stands before it.
    """
    listed = added_in_settings(folder)
    try:
        return _with(raw, listed, f"{folder / SETTINGS}: {KEY}") if listed else raw
    except (TypeError, KeyError, AttributeError) as error:
        raise QuantkitError(f"{folder / TOKENIZER}: not the structure of a BPE tokenizer ({error})") from None


def _with(raw: dict[str, Any], listed: Mapping[str, Any], where: str) -> dict[str, Any]:
    vocab, added = raw["model"]["vocab"], list(raw.get("added_tokens", ()))
    texts = {i: text for text, i in vocab.items()} | {token["id"]: token["content"] for token in added}
    known = {text: i for i, text in texts.items()}
    flags = {token["id"]: token for token in added}
    free = max([len(vocab), *(token["id"] + 1 for token in added)])
    for i, token in _entries(listed, where):
        text = token["content"]
        if texts.get(i) == text:
            _check_flags(token, flags.get(i, {}), f"{where} {i} {text!r}")
        elif i in texts:
            raise QuantkitError(f"{where} {i} is {text!r}, in {TOKENIZER} {texts[i]!r}; correct one of them")
        elif text in known:
            raise QuantkitError(f"{where} {i} is {text!r}, which is {known[text]} in {TOKENIZER}; correct one of them")
        elif i != free:
            raise QuantkitError(f"{where} {i} {text!r} is not in {TOKENIZER}, where {free} is the next; add it there")
        else:
            added.append({"special": False, "normalized": False, **dict.fromkeys(FLAGS, False), **token, "id": i})
            free += 1
    return raw | {"added_tokens": added}


def added_in_settings(folder: Path) -> Mapping[str, Any]:
    """`added_tokens_decoder` of tokenizer_config.json: id -> token. Empty if there is none."""
    path = folder / SETTINGS
    listed = load_object(read_text_file(path, "tokenizer"), str(path)).get(KEY) if path.is_file() else None
    if listed is not None and not isinstance(listed, dict):
        raise QuantkitError(f"{path}: {KEY} is not an object of tokens by id")
    return listed or {}


def _entries(listed: Mapping[str, Any], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """In the order of their ids."""
    for key, token in listed.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise QuantkitError(f"{where}: {key!r:.80} is not a token id")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise QuantkitError(f"{where} {key}: {token!r:.80} is not a token with its content")
    yield from sorted(((int(key), token) for key, token in listed.items()), key=lambda entry: entry[0])


def _check_flags(token: Mapping[str, Any], other: Mapping[str, Any], what: str) -> None:
    for flag in FLAGS:
        if flag in other and bool(token.get(flag)) != bool(other[flag]):
            raise QuantkitError(f"{what}: {flag} is {bool(token.get(flag))}, in {TOKENIZER} {other[flag]}; correct one")
