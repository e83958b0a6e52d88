"""tokenizer.json: all that its GGUF could not say is refused by name, and nobody's expression is ever run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.calibration import corpus
from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.models.family import PRE
from quantkit.models.open import open_weights
from quantkit.models.patterns import characters_of_bytes
from quantkit.models.tokenizer import check_alike, check_ids, tokenizer_of_gguf
from quantkit.models.tokenizer_metadata import read_tokenizer, tokenizer_metadata
from quantkit.runtime.sources.checkpoint import CheckpointSource

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}


def change(folder: Path, edit: Callable[[dict], object], name: str = "tokenizer.json") -> None:
    raw = json.loads((folder / name).read_text())
    edit(raw)
    (folder / name).write_text(json.dumps(raw))


def template(*pieces: str) -> dict:
    """A post-processor that makes a text of these: A, or special tokens."""
    single = [{"Sequence" if piece == "A" else "SpecialToken": {"id": piece, "type_id": 0}} for piece in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}


def as_deepseek_has_it(raw: dict) -> None:
    """R1's and V2-Lite's own files: an empty sequence of normalizers, offsets by bytes, added tokens normalized."""
    raw.update(normalizer={"type": "Sequence", "normalizers": []}, post_processor=BYTE_LEVEL, decoder=BYTE_LEVEL)
    none = dict.fromkeys(("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"))
    raw["model"] |= none | {"fuse_unk": False, "byte_fallback": False}
    for added in raw["added_tokens"]:
        added["normalized"] = True


def as_transformers_5_saves_it(raw: dict) -> None:
    raw.update(post_processor=template("A"))
    raw["model"]["ignore_merges"] = False


def with_length_limits(raw: dict) -> None:
    """transformers does not apply them either, unless it is asked to."""
    raw["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    raw["padding"] = {
        **{"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 2},
        **{"pad_type_id": 0, "pad_token": "<｜▁pad▁｜>"},
    }


@pytest.mark.parametrize(
    "edit",
    [
        as_deepseek_has_it,
        as_transformers_5_saves_it,
        with_length_limits,
        lambda t: t.update(post_processor=template(BOS, "A")),
        lambda t: t.update(post_processor={"type": "Sequence", "processors": [BYTE_LEVEL, template(BOS, "A")]}),
        lambda t: t["model"].update(unk_token="a", fuse_unk=True),  # all bytes are tokens: nothing is unknown
        lambda t: t.pop("version"),
    ],
)
def test_what_changes_nothing_is_read(edit, model_copy):
    before, text = tokenizer_metadata(model_copy, 768, PRE), "a long text of more than eight tokens, 1234 of them"
    ids = read_tokenizer(model_copy, PRE).encode(text, add_special_tokens=False).ids
    change(model_copy, edit)
    assert tokenizer_metadata(model_copy, 768, PRE) == before
    assert read_tokenizer(model_copy, PRE).encode(text, add_special_tokens=False).ids == ids


def parts(raw: dict) -> list:
    return raw["pre_tokenizer"]["pretokenizers"]


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


BOMB = {"type": "Replace", "pattern": {"Regex": ""}, "content": "x" * (1 << 20)}
REFUSED = {
    "normalizer 'NFKC' is not": lambda t: t.update(normalizer={"type": "NFKC"}),
    "normalizer 'Replace' is not": lambda t: t.update(normalizer=BOMB),
    "normalizer 'Lowercase' 'NFC' is not": lambda t: t.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Lowercase"}, {"type": "NFC"}]}
    ),
    "pre-tokenizer 'Punctuation' is not": lambda t: parts(t).insert(0, {"type": "Punctuation", "behavior": "Isolated"}),
    "pre-tokenizer 'Whitespace' is not": lambda t: t.update(pre_tokenizer={"type": "Whitespace"}),
    "other than ByteLevel at the end": lambda t: parts(t).append(parts(t)[-1]),
    "pre-tokenizers other than ByteLevel": lambda t: parts(t).pop(),
    "no GGUF name for it": lambda t: parts(t).insert(0, split("a|(")),  # never compiled
    "pre-tokenizer is not .*; no GGUF name": lambda t: parts(t).insert(0, split("(a*)*$" * 40)),
    "a pre-tokenizer None is not": lambda t: t.update(pre_tokenizer=None),
    "dropout 0.1 is not": lambda t: t["model"].update(dropout=0.1),
    "byte_fallback true is not": lambda t: t["model"].update(byte_fallback=True),
    'continuing_subword_prefix "##" is not': lambda t: t["model"].update(continuing_subword_prefix="##"),
    'end_of_word_suffix "</w>" is not': lambda t: t["model"].update(end_of_word_suffix="</w>"),
    'unk_token "a" is not': lambda t: (t["model"]["vocab"].pop("ÿ"), t["model"].update(unk_token="a")),
    "secret 1 is not": lambda t: t["model"].update(secret=1),
    "something true is not": lambda t: t.update(something=True),
    "decoder 'Replace' is not": lambda t: t.update(decoder=BOMB),
    "decoder 'ByteLevel' 'Strip' is not": lambda t: t.update(
        decoder={"type": "Sequence", "decoders": [BYTE_LEVEL, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}
    ),
    "post-processor 'BertProcessing' is not": lambda t: t.update(
        post_processor={"type": "BertProcessing", "sep": [EOS, 1], "cls": [BOS, 0]}
    ),
    "puts .* before a text and .* after it": lambda t: t.update(post_processor=template(BOS, "A", EOS)),
    r"puts \['<｜User｜>'\] before": lambda t: t.update(post_processor=template("<｜User｜>", "A")),
    "has 2 texts": lambda t: t.update(post_processor=template("A", "A")),
    "added token '<think>' with lstrip true": lambda t: t["added_tokens"][5].update(lstrip=True),
    "added token '<think>' with single_word true": lambda t: t["added_tokens"][5].update(single_word=True),
    "token 'a' has more ids than one": lambda t: t["added_tokens"].append(
        FLAGS | {"id": 767, "content": "a", "special": False}
    ),
    "two tokens of the vocabulary have one id": lambda t: t["model"]["vocab"].update(ab=700),
    "merge .* is not of two tokens": lambda t: t["model"]["merges"].__setitem__(0, ["a b", "c"]),
    "not the structure": lambda t: t.update(model=[]),
    "not a usable tokenizer": lambda t: t["model"]["merges"].__setitem__(0, ["no", "such"]),
}


@pytest.mark.parametrize("says", REFUSED)
def test_what_a_gguf_cannot_say_is_refused_by_name(says, model_copy, capfd):
    change(model_copy, REFUSED[says])
    for read in (lambda: tokenizer_metadata(model_copy, 768, PRE), lambda: open_weights(model_copy)):
        with pytest.raises(QuantkitError, match=f"tokenizer\\.json: .*({says})"):
            read()
    assert not capfd.readouterr().err  # no panic of the library


def test_behaviour_is_compared_too(tiny):
    """Even if the parts were judged wrongly: whoever cuts a text of any kind otherwise is found."""
    meta = {k: getattr(v, "values", v) for k, v in tokenizer_metadata(tiny.path, 768, PRE).items()}
    right, other = tokenizer_of_gguf(meta, PRE), tokenizer_of_gguf(meta | {"tokenizer.ggml.pre": "deepseek-llm"}, PRE)
    check_alike(right, right, "t")
    with pytest.raises(QuantkitError, match=r"t: .* is cut into \[.*\], by the GGUF's name of its pre-tokenizer into"):
        check_alike(other, right, "t")


def test_bytes_have_the_characters_of_byte_level_vocabularies(tiny):
    vocabulary = json.loads((tiny.path / "tokenizer.json").read_text())["model"]["vocab"]
    characters = set(characters_of_bytes().values())
    assert len(characters) == 256 and characters <= vocabulary.keys()


# Ids beyond the embedding


def with_a_token_beyond(folder: Path) -> CheckpointSource:
    added = FLAGS | {"id": 768, "content": "<|PAD|>", "special": True}
    change(folder, lambda t: t["added_tokens"].append(added))
    return CheckpointSource(open_weights(folder))


def test_a_text_with_a_token_beyond_the_embedding_is_refused(model_copy):
    source = with_a_token_beyond(model_copy)
    (model_copy / "a.txt").write_text("It was a dark and stormy night. " * 9 + "<|PAD|>" + " So they say." * 9)
    text = corpus.load([str(model_copy / "a.txt")])
    with pytest.raises(
        QuantkitError, match=r"a\.txt, cut by the tokenizer\.json of .*: token '<\|PAD\|>' has id 768, .* 768 tokens"
    ):
        corpus.cut(text, source, corpus.TextChoice(n_tokens=8, chunk=8))  # wherever it stands
    without = corpus.Corpus("a", (corpus.Document("text", text.documents[0].text.replace("<|PAD|>", "")),))
    assert corpus.cut(without, source, corpus.TextChoice(chunk=8)).tokens.max() < 768


def test_no_id_beyond_reads_the_embedding(tiny):
    import torch

    source = CheckpointSource(tiny)
    for token in (-1, 768, 800):
        with pytest.raises(QuantkitError, match=f"token id {token} is beyond the model's 768 tokens"):
            source.embed(torch.tensor([[1, token]]))
    check_ids((0, 767), 768)


@pytest.mark.parametrize("key", ["bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("token", [768, 800, -1])
def test_special_ids_beyond_the_vocabulary_are_refused(key, token, model_copy):
    change(model_copy, lambda c: c.update({key: token}), "config.json")
    with pytest.raises(QuantkitError, match=rf"config\.json: {key} {token} is not a token: vocab_size is 768"):
        family.from_hf(json.loads((model_copy / "config.json").read_text()))
