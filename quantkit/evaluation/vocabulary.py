"""The tokenizer in a GGUF file's metadata: consistent, and cutting text as the original's does."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.tensor_table import TensorTable
from quantkit.models import family
from quantkit.models.tokenizer import PROBES, tokenize, tokenizer_of_gguf
from quantkit.models.tokenizer_metadata import WITHOUT_BOS, file_of, read_tokenizer, tokenizer_metadata

SAMPLES = (
    "It was the best of times, it was the worst of times; 12345 people said so.",
    "def f(x):\n    return {k: v for k, v in x.items() if v != 'no'}  # keep\n",
    "深度求索的模型有671B个参数。",
    "<｜User｜>What is 2+2?<｜Assistant｜><think>\n",
)


def folder_of(reference: TensorTable | None) -> Path | None:
    """Where the original's tokenizer lies, None if it is not known."""
    return reference.path if reference is not None and file_of(reference.path).is_file() else None


def tokenizer(file: GGUFFile, folder: Path | None) -> Iterator[str]:
    """A tokenizer that cuts text as the original's does. Yields what is wrong; folder: of the original, if known."""
    meta: Mapping[str, Any] = file.metadata
    for key, allowed in (("model", ["gpt2"]), ("pre", list(family.PRE))):
        if (have := meta.get(f"tokenizer.ggml.{key}")) not in allowed:
            yield f"tokenizer.ggml.{key} is {have!r}, must be {' or '.join(allowed)}: text would be cut wrongly"
    tokens, kinds, merges = (meta.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type", "merges"))
    if not (isinstance(tokens, list) and isinstance(kinds, list) and isinstance(merges, list)):
        yield "tokenizer.ggml.tokens, token_type or merges is missing"
        return
    embedding = file.tensors.get("token_embd.weight")
    if embedding is not None and len(tokens) != embedding.shape[0]:
        yield f"tokenizer.ggml.tokens has {len(tokens):,} tokens, token_embd {embedding.shape[0]:,} rows"
    if len(kinds) != len(tokens):
        yield f"tokenizer.ggml.token_type has {len(kinds):,} entries for {len(tokens):,} tokens"
    yield from _merges(tokens, merges)
    for key in ("bos", "eos"):
        if not 0 <= meta.get(f"tokenizer.ggml.{key}_token_id", -1) < len(tokens):
            yield f"tokenizer.ggml.{key}_token_id is missing or no token"
    said = meta.get("tokenizer.ggml.add_bos_token", False)
    if folder is None and not said and meta.get("tokenizer.ggml.pre") not in WITHOUT_BOS:
        yield "tokenizer.ggml.add_bos_token is not true: DeepSeek's models start every text with BOS"
    if folder is not None:
        yield from _like_original(meta, folder, len(tokens))


def _merges(tokens: Sequence[str], merges: Sequence[str]) -> Iterator[str]:
    """Merges must be of tokens; byte-level BPE numbers their results in order, in DeepSeek's vocabulary too."""
    ids = {token: i for i, token in enumerate(tokens)}
    last = -1
    for i, merge in enumerate(merges):
        parts = merge.split(" ", 1)
        if len(parts) != 2 or not all(part in ids for part in (*parts, "".join(parts))):
            yield f"tokenizer.ggml.merges[{i}] {merge!r} is not a merge of two tokens into a third"
            return
        if ids["".join(parts)] <= last:
            yield f"tokenizer.ggml.merges[{i}] {merge!r} is out of order: its token comes before the last merge's"
            return
        last = ids["".join(parts)]


def _like_original(meta: Mapping[str, Any], folder: Path, n_vocab: int) -> Iterator[str]:
    original = tokenizer_metadata(folder, n_vocab, family.PRE)
    for key, want in original.items():
        want, have = getattr(want, "value", getattr(want, "values", want)), meta.get(key)
        if isinstance(want, list):
            have = have if isinstance(have, list) else []
            if len(have) != len(want):
                yield f"{key} has {len(have):,} entries, the original {len(want):,}"
            elif have != want:
                i = next(i for i, (a, b) in enumerate(zip(have, want, strict=True)) if a != b)
                yield f"{key}[{i}] is {have[i]!r}, in the original {want[i]!r}"
        elif key.startswith("tokenizer.ggml.") and have != want and not key.startswith("tokenizer.ggml.padding"):
            yield f"{key} is {have}, in the original {want}"
        elif key.startswith("tokenizer.chat_template") and have != want:
            yield f"{key} {'is missing' if have is None else 'is not the original one'}"
    ours, theirs = _or_none(lambda: tokenizer_of_gguf(meta, family.PRE)), read_tokenizer(folder, family.PRE)
    for text in (*SAMPLES, *PROBES) if ours else ():
        if tokenize(ours, text) != tokenize(theirs, text):
            yield f"{text[:24]!r} is cut into other tokens than by the original"
            return


def _or_none(make: Callable[[], Any]) -> Any:
    """What was wrong with it has been said by the checks before."""
    try:
        return make()
    except Exception:  # the Rust library raises bare Exception
        return None
