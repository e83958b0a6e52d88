"""A tokenizer written into GGUF metadata and rebuilt from it cuts every text the same way."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.models import family
from quantkit.models.family import PRE
from quantkit.models.open import open_weights
from quantkit.models.tokenizer import tokenize, tokenizer_of_gguf
from quantkit.models.tokenizer_metadata import read_tokenizer, tokenizer_metadata

TEXT = """def f(x):\n\treturn x**2  # 12345.678\n\n\n  The well-known "naïve" café —
道可道,非常道。 東京は ひらがな ｶﾅ 1234567
<｜User｜>hi<｜Assistant｜><think>\nso\n</think> 😀\r\n   tail   """


def plain(metadata: dict) -> dict:
    return {key: getattr(value, "value", getattr(value, "values", value)) for key, value in metadata.items()}


def test_round_trip(tiny):
    ours = read_tokenizer(tiny.path, PRE)
    rebuilt = tokenizer_of_gguf(plain(tokenizer_metadata(tiny.path, 768, PRE)), PRE)
    ids = tokenize(ours, TEXT)
    assert tokenize(rebuilt, TEXT) == ids
    assert rebuilt.decode(ids, skip_special_tokens=False) == TEXT


def test_chat_markers_are_control_tokens(tiny):
    meta = plain(tokenizer_metadata(tiny.path, 768, PRE))
    kinds = dict(zip(meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<｜User｜>"] == 3  # llama.cpp's LLAMA_TOKEN_TYPE_CONTROL
    assert kinds["a"] == 1
    assert meta["tokenizer.ggml.bos_token_id"] == 0 and meta["tokenizer.ggml.add_bos_token"] is True


def test_padding_rows_of_the_embedding_get_names(tiny):
    meta = plain(tokenizer_metadata(tiny.path, 800, PRE))
    assert meta["tokenizer.ggml.tokens"][799] == "[PAD799]" and meta["tokenizer.ggml.token_type"][799] == 5


def test_another_pre_tokenizer_is_refused(model_copy):
    path = model_copy / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["pre_tokenizer"]["pretokenizers"].pop(0)
    path.write_text(json.dumps(raw))
    with pytest.raises(QuantkitError, match="pre-tokenizer"):
        tokenizer_metadata(model_copy, 768, PRE)


def test_vocabulary_beyond_the_embedding_is_refused(tiny):
    with pytest.raises(QuantkitError, match="767 is beyond vocab_size 700"):
        tokenizer_metadata(tiny.path, 700, PRE)


# Files as they are found on the Hub: each says the same in another place.


def change(path: Path, edit: Callable[[dict], object]) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def template_of(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]


def in_jinja_file(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(template_of(folder))
    change(folder / "tokenizer_config.json", lambda c: c.pop("chat_template"))


def in_a_list(folder: Path) -> None:
    named = [{"name": "default", "template": template_of(folder)}]
    change(folder / "tokenizer_config.json", lambda c: c.update(chat_template=named))


def in_processor_file(folder: Path) -> None:
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template_of(folder)}))
    change(folder / "tokenizer_config.json", lambda c: c.pop("chat_template"))


def in_token_map(folder: Path) -> None:
    tokens = {}
    change(folder / "tokenizer_config.json", lambda c: tokens.update({k: c.pop(k) for k in list(c) if k in TOKENS}))
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))


def in_config(folder: Path) -> None:
    change(folder / "tokenizer_config.json", lambda c: [c.pop(k) for k in ("bos_token", "eos_token")])


def in_generation_config(folder: Path) -> None:
    in_config(folder)
    change(folder / "config.json", lambda c: [c.pop(k) for k in ("bos_token_id", "eos_token_id")])


def as_null(folder: Path) -> None:
    change(folder / "tokenizer_config.json", lambda c: c.update(bos_token=None, eos_token=None))


def with_line_ends_themselves(folder: Path) -> None:
    """R1's own file has CR and LF in its expression, not their escapes."""
    path = folder / "tokenizer.json"
    itself = PRE["deepseek-v3"][2].replace(r"\r", "\r").replace(r"\n", "\n")
    change(path, lambda t: t["pre_tokenizer"]["pretokenizers"][2]["pattern"].update(Regex=itself))


def with_merges_as_pairs(folder: Path) -> None:
    change(folder / "tokenizer.json", lambda t: t["model"].update(merges=[m.split(" ") for m in merges_of(t)]))


def with_merges_as_text(folder: Path) -> None:
    change(folder / "tokenizer.json", lambda t: t["model"].update(merges=merges_of(t)))


def merges_of(raw: dict) -> list[str]:
    return [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]]


PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
TOKENS = ("bos_token", "eos_token", "pad_token")
SAME = [
    in_jinja_file,
    in_a_list,
    in_processor_file,
    in_token_map,
    in_config,
    in_generation_config,
    as_null,
    with_line_ends_themselves,
    with_merges_as_pairs,
    with_merges_as_text,
]


@pytest.mark.parametrize("move", SAME)
def test_the_same_in_another_place_is_the_same(move, model_copy):
    before = tokenizer_metadata(model_copy, 768, PRE)
    move(model_copy)
    assert tokenizer_metadata(model_copy, 768, PRE) == before


def test_templates_by_name(model_copy):
    named = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    change(model_copy / "tokenizer_config.json", lambda c: c.update(chat_template=named))
    meta = tokenizer_metadata(model_copy, 768, PRE)
    assert meta["tokenizer.chat_template"] == "a" and meta["tokenizer.chat_templates"] == ["tool_use"]
    assert meta["tokenizer.chat_template.tool_use"] == "b"
    (model_copy / "chat_template.jinja").write_text("c")  # transformers takes the file
    (model_copy / "additional_chat_templates").mkdir()
    (model_copy / "additional_chat_templates" / "rag.jinja").write_text("d")
    meta = tokenizer_metadata(model_copy, 768, PRE)
    assert (meta["tokenizer.chat_template"], meta["tokenizer.chat_template.rag"]) == ("c", "d")
    assert "tokenizer.chat_template.tool_use" not in meta


def test_what_no_file_says_is_refused(model_copy):
    in_generation_config(model_copy)
    (model_copy / "generation_config.json").unlink()
    with pytest.raises(QuantkitError, match=r"no file says which token is BOS: bos_token in tokenizer_config\.json or"):
        tokenizer_metadata(model_copy, 768, PRE)
    with pytest.raises(QuantkitError, match="BOS"):  # before anything is computed
        open_weights(model_copy)


def test_ids_that_only_the_tokenizer_has_reach_the_config(model_copy):
    change(model_copy / "config.json", lambda c: [c.pop(k) for k in ("bos_token_id", "eos_token_id")])
    change(model_copy / "tokenizer_config.json", lambda c: c.update(bos_token="a", eos_token="b"))
    config = family.from_hf(open_weights(model_copy).config)
    vocabulary = json.loads((model_copy / "tokenizer.json").read_text())["model"]["vocab"]
    assert (config.bos, config.eos) == (vocabulary["a"], vocabulary["b"])


def test_other_tokens_that_end_a_turn(model_copy):
    change(model_copy / "generation_config.json", lambda g: g.update(eos_token_id=[1, 7, 9]))
    meta = plain(tokenizer_metadata(model_copy, 768, PRE))
    assert [meta[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot", "eom")] == [1, 7, 9]
    config = family.from_gguf(
        plain(family.metadata(family.from_hf(open_weights(model_copy).config), "split", "")) | meta
    )
    assert all(map(config.is_end, (1, 7, 9))) and not config.is_end(0)
    change(model_copy / "generation_config.json", lambda g: g.update(eos_token_id=[1, 768]))
    with pytest.raises(QuantkitError, match=r"generation_config\.json: eos_token_id 768 is not a token"):
        tokenizer_metadata(model_copy, 768, PRE)


def test_pad_tokens_without_a_row_are_left_out_and_said(model_copy, capsys):
    change(model_copy / "tokenizer_config.json", lambda c: c.update(pad_token="[PAD]"))
    added = PLAIN | {"id": 768, "content": "<|PAD|>", "special": True}
    change(model_copy / "tokenizer.json", lambda t: t["added_tokens"].append(added))
    meta = tokenizer_metadata(model_copy, 768, PRE)
    assert "tokenizer.ggml.padding_token_id" not in meta and len(meta["tokenizer.ggml.tokens"]) == 768
    said = capsys.readouterr().err
    assert "pad_token '[PAD]' is not in the vocabulary" in said and "token 768 '<|PAD|>' is beyond" in said


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda t: t.update(normalizer={"type": "NFKC"}), "normalizer 'NFKC'"),
        (lambda t: t["model"].update(ignore_merges=True), "ignore_merges"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "pre-tokenizer 'Split'"),
        (lambda t: t["pre_tokenizer"]["pretokenizers"][3].update(add_prefix_space=True), "pre-tokenizer 'ByteLevel'"),
        (lambda t: t["model"].update(type="Unigram"), "'Unigram' is not BPE"),
    ],
)
def test_what_a_gguf_cannot_say_is_refused(edit, says, model_copy):
    change(model_copy / "tokenizer.json", edit)
    with pytest.raises(QuantkitError, match=says):
        tokenizer_metadata(model_copy, 768, PRE)


def test_only_other_kinds_of_tokenizers_are_named(model_copy):
    (model_copy / "tokenizer.json").rename(model_copy / "tokenizer.model")
    with pytest.raises(QuantkitError, match=r"has tokenizer\.model"):
        tokenizer_metadata(model_copy, 768, PRE)


def test_v2_s_pre_tokenizer(model_copy):
    """V2's file cuts numbers with `Digits`; what is rebuilt from the GGUF cuts every text the same way."""
    *splits, _ = [re.sub(r"\\([rn])", lambda m: {"r": "\r", "n": "\n"}[m[1]], p) for p in PRE["deepseek-llm"]]
    parts = [{"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in splits]
    parts += [{"type": "Digits", "individual_digits": True}]
    change(model_copy / "tokenizer.json", lambda t: t["pre_tokenizer"]["pretokenizers"].__setitem__(slice(3), parts))
    meta = plain(tokenizer_metadata(model_copy, 768, PRE))
    assert meta["tokenizer.ggml.pre"] == "deepseek-llm"
    original, rebuilt = read_tokenizer(model_copy, PRE), tokenizer_of_gguf(meta, PRE)
    for text in (TEXT, "١٢٣ ²³ Ⅷ हिन्दी עברית Ünï Ǆ ʼn  ", "１２ ＡＢ　！ 가나다\r\n x "):
        assert tokenize(rebuilt, text) == tokenize(original, text)


# Tokens that only tokenizer_config.json has.


def with_added(folder: Path, **tokens: dict) -> None:
    """Written into `added_tokens_decoder`: keys `t768` are ids."""
    decoder = {name[1:]: token for name, token in tokens.items()}
    change(folder / "tokenizer_config.json", lambda c: c.update(added_tokens_decoder=decoder))


def test_tokens_that_only_the_settings_have(model_copy, tiny):
    """They are one token, in the original as in the file; what both files have alike changes nothing."""
    raw = json.loads((model_copy / "tokenizer.json").read_text())
    alike = {f"t{token['id']}": token for token in raw["added_tokens"]}
    with_added(model_copy, **alike)
    assert plain(tokenizer_metadata(model_copy, 768, PRE)) == plain(tokenizer_metadata(tiny.path, 768, PRE))
    with_added(model_copy, **alike, t769={"content": "<|b|>", "special": True}, t768={"content": "[A]"})
    meta = plain(tokenizer_metadata(model_copy, 800, PRE))
    assert meta["tokenizer.ggml.tokens"][768:770] == ["[A]", "<|b|>"]
    assert meta["tokenizer.ggml.token_type"][768:770] == [4, 3]  # user defined, control
    own, rebuilt = read_tokenizer(model_copy, PRE), tokenizer_of_gguf(meta, PRE)
    assert tokenize(own, "x[A]y<|b|>") == tokenize(rebuilt, "x[A]y<|b|>")
    assert {768, 769} < set(tokenize(own, "x[A]y<|b|>"))


def test_settings_number_tokens_as_transformers_does(model_copy):
    transformers = pytest.importorskip("transformers")
    with_added(model_copy, t768={"content": "[A]", "special": False, "normalized": False})
    theirs = transformers.AutoTokenizer.from_pretrained(model_copy)
    assert theirs.encode("x[A]y", add_special_tokens=False) == tokenize(read_tokenizer(model_copy, PRE), "x[A]y")


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ({"t300": {"content": "[A]"}}, r"added_tokens_decoder 300 is '\[A\]', in tokenizer.json 'Ġm'"),
        ({"t770": {"content": "<｜User｜>"}}, "770 is '<｜User｜>', which is [0-9]+ in tokenizer.json"),
        ({"t770": {"content": "[A]"}}, r"770 '\[A\]' is not in tokenizer.json, where 768 is the next"),
        ({"t0": {"content": "<｜begin▁of▁sentence｜>", "lstrip": True}}, "lstrip is True, in tokenizer.json False"),
        ({"tx": {"content": "[A]"}}, "'x' is not a token id"),
        ({"t768": {"text": "[A]"}}, "is not a token with its content"),
    ],
)
def test_settings_that_contradict_the_tokenizer_are_refused(tokens, says, model_copy):
    with_added(model_copy, **tokens)
    for read in (lambda: tokenizer_metadata(model_copy, 800, PRE), lambda: read_tokenizer(model_copy, PRE)):
        with pytest.raises(QuantkitError, match=says):
            read()
