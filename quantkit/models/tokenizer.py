"""Byte-level BPE: the checkpoint's own tokenizer, and the one that GGUF metadata describe (see tokenizer_metadata)."""

from collections.abc import Callable, Mapping
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from quantkit.errors import QuantkitError

Patterns = Mapping[str, tuple[str, ...]]
"""GGUF's name of a pre-tokenizer -> the regular expressions that it splits by."""


def of_json(text: str, where: str) -> Tokenizer:
    """From the text of a tokenizer.json; where: its name."""
    return _built(lambda: Tokenizer.from_str(text), where)


def _built(make: Callable[[], Tokenizer], where: str) -> Tokenizer:
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, QuantkitError):
        raise
    except BaseException as error:  # the Rust library raises bare Exception, and BaseException where it panics
        raise QuantkitError(f"{where}: not a usable tokenizer ({error})") from None


def tokenizer_of_gguf(meta: Mapping[str, Any], known: Patterns) -> Tokenizer:
    """Rebuild the tokenizer from `tokenizer.ggml.*`, as llama.cpp does. known: pre-tokenizers it may have."""
    pre = meta.get("tokenizer.ggml.pre")
    if meta.get("tokenizer.ggml.model") != "gpt2" or not isinstance(pre, str) or pre not in known:
        raise QuantkitError(f"GGUF metadata: tokenizer.ggml.pre {pre!r} is not {' or '.join(known)}; cannot tokenize")
    return _built(lambda: _from_gguf(meta, known[pre]), "GGUF metadata")


def _from_gguf(meta: Mapping[str, Any], patterns: tuple[str, ...]) -> Tokenizer:
    tokens, types = list(meta["tokenizer.ggml.tokens"]), list(meta["tokenizer.ggml.token_type"])
    merges = [tuple(merge.split(" ", 1)) for merge in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    for kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
        special = kind == gguf.TokenType.CONTROL
        names = [token for token, its in zip(tokens, types, strict=True) if its == kind]
        added = [AddedToken(name, normalized=False, special=special) for name in names]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    return tokenizer


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without BOS; chat markers in the text become their special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids
