"""Byte-level BPE: the checkpoint's own tokenizer, and the one that GGUF metadata describe (see tokenizer_metadata)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import gguf
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from quantkit.errors import QuantkitError

Patterns = Mapping[str, tuple[str, ...]]
"""GGUF's name of a pre-tokenizer -> the regular expressions that it splits by."""
WHOLE_WORDS = ("glm4",)
"""Pre-tokenizers whose words are looked up whole before they are merged: `ignore_merges` of llama.cpp, which goes by
this name, and of the tokenizers library."""

PROBES = (
    "It was the best of times; 7 77 777 7777 12345678 people said so.  Don't, we'll — naïve “quotes” …",
    "١٢٣ ²³ ½ Ⅷ １２ ＡＢ　！ \u00a0x\u200by \ufeffz ",
    "深度求索的模型有671B个参数。東京は ひらがな ｶﾅ 가나다 ﷽ हिन्दी עברית ไทย",
    "def f(x):\n\treturn {k: v for k, v in x.items() if v != 'no'}  # keep\n\n\n    pass\r\n\r\n  \n x\r",
    "   leading, trailing   \t \n",
    "e\u0301 a\u0308\u0323 ﬁ Å Å K ſ İ ı ß ẞ Ünï Ǆ ʼn ÅNGSTRÖM",
    '😀👩\u200d👩\u200d👧🏽 🇩🇪 ☺️ →≠∑ \x00\x01\x7f <a href="x">&amp;</a> C:\\x\\y $E=mc^2$ a_b-c/d@e.f',
    *("".join(chr(c) for c in range(first, first + 64)) for first in range(0, 0x250, 64)),
)
"""Texts of every kind that tokenizers differ about: digits, CJK, spaces, line ends, code, combining marks, emoji."""
MOST_PROBED = 256


def of_json(text: str, where: str) -> Tokenizer:
    """From a tokenizer.json that `tokenizer_json` has judged; where: its name."""
    return built(lambda: Tokenizer.from_str(text), where)


def built(make: Callable[[], Tokenizer], where: str) -> Tokenizer:
    """What `make` makes; QuantkitError, beginning with `where`, for whatever the library raises."""
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

    def make() -> Tokenizer:
        tokens, types, merges = (list(meta[f"tokenizer.ggml.{key}"]) for key in ("tokens", "token_type", "merges"))
        return rebuilt(tokens, types, merges, known[pre], pre in WHOLE_WORDS)

    return built(make, "GGUF metadata")


def rebuilt(
    tokens: Sequence[str], types: Sequence[int], merges: Sequence[str], patterns: Sequence[str], whole_words: bool
) -> Tokenizer:
    """What a GGUF says, as llama.cpp reads it. patterns: of its pre-tokenizer; whole_words: whether it is among
    WHOLE_WORDS."""
    pairs = [merge.partition(" ")[::2] for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=pairs, ignore_merges=whole_words))
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


def check_alike(given: Tokenizer, named: Tokenizer, where: str, added: Sequence[str] = ()) -> None:
    """QuantkitError, beginning with `where`, if the tokenizer of a checkpoint cuts a text otherwise than the one that
    its GGUF will describe. added: tokens that are looked for in a text before it is cut."""
    around = [f"a{token}b {token} c {token}" for token in added[:MOST_PROBED]]
    for text in (*PROBES, *around):
        found = [one.encode(text, add_special_tokens=False) for one in (given, named)]
        ours, theirs = (list(zip(one.tokens, one.ids, strict=True)) for one in found)
        if ours != theirs:
            i = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
            raise QuantkitError(
                f"{where}: {text!r} is cut into {ours[i : i + 4]}, by the GGUF's name of its pre-tokenizer into "
                f"{theirs[i : i + 4]}; a GGUF cannot say that"
            )


def tokenize(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids without BOS; chat markers in the text become their special tokens. A checkpoint's tokenizer may know
    tokens beyond its embedding: `check_ids` finds them."""
    return tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids  # `encode` would stop all threads


def check_ids(ids: Iterable[int], n_vocab: int, tokenizer: Tokenizer | None = None, where: str = "") -> None:
    """QuantkitError for a token id that the embedding has no row for: the one check before ids become rows.

    where: the text and the file whose tokenizer it was, to begin the message with.
    """
    bad = next((i for i in ids if not 0 <= i < n_vocab), None)
    if bad is not None:
        name = tokenizer.id_to_token(bad) if tokenizer is not None and bad >= 0 else None
        token = f"token {name!r} has id {bad}" if name is not None else f"token id {bad}"
        raise QuantkitError(
            f"{where + ': ' if where else ''}{token}{', which' if name is not None else ''} is beyond the model's "
            f"{n_vocab:,} tokens"
        )
