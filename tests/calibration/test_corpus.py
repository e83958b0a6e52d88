"""Text: where it comes from, how it is cut, and that nothing is both calibrated on and evaluated on."""

import json

import pyarrow
import pytest
from pyarrow import parquet

from quantkit.calibration import corpus
from quantkit.calibration.sources import Source, parse
from quantkit.errors import QuantkitError
from quantkit.models.family import PRE
from quantkit.models.tokenizer import tokenize
from quantkit.models.tokenizer_metadata import read_tokenizer


def test_default_parts_are_disjoint_and_of_every_domain():
    calibration, evaluation = corpus.default("calibration"), corpus.default("evaluation")
    assert {d.domain for d in calibration.documents} == {"prose", "code", "math", "chinese", "dialogue"}
    assert {d.domain for d in evaluation.documents} == {"prose", "code", "math", "chinese"}
    seen = "".join(d.text for d in calibration.documents)
    shared = [line for d in evaluation.documents for line in d.text.splitlines() if len(line) > 200 and line in seen]
    assert not shared


def test_default_is_the_same_every_time():
    assert corpus.default("calibration").digest == corpus.default("calibration").digest


def test_any_prefix_is_a_mix():
    first = corpus.default("calibration").documents[:5]
    assert len({document.domain for document in first}) == 5


def test_chunks_start_with_bos_and_keep_the_true_tokens(tiny):
    ours = read_tokenizer(tiny.path, PRE)
    text = corpus.Corpus("t", (corpus.Document("text", "one two three four five six seven eight " * 40),))
    chunks = corpus.chunk(text, ours, bos=0, length=32, limit=100)
    assert chunks.tokens.shape == (3, 32)
    assert (chunks.tokens[:, 0] == 0).all()
    assert (chunks.tokens[:, 1:] == chunks.targets[:, 1:]).all()
    ids = [0, *tokenize(ours, text.documents[0].text)]
    every = [ids[i : i + 32] for i in range(0, len(ids) - 31, 32)]
    assert all(chunk in every for chunk in chunks.targets.tolist())
    assert corpus.chunk(text, ours, bos=0, length=32).targets.tolist() == every


def test_few_chunks_are_spread_over_the_text(tiny):
    ours = read_tokenizer(tiny.path, PRE)
    parts = [corpus.Document("text", word * 300) for word in ("alpha ", "12 ", "道可道 ", "def f(): ")]
    text = corpus.Corpus("t", tuple(corpus.Document(d, p.text) for d, p in zip("abcd", parts, strict=True)))
    assert set(corpus.chunk(text, ours, bos=0, length=32, limit=12 * 32).domains) == set("abcd")
    assert all(corpus.spread(97)[:k] == corpus.spread(97)[:96][:k] for k in (1, 40))
    assert sorted(corpus.spread(97)) == list(range(97))


def test_too_little_text_is_refused(tiny):
    text = corpus.Corpus("short", (corpus.Document("text", "hi"),))
    with pytest.raises(QuantkitError, match=r"short: \d+ tokens of text, but a chunk needs 512"):
        corpus.chunk(text, read_tokenizer(tiny.path, PRE), bos=0)


def test_files_folders_and_jsonl(tmp_path):
    (tmp_path / "a.txt").write_text("plain")
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body": f"row {i}"}) + "\n" for i in range(3)))
    documents = corpus.load([str(tmp_path / "a.txt"), f"{tmp_path}/b.jsonl:body"]).documents
    assert [d.text for d in documents] == ["plain", "row 0", "row 1", "row 2"]
    with pytest.raises(QuantkitError, match="no column 'text'; it has body"):
        corpus.load([str(tmp_path / "b.jsonl")])


def test_parquet_and_template(tmp_path):
    rows = {"question": ["1+1?", "2+2?"], "answer": ["2", "4"]}
    parquet.write_table(pyarrow.table(rows), tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "3+3?", "answer": "6"}) + "\n")
    documents = corpus.load([f"{tmp_path}:Q: {{question}}\\nA: {{answer}}"]).documents
    assert [d.text for d in documents] == ["Q: 1+1?\nA: 2", "Q: 2+2?\nA: 4", "Q: 3+3?\nA: 6"]
    with pytest.raises(QuantkitError, match="no column 'reply'; it has question, answer"):
        corpus.load([f"{tmp_path}:{{reply}}"])
    with pytest.raises(QuantkitError, match="write columns in braces"):
        corpus.load([f"{tmp_path}:{{question"])


def test_a_name_that_has_a_colon_wins(tmp_path):
    named, rows = tmp_path / "a:body", tmp_path / "a.jsonl"
    named.write_text("the file itself")
    (tmp_path / "a").write_text("another file")
    rows.write_text(json.dumps({"body": "a row", "text": "other"}) + "\n")
    assert [d.text for d in corpus.load([str(named)]).documents] == ["the file itself"]
    assert [d.text for d in corpus.load([f"math={rows}:body"]).documents] == ["a row"]
    assert corpus.load([f"{rows}:body"]).name == "a.jsonl"


@pytest.mark.parametrize(
    ("source", "place", "column"),
    [
        ("user/x", "user/x", "text"),
        ("user/x:body", "user/x", "body"),
        ("user/x:config:split", "user/x:config:split", "text"),
        ("user/x::test:body", "user/x::test", "body"),
        ("user/x:{a}: {b}", "user/x", "{a}: {b}"),
        ("user/x:Q: {a}\\nA: {b}", "user/x", "Q: {a}\nA: {b}"),
        ("user/x:config:split:{a}" + "y" * 300, "user/x:config:split", "{a}" + "y" * 300),
    ],
)
def test_a_column_stands_last(source, place, column):
    assert parse(source) == Source("text", place, column)


@pytest.mark.parametrize("name", ["missing.txt", "./nowhere", "/no/such/folder", "nowhere", "a/b/c"])
def test_missing_path_is_named(name):
    with pytest.raises(QuantkitError, match="no such file or folder"):
        corpus.load([name])


def test_undecodable_and_empty_files_are_named(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(QuantkitError, match=r"x\.txt"):
        corpus.load([str(tmp_path / "x.txt")])
    (tmp_path / "x.txt").write_bytes("no mark".encode("utf-16-le"))
    with pytest.raises(QuantkitError, match=r"x\.txt: not text \(a NUL character after 1 others\); give it as UTF-8"):
        corpus.load([str(tmp_path / "x.txt")])
    (tmp_path / "x.txt").write_text("  \n")
    with pytest.raises(QuantkitError, match="no text"):
        corpus.load([str(tmp_path / "x.txt")])


def test_a_domain_may_stand_before_a_file(tmp_path):
    code, prose = tmp_path / "a=b.txt", tmp_path / "prose.txt"
    code.write_text("x = 1\n" * 50)
    prose.write_text("It was the best of times.\n" * 50)
    loaded = corpus.load([f"code={code}", f"prose={prose}", str(code)])
    assert [document.domain for document in loaded.documents] == ["code", "prose", "text"]
    assert loaded.name == "a=b.txt, prose.txt, a=b.txt"


def test_more_tokens_than_the_mix_has_draw_on_more_languages():
    plain, wide = (corpus.TextChoice(n_tokens=n).corpus("calibration") for n in (corpus.WIDE_TOKENS, 917504))
    assert plain.digest == corpus.default("calibration").digest == corpus.TextChoice().corpus("calibration").digest
    assert {d.domain for d in wide.documents} == {d.domain for d in plain.documents} | {"text"}
    sizes = [sum(len(d.text) for d in each.documents) for each in (plain, wide)]
    assert sizes[1] > 1.7 * sizes[0]
    assert corpus.overlap(wide, corpus.default("evaluation")) < 0.02


def test_null_is_no_word(tmp_path, capsys):
    rows = [{"text": "one", "n": 7}, {"text": None, "n": 8}, {"text": "three", "n": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [d.text for d in corpus.load([str(tmp_path / "a.jsonl")]).documents] == ["one", "three"]
    assert "a.jsonl: 1 rows without text (null) are left out" in capsys.readouterr().err
    assert [d.text for d in corpus.load([f"{tmp_path}/a.jsonl:{{text}} {{n}}"]).documents] == ["one 7"]
    (tmp_path / "b.jsonl").write_text('{"text": null}\n')
    with pytest.raises(QuantkitError, match="there is no text in it"):
        corpus.load([str(tmp_path / "b.jsonl")])


@pytest.mark.parametrize("value", [["a", "b"], {"role": "user"}, True])
def test_what_is_no_text_is_not_written_as_python_writes_it(value, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": value}) + "\n")
    for column in ("", ":{text}"):
        with pytest.raises(QuantkitError, match=r"a\.jsonl:.*(list|dict|bool) .* is no text; take a part"):
            corpus.load([f"{tmp_path}/a.jsonl{column}"])
    if isinstance(value, list):
        assert corpus.load([f"{tmp_path}/a.jsonl:{{text[1]}}"]).documents[0].text == "b"


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfplain\xef\xbb\xbf")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    assert corpus.load([str(tmp_path / "a.txt")]).documents[0].text == "plain\ufeff"
    assert corpus.load([str(tmp_path / "b.jsonl")]).documents[0].text == "row"
    (tmp_path / "c.txt").write_bytes("plain".encode("utf-16"))
    with pytest.raises(QuantkitError, match=r"c\.txt: not UTF-8 text"):
        corpus.load([str(tmp_path / "c.txt")])


DIGESTS = {  # of what an installed dataset-build 0.1.11 gave: every file made without --data follows from them
    ("calibration", False): "464891db19a77e8964a3d0c5a233ea6c86a74b26e505093998b3744bef8cd573",
    ("calibration", True): "9f17b387f135ab07284d89b5123c921b32b8fd175343615a388646cae1e281b1",
    ("evaluation", False): "9b4669541c003f4f584ccd090e80ae2d445f4b2bad646dbf25f04ca0ba0f0512",
    ("evaluation", True): "c04bfd4a961b64febb42d427b297bbe9aeebdd301acea70ba9e0e1275f7000aa",
}


@pytest.mark.parametrize(("part", "wide"), DIGESTS)
def test_the_default_text_is_that_of_every_published_figure(part, wide):
    assert corpus.default(part, wide).digest == DIGESTS[part, wide]
