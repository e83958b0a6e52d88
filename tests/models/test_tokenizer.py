"""A tokenizer written into GGUF metadata and rebuilt from it cuts every text the same way."""

import json

import pytest

from quantkit.errors import QuantkitError
from quantkit.models.family import PRE
from quantkit.models.tokenizer import read_tokenizer, tokenize, tokenizer_metadata, tokenizer_of_gguf

TEXT = """def f(x):\n\treturn x**2  # 12345.678\n\n\n  The well-known "naïve" café —
道可道,非常道。 東京は ひらがな ｶﾅ 1234567
<｜User｜>hi<｜Assistant｜><think>\nso\n</think> 😀\r\n   tail   """


def plain(metadata: dict) -> dict:
    return {key: getattr(value, "value", getattr(value, "values", value)) for key, value in metadata.items()}


def test_round_trip(tiny):
    ours = read_tokenizer(tiny.path)
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
