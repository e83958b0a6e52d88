"""tokenizer.json, part by part: what the GGUF's name of a pre-tokenizer says of it, and nothing else.

A GGUF names a pre-tokenizer and lists tokens and merges; whoever reads it adds the rest by that name. Everything that
tokenizer.json says besides (normalizers, other ways to cut, random merges, tokens that swallow spaces) would be lost in
silence, so it is refused by name. What is not known here is never given to the tokenizers library either: an expression
of a stranger's file may take for ever, a replacement all memory, and both end that library in a panic.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.models.patterns import characters_of_bytes
from quantkit.models.tokenizer import WHOLE_WORDS, Patterns, of_json

NO_WORDS = "tokenizer.ggml.pre cannot say that"
PARTS = ("truncation", "padding", "added_tokens", "normalizer", "pre_tokenizer", "post_processor", "decoder", "model")
NEVER_USED: Mapping[
    str, Any
] = {  # text is tokenized whole and alone, as transformers does unless it is asked otherwise
    "truncation": None,
    "padding": None,
    "post_processor": None,  # BOS and EOS are put around a text by the GGUF's own keys
    "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
}
FLAGS = ("single_word", "lstrip", "rstrip")  # of an added token: what it takes of the text around it


def named(raw: Mapping[str, Any], known: Patterns, where: str) -> str:
    """GGUF's name of the pre-tokenizer, one of `known`. QuantkitError, beginning with `where` and naming the part, for
    whatever that name does not say; also for what is not the structure of a tokenizer."""
    try:
        if (kind := raw["model"]["type"]) != "BPE":
            raise QuantkitError(f"{where}: model type {kind!r} is not BPE")
        for what in _unsaid(raw):
            raise QuantkitError(f"{where}: {what} is not supported; {NO_WORDS}")
        splits = tuple(_splits(raw["pre_tokenizer"] or {}, where))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise QuantkitError(f"{where}: not the structure of a BPE tokenizer ({error})") from None
    for name, expected in known.items():
        if splits == expected:
            if bool(raw["model"].get("ignore_merges")) != (name in WHOLE_WORDS):
                wrong = "not true, as" if name in WHOLE_WORDS else "true, and not"
                raise QuantkitError(f"{where}: ignore_merges is {wrong} with pre-tokenizer {name}; {NO_WORDS}")
            return name
    # llama.cpp would cut words differently and the model would see tokens it was not trained on.
    raise QuantkitError(f"{where}: pre-tokenizer is not {' or '.join(known)}; no GGUF name for it")


def around(raw: Mapping[str, Any], where: str) -> tuple[list[str], list[str]]:
    """The special tokens that the post-processor puts before and after a text. QuantkitError if it is not one text."""
    before, after = list[str](), list[str]()
    whole = raw.get("post_processor") or {"type": "ByteLevel"}
    for part in whole["processors"] if whole["type"] == "Sequence" else [whole]:
        if part["type"] == "TemplateProcessing":
            pieces = part["single"]
            texts = [i for i, piece in enumerate(pieces) if "Sequence" in piece]
            if len(texts) != 1:
                raise QuantkitError(f"{where}: post-processor 'TemplateProcessing' has {len(texts)} texts in `single`")
            names = [piece.get("SpecialToken", {}).get("id") for piece in pieces]
            before, after = names[: texts[0]], names[texts[0] + 1 :]
    return before, after


def tokenizer_of_json(raw: Mapping[str, Any], known: Patterns, where: str) -> Tokenizer:
    """The tokenizer itself, without what never has an effect here. QuantkitError as `named`."""
    named(raw, known, where)
    return of_json(json.dumps({**raw, **NEVER_USED}), where)


def text_of(value: Any) -> str:
    """A string that UTF-8 can hold (JSON may escape half a surrogate pair); TypeError for anything else."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TypeError(f"{value!r:.80} is not Unicode text") from None
    return value


def id_of(value: Any) -> int:
    """A token id; TypeError for anything else."""
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.80} is not a token id")
    return value


def _unsaid(raw: Mapping[str, Any]) -> Iterator[str]:
    """What is asked for beyond tokens, merges and a known way to cut."""
    yield from (f"{key} {_shown(raw[key])}" for key in raw if key not in (*PARTS, "version") and raw[key] is not None)
    model, normalizer, decoder = raw["model"], raw.get("normalizer"), raw.get("decoder")
    if normalizer and not (normalizer["type"] == "Sequence" and normalizer["normalizers"] == []):
        yield f"normalizer {_kinds(normalizer, 'normalizers')}"
    yield from _unsaid_of_model(model)
    for added in raw.get("added_tokens") or ():
        if taking := [flag for flag in FLAGS if added.get(flag)]:
            yield f"added token {text_of(added['content'])!r} with {taking[0]} true"
    if decoder and _flat(decoder, "decoders") != ["ByteLevel"]:
        yield f"decoder {_kinds(decoder, 'decoders')}"
    for kind in _flat(raw.get("post_processor") or {"type": "ByteLevel"}, "processors"):
        if kind not in ("ByteLevel", "TemplateProcessing"):
            yield f"post-processor {kind!r}"


def _unsaid_of_model(model: Mapping[str, Any]) -> Iterator[str]:
    """Of BPE: what changes how a word is put together."""
    plain = {"type", "vocab", "merges", "ignore_merges"}  # the last one goes with the name: see `named`
    # With all 256 bytes in the vocabulary nothing is ever unknown.
    if all(char in model["vocab"] for char in characters_of_bytes().values()):
        plain |= {"unk_token", "fuse_unk"}
    yield from (f"{key} {_shown(value)}" for key, value in model.items() if key not in plain and value)


def _splits(whole: Mapping[str, Any], where: str) -> Iterator[str]:
    """The expressions by which text is cut, before its words become bytes as they stand."""
    parts = whole["pretokenizers"] if whole.get("type") == "Sequence" else [whole]
    for i, part in enumerate(parts):
        kind = part.get("type")
        if kind == "Split" and part["behavior"] == "Isolated" and not part.get("invert"):
            yield _escaped(text_of(part["pattern"].get("Regex") or ""))
        elif kind == "Digits" and part.get("individual_digits"):
            yield r"\p{N}"
        elif kind != "ByteLevel" or part.get("add_prefix_space", True) or part.get("use_regex", True):
            raise QuantkitError(f"{where}: a pre-tokenizer {kind!r} is not supported; {NO_WORDS}")
        if (kind == "ByteLevel") != (i == len(parts) - 1):
            raise QuantkitError(
                f"{where}: pre-tokenizers other than ByteLevel at the end are not supported; {NO_WORDS}"
            )


def _escaped(pattern: str) -> str:
    """Line ends as two characters: files have them so, or as themselves, which is the same expression."""
    return pattern.replace("\r", r"\r").replace("\n", r"\n")


def _flat(part: Mapping[str, Any], inner: str) -> list[str]:
    """Kinds of a part, or of those in a sequence of them."""
    return [each["type"] for each in part[inner]] if part["type"] == "Sequence" else [part["type"]]


def _kinds(part: Mapping[str, Any], inner: str) -> str:
    return " ".join(map(repr, _flat(part, inner)))


def _shown(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]
