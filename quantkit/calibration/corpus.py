"""Text for calibration and evaluation: bundled, from files, or a Hugging Face dataset.

The default text is that of the `dataset-build` package (prose, code, mathematics, Chinese), which lies in texts/ as it
was published and is read as an archive: installing it would bring transformers along. Each of its files is cut once:
the first 90 % may be calibrated on, the last 10 % is for evaluation only.
"""

import hashlib
import io
import os
import re
import string
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Literal

from quantkit import bundle
from quantkit.calibration.sources import Domain, parse
from quantkit.errors import QuantkitError, needs
from quantkit.formats.byte_source import open_regular, read_text
from quantkit.progress import say

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

    from quantkit.runtime.stream import Source

Part = Literal["calibration", "evaluation"]

EVALUATION_SHARE = 0.1
WIDE_TOKENS, WIDE_CHARACTERS = 1 << 19, 16384
QUERY = re.compile(r"(?<=\S)\?[^\s'\"]*=[^\s'\"]*")  # of an address; signatures stand there
BOM = "\ufeff"  # a mark of some editors before a text, and not of it
DIALOGUE = "<｜User｜>{question}<｜Assistant｜><think>\n{thought}\n</think>\n\n{answer}<｜end▁of▁sentence｜>"

ARCHIVE, INSIDE = "dataset_build-0.1.11-py3-none-any.whl", PurePosixPath("dataset_build/data")
_BUNDLED: dict[Domain, tuple[str, ...]] = {
    "prose": ("eng/history.txt", "eng/philosophy.txt", "eng/eng.txt", "eng/weird.txt", "eng/jobs.txt"),
    "code": (
        "coding/python/python.txt",
        "coding/c++/c++.txt",
        "coding/rust/rust.txt",
        "coding/java/java.txt",
        "coding/sql/sql.txt",
        "coding/bash/bash.txt",
        "coding/html/html.txt",
        "coding/typescript/typescript.txt",
    ),
    "math": ("coding/math/math.txt",),
    "chinese": ("zho/zho.txt",),
}


@dataclass(frozen=True)
class Document:
    """A text of one kind."""

    domain: Domain
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order, with a name for the record. `digest` identifies the text (sha256, hex)."""

    name: str
    documents: tuple[Document, ...]

    @property
    def digest(self) -> str:
        """sha256 of the texts, in their order."""
        whole = hashlib.sha256()
        for document in self.documents:
            whole.update(hashlib.sha256(document.text.encode()).digest())
        return whole.hexdigest()


@dataclass(frozen=True)
class TextChoice:
    """Which text, and how much of it. data: sources as in `load`, empty: the bundled mix, which draws on more languages
    where more than WIDE_TOKENS are asked for. n_tokens None: as `options.sized` decides. from_start: as in `chunk`."""

    data: tuple[str, ...] = ()
    n_tokens: int | None = None
    chunk: int = 512
    from_start: bool = False

    def corpus(self, part: Part) -> Corpus:
        """The text; of the bundled mix that part of it."""
        return load(self.data) if self.data else default(part, (self.n_tokens or 0) > WIDE_TOKENS)


def default(part: Part, wide: bool = False) -> Corpus:
    """The bundled mix. Both parts are disjoint pieces of the same files, so they measure the same kinds of text.

    wide: for experts that little of it reaches, all that the package has of code and of English besides, and
    WIDE_CHARACTERS of each of its other languages.
    """
    with zipfile.ZipFile(bundle.texts_dir() / ARCHIVE) as archive:
        documents: list[Document] = []
        for domain, names in _BUNDLED.items():
            pieces = [_piece(_member(archive, INSIDE / name), part) for name in names]
            documents += [Document(domain, piece) for piece in pieces]
            if part == "calibration":
                documents += _dialogues(pieces[0])
        more = _more(archive, part) if wide else []
    kinds = "prose, code, math, Chinese, dialogues"
    if more:
        kinds += ", more code, other languages"
    return Corpus(f"dataset-build {part} ({kinds})", tuple(_interleave([*documents, *more])))


def _member(archive: zipfile.ZipFile, name: PurePosixPath) -> str:
    """A text of the archive, its line ends as Python reads them from a file."""
    return io.TextIOWrapper(archive.open(str(name)), encoding="utf-8").read()


def _more(archive: zipfile.ZipFile, part: Part) -> list[Document]:
    """What the bundled mix leaves out of the package, by name."""
    taken = {INSIDE / name for names in _BUNDLED.values() for name in names}
    names = map(PurePosixPath, archive.namelist())
    every = {path for path in names if path.suffix == ".txt" and INSIDE in path.parents}
    documents = []
    for path in sorted(every - taken):
        kind = path.relative_to(INSIDE).parts[0]
        domain: Domain = "code" if kind == "coding" else "prose" if kind == "eng" else "text"
        text = _piece(_member(archive, path), part)
        documents.append(Document(domain, text[:WIDE_CHARACTERS] if domain == "text" else text))
    return documents


def _piece(text: str, part: Part) -> str:
    cut = text.rfind("\n", 0, int(len(text) * (1 - EVALUATION_SHARE))) + 1
    return text[:cut] if part == "calibration" else text[cut:]


def _dialogues(text: str, count: int = 8) -> list[Document]:
    """Passages told as R1 dialogues, so that chat markers and `<think>` are among the tokens that are measured."""
    paragraphs = [p.strip() for p in text.split("\n\n") if len(p.strip()) > 120]
    triples = zip(paragraphs[0::3], paragraphs[1::3], paragraphs[2::3], strict=False)
    made = (DIALOGUE.format(question=a, thought=b, answer=c) for a, b, c in triples)
    return [Document("dialogue", text) for text in islice(made, count)]


def _interleave(documents: Sequence[Document], size: int = 16384) -> list[Document]:
    """Cut documents into pieces and take them in turn by domain, so that any prefix of the corpus is a fair mix."""
    queues: dict[str, list[Document]] = {}
    for document in documents:
        pieces = [document.text[i : i + size] for i in range(0, len(document.text), size)]
        queues.setdefault(document.domain, []).extend(Document(document.domain, piece) for piece in pieces)
    longest = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(longest) for queue in queues.values() if i < len(queue)]


def load(sources: Sequence[str], limit: int = 1 << 26) -> Corpus:
    """Files, folders or dataset ids (streamed), each with its domain before it if that is known: `code=FILE`.

    An id may name a configuration and a split: `user/name:config:split` (default: the only configuration, `train`).
    Last, after a colon, may come the column with the text (default: `text`), or a template with columns in braces:
    `FILE:body`, `user/name:{question} {answer}`. limit: characters taken from each dataset (they may be endless).
    """
    documents: list[Document] = []
    parsed = [parse(given) for given in sources]
    for source in parsed:
        first = len(documents)
        for file in source.files():
            documents += _read_file(file, source.column, limit)
        if not source.is_here:
            documents += _from_hub(source.place, source.column, limit)
        documents[first:] = [Document(source.domain, document.text) for document in documents[first:]]
    if not any(document.text.strip() for document in documents):
        raise QuantkitError(f"--data {' '.join(sources)}: there is no text in it")
    names = (Path(source.place).name if source.is_here else source.place for source in parsed)
    return Corpus(", ".join(names), tuple(documents))


def _read_file(path: Path, column: str, limit: int) -> list[Document]:
    os.close(open_regular(path))  # the reader of datasets would wait for a FIFO
    if path.suffix in (".jsonl", ".json"):
        return _from_dataset("json", {"data_files": str(path)}, column, limit)
    if path.suffix == ".parquet":
        return _from_dataset("parquet", {"data_files": str(path)}, column, limit)
    text = read_text(path, "text").removeprefix(BOM)
    if (at := text.find("\0")) >= 0:  # UTF-16 without its mark is UTF-8 too, and so is a hole in a file
        raise QuantkitError(f"{path}: not text (a NUL character after {at:,} others); give it as UTF-8")
    return [Document("text", text)]


def _from_hub(source: str, column: str, limit: int) -> list[Document]:
    name, _, rest = source.partition(":")
    config, _, split = rest.partition(":")
    return _from_dataset(name, {"name": config} if config else {}, column, limit, split or "train")


class _NoText(Exception):
    """A column's value that is not words or a number."""

    def __init__(self, value: object) -> None:
        super().__init__(f"{type(value).__name__} {value!r:.60}")
        self.is_null = value is None


class _Template(string.Formatter):
    """Columns put together; `_NoText` where one has none."""

    def format_field(self, value: object, spec: str) -> str:
        """As its base class."""
        if value is None or (isinstance(value, bool | bytes | Sequence | Mapping) and not isinstance(value, str)):
            raise _NoText(value)
        return str(super().format_field(value, spec))


def _fill(template: str, row: Mapping[str, object], where: str) -> str | None:
    """The text of a row; None where a column that belongs to it is null. template: a column's name, or text with
    columns in braces."""
    try:
        if "{" not in template:
            return _Template().format_field(row[template], "")
        return _Template().vformat(template, (), row)
    except _NoText as found:
        if found.is_null:
            return None
        raise QuantkitError(f"{where}:{template!r}: {found} is no text; take a part of it, as {{column[0]}}") from None
    except KeyError as missing:
        raise QuantkitError(f"{where}: no column {missing}; it has {', '.join(row)} (--data {where}:COLUMN)") from None
    except (ValueError, AttributeError, IndexError, TypeError) as error:
        raise QuantkitError(f"{where}:{template!r}: {error}; write columns in braces, braces twice") from None


def _from_dataset(name: str, options: dict[str, str], column: str, limit: int, split: str = "train") -> list[Document]:
    with needs("data"):
        import datasets

    where = options.get("data_files", name)
    documents, taken, n_null = list[Document](), 0, 0
    try:
        for row in datasets.load_dataset(name, split=split, streaming=True, **options):
            text = _fill(column, row, where)
            if text is None:
                n_null += 1
                continue
            documents.append(Document("text", text))
            taken += len(text)
            if taken >= limit:
                break
    except QuantkitError:
        raise
    except Exception as error:  # datasets and its readers raise many unrelated types
        first = (str(error).splitlines() or [""])[0]
        raise QuantkitError(f"{where}: {type(error).__name__}: {re.sub(QUERY, '', first)}") from None
    if n_null:
        say(f"{where}: {n_null:,} rows without text (null) are left out")
    return documents


@dataclass(frozen=True)
class Chunks:
    """Equal pieces of one token stream, each starting with BOS in place of its first token, as llama.cpp cuts them.

    tokens: int64 [n_chunk, length], what the model reads. targets: int64, the same before BOS was put in.
    domains: the domain of each chunk's middle token.
    """

    tokens: "torch.Tensor"
    targets: "torch.Tensor"
    domains: tuple[str, ...]


def tokens_of(corpus: Corpus, tokenizer: "Tokenizer", bos: int) -> tuple[list[int], list[tuple[int, Domain]]]:
    """The tokens of all documents as one stream, and where in it each document ends, with its domain."""
    from quantkit.models.tokenizer import tokenize  # here: to choose a text needs no tokenizer

    ids, edges = [bos], []  # llama.cpp tokenizes with BOS first, then overwrites each chunk's first token with it
    for document in corpus.documents:
        ids += tokenize(tokenizer, document.text)
        edges.append((len(ids), document.domain))
    return ids, edges


def chunk(
    corpus: Corpus,
    tokenizer: "Tokenizer",
    bos: int,
    length: int = 512,
    limit: int | None = None,
    from_start: bool = False,
    model: "Source | None" = None,
) -> Chunks:
    """Tokenize and cut. limit: most tokens to use (rounded down to whole chunks). model: whose tokens they are;
    QuantkitError for one, anywhere in the text, that its embedding does not have.

    Fewer chunks than the text has are spread evenly over it, not taken from its start: files are often sorted by
    subject, and error feedback fitted to one subject is worse than none on the others. A smaller limit takes a prefix
    of a larger one's chunks. from_start: the first chunks after all, as llama-imatrix takes them.
    """
    import torch  # here: to choose a text needs neither

    from quantkit.models.tokenizer import check_ids

    ids, edges = tokens_of(corpus, tokenizer, bos)
    if model is not None:
        where = f"{corpus.name}, cut by the tokenizer.json of {model.name}"
        check_ids((bos, max(ids)), model.config.n_vocab, tokenizer, where)
    n_all = len(ids) // length
    n_chunk = n_all if limit is None else min(n_all, limit // length)
    if n_chunk == 0:
        raise QuantkitError(
            f"{corpus.name}: {min(len(ids), limit or len(ids))} tokens of text, but a chunk needs "
            f"{length}; give more text"
        )
    chosen = range(n_chunk) if from_start or n_chunk == n_all else spread(n_all)[:n_chunk]
    targets = torch.tensor(ids[: n_all * length], dtype=torch.int64).view(n_all, length)[list(chosen)]
    tokens = targets.clone()
    tokens[:, 0] = bos
    middles = [i * length + length // 2 for i in chosen]
    domains = tuple(next(domain for end, domain in edges if middle < end) for middle in middles)
    return Chunks(tokens, targets, domains)


def cut(text: Corpus, source: "Source", choice: TextChoice) -> Chunks:
    """The chunks of a text that are chosen, in the tokens of a model; all of them where no number is given.
    QuantkitError for a token that the model's embedding does not have."""
    bos, tokenizer = source.config.bos, source.tokenizer()
    return chunk(text, tokenizer, bos, choice.chunk, choice.n_tokens, choice.from_start, source)


def spread(n: int) -> list[int]:
    """0 .. n-1 in an order of which every prefix is spread evenly: by the multiples of the golden ratio, modulo 1."""
    return sorted(range(n), key=lambda i: (i * 0.6180339887498949) % 1.0)


LONG_LINE = 48  # characters; shorter lines (braces, headings) recur in unrelated texts


def overlap(calibration: Corpus, evaluation: Corpus) -> float:
    """Share of the evaluation's long lines that also stand in the calibration text: 0 for honest figures."""

    def lines(corpus: Corpus) -> list[str]:
        every = (line.strip() for document in corpus.documents for line in document.text.splitlines())
        return [line for line in every if len(line) >= LONG_LINE]

    seen, asked = set(lines(calibration)), lines(evaluation)
    return sum(line in seen for line in asked) / len(asked) if asked else 0.0
