"""Byte-level BPE: from tokenizer.json into GGUF metadata, and from GGUF metadata back into a tokenizer."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text, read_text_file
from quantkit.formats.gguf_values import U32, I32List
from quantkit.formats.safetensors_header import load_json

Patterns = Mapping[str, tuple[str, ...]]
"""GGUF's name of a pre-tokenizer -> the regular expressions that it splits by."""


def read_tokenizer(folder: Path) -> Tokenizer:
    """The checkpoint's own tokenizer.json."""
    path = folder / "tokenizer.json"
    return _built(lambda: Tokenizer.from_str(read_text(path, "tokenizer")), str(path))


def _built(make: Callable[[], Tokenizer], where: str) -> Tokenizer:
    try:
        return make()
    except (KeyboardInterrupt, SystemExit, MemoryError, QuantkitError):
        raise
    except BaseException as error:  # the Rust library raises bare Exception, and BaseException where it panics
        raise QuantkitError(f"{where}: not a usable tokenizer ({error})") from None


def _json(path: Path) -> dict[str, Any]:
    value = load_json(read_text_file(path, "tokenizer"), str(path))
    if not isinstance(value, dict):
        raise QuantkitError(f"{path}: expected an object")
    return value


def tokenizer_metadata(folder: Path, n_vocab: int, known: Patterns) -> dict[str, Any]:
    """`tokenizer.*` keys for a checkpoint folder.

    n_vocab: rows of the embedding; missing ids become [PADi]. known: pre-tokenizers that it may have, `family.PRE`.
    """
    try:
        return _metadata(folder, n_vocab, known)
    except (TypeError, KeyError, AttributeError) as error:
        raise QuantkitError(f"{folder / 'tokenizer.json'}: not the structure of a BPE tokenizer ({error})") from None


def _metadata(folder: Path, n_vocab: int, known: Patterns) -> dict[str, Any]:
    raw, settings = _json(folder / "tokenizer.json"), _json(folder / "tokenizer_config.json")
    model = raw.get("model") or {}
    if model.get("type") != "BPE":
        raise QuantkitError(f"{folder / 'tokenizer.json'}: model type {model.get('type')!r} is not BPE")
    pre = _pre_tokenizer(raw, folder, known)
    tokens, types = _tokens(raw, n_vocab, folder)
    ids = {token: i for i, token in enumerate(tokens)}
    out: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": I32List(types),
        "tokenizer.ggml.merges": [_text(m) if isinstance(m, str) else _text(" ".join(m)) for m in model["merges"]],
        "tokenizer.ggml.add_bos_token": bool(settings.get("add_bos_token", True)),
        "tokenizer.ggml.add_eos_token": bool(settings.get("add_eos_token", False)),
    }
    for key, name in (("bos", "bos_token"), ("eos", "eos_token"), ("padding", "pad_token")):
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token is not None:
            if not isinstance(token, str) or token not in ids:
                raise QuantkitError(f"{folder / 'tokenizer_config.json'}: {name} {token!r} is not in the vocabulary")
            out[f"tokenizer.ggml.{key}_token_id"] = U32(ids[token])
    if isinstance(template := settings.get("chat_template"), str):
        out["tokenizer.chat_template"] = _text(template)
    return out


def _text(value: Any) -> str:
    """A string that UTF-8 can hold (JSON may escape half a surrogate pair)."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TypeError(f"{value!r:.80} is not Unicode text") from None
    return value


def _pre_tokenizer(raw: Mapping[str, Any], folder: Path, known: Patterns) -> str:
    """GGUF's name of it."""
    parts = (raw.get("pre_tokenizer") or {}).get("pretokenizers") or []
    splits = tuple(part["pattern"].get("Regex") for part in parts if part.get("type") == "Split")
    for name, expected in known.items():
        if splits == expected:
            return name
    # llama.cpp would cut words differently and the model would see tokens it was not trained on.
    raise QuantkitError(f"{folder / 'tokenizer.json'}: pre-tokenizer is not {' or '.join(known)}; no GGUF name for it")


def _tokens(raw: Mapping[str, Any], n_vocab: int, folder: Path) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    by_id = {_id(i): (_text(token), kinds.NORMAL) for token, i in raw["model"]["vocab"].items()}
    for added in raw.get("added_tokens", ()):
        control = added["special"] or _looks_special(added["content"])
        by_id[_id(added["id"])] = (_text(added["content"]), kinds.CONTROL if control else kinds.USER_DEFINED)
    if by_id and max(by_id) >= n_vocab:
        raise QuantkitError(f"{folder / 'tokenizer.json'}: token id {max(by_id)} is beyond vocab_size {n_vocab}")
    full = [by_id.get(i, (f"[PAD{i}]", kinds.UNUSED)) for i in range(n_vocab)]
    return [token for token, _ in full], [int(kind) for _, kind in full]


def _id(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise TypeError(f"{value!r:.80} is not a token id")
    return value


def _looks_special(token: str) -> bool:
    """DeepSeek marks `<｜User｜>` and its like as ordinary; llama.cpp's converter writes them as control tokens."""
    return token.startswith(("<｜", "<|")) and token.endswith(("｜>", "|>"))


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
