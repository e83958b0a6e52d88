"""tiktoken.model: Kimi's vocabulary, as the tokenizer.json that says the same.

The file has a line for each token, its bytes in base64 and its rank, which is its id; the text is cut by an expression
that stands in Kimi's Python code, and bytes merge lowest rank first. The 256 ids after the last rank are special:
tokenizer_config.json names some of them (`added_tokens_decoder`), the rest are `<|reserved_token_ID|>`.

A GGUF wants merges. A token of more than one byte is what its own bytes become when only lower ranks merge, but for the
last step: the two parts left are its merge, at its rank's place in the list (as llama.cpp's conversion/qwen.py does).
"""

import base64
import binascii
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text_file
from quantkit.models.patterns import KIMI_K2, characters_of_bytes
from quantkit.progress import say_once

FILE = "tiktoken.model"
N_SPECIAL = 256  # Kimi's tokenization_kimi.py: num_reserved_special_tokens


def tokenizer_json(path: Path, named: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """What tokenizer.json would be, for a file tiktoken.model. named: `added_tokens_decoder` of `where`. QuantkitError
    naming file and line."""
    vocab, merges = _vocabulary(read_text_file(path, "tokenizer"), str(path))
    by_id = sorted(_specials(named, where, len(vocab)).items())
    flags = {"special": True, "normalized": False, "lstrip": False, "rstrip": False, "single_word": False}
    added = [{"id": i, "content": text, **flags} for i, text in by_id]
    pattern = {"type": "Split", "pattern": {"Regex": KIMI_K2}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [pattern, byte_level]},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": dict(vocab), "merges": list(merges)},
    }


def ranks_of(text: str | bytes, where: str) -> dict[bytes, int]:
    """Token -> rank. QuantkitError unless the ranks are 0, 1, 2, ... and every single byte is there."""
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    found: dict[bytes, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            found[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise QuantkitError(f"{where}: line {number}: {line!r:.60} is not base64 and a rank") from None
    if sorted(found.values()) != list(range(len(found))) or b"" in found:
        raise QuantkitError(f"{where}: ranks are not 0 to {len(found) - 1}, each once: is the file whole?")
    if missing := [byte for byte in range(256) if bytes([byte]) not in found]:
        raise QuantkitError(f"{where}: byte {missing[0]} has no token: is the file whole?")
    return found


@lru_cache(maxsize=1)
def _vocabulary(text: bytes, where: str) -> tuple[Mapping[str, int], tuple[str, ...]]:
    """Token -> id and the merges, in a GGUF's characters: 0.4 s for a vocabulary of 40,000 (Kimi has 163,584)."""
    ranks = ranks_of(text, where)
    shown_as = characters_of_bytes()
    shown = {token: "".join(shown_as[byte] for byte in token) for token in ranks}
    merges, alone = [], 0
    for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) < 2:
            continue
        parts = split(ranks, token, rank)
        if len(parts) == 2:
            merges.append(f"{shown[parts[0]]} {shown[parts[1]]}")
        else:
            alone += 1
    if alone:
        say_once(f"{where}: {alone} tokens are no merge of two others; a GGUF cannot reach them")
    return {shown[token]: rank for token, rank in ranks.items()}, tuple(merges)


def split(ranks: Mapping[bytes, int], token: bytes, below: int) -> list[bytes]:
    """The token's bytes merged as long as there is a pair of rank `below` or less, lowest first."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [ranks.get(a + b, below) for a, b in pairwise(parts)]
        best = min(pairs)
        if best >= below:
            break
        i = pairs.index(best)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _specials(listed: Mapping[str, Any], where: Path, first: int) -> dict[int, str]:
    named = {int(key): token for key, token in listed.items() if key.isascii() and key.isdigit()}
    found = {i: f"<|reserved_token_{i}|>" for i in range(first, first + N_SPECIAL)}
    for i, token in named.items():
        content = token.get("content") if isinstance(token, dict) else None
        if i not in found or not isinstance(content, str):
            raise QuantkitError(
                f"{where}: added_tokens_decoder {i} {content!r:.60} is not one of the {N_SPECIAL} ids "
                f"after {FILE}'s {first:,} tokens"
            )
        found[i] = content
    return found
