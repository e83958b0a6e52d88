"""Corpus, tokenizer and chat template of the tiny model."""

from __future__ import annotations

import json
import lzma
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
MARKUP = (
    ["<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"]
    + ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"]
    + ["<｜tool▁outputs▁begin｜>", "<｜tool▁outputs▁end｜>", "<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>"]
    + ["<｜tool▁sep｜>", "<｜fim▁hole｜>", "<｜fim▁begin｜>", "<｜fim▁end｜>", "<|EOT|>"]
)
SPLITS = [
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    r"|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
PIECE = 50_000  # characters tokenized at a time
DIALOGUE = 2_000  # characters per made-up dialogue
HOLD_OUT = 128  # one passage in so many is held out (a passage is PIECE characters or a shorter document)

# Behaves like the template that DeepSeek-R1 ships: the last system prompt comes first and bare, thoughts of earlier
# answers are dropped, tool calls and outputs are wrapped, and a new answer starts inside <think>.
CHAT_TEMPLATE = r"""
{%- set ns = namespace(system='', after_tool=false, first_output=true) -%}
{%- macro call(tool) -%}
<｜tool▁call▁begin｜>{{ tool['type'] }}<｜tool▁sep｜>{{ tool['function']['name'] }}
{{ '```json\n' + tool['function']['arguments'] + '\n```' }}<｜tool▁call▁end｜>
{%- endmacro -%}
{%- for m in messages if m['role'] == 'system' %}{% set ns.system = m['content'] %}{% endfor -%}
{{- bos_token + ns.system -}}
{%- for m in messages -%}
  {%- if m['role'] == 'user' -%}
    {%- set ns.after_tool = false -%}
    {{- '<｜User｜>' + m['content'] -}}
  {%- elif m['role'] == 'assistant' and m['tool_calls'] -%}
    {%- set ns.after_tool = false -%}
    {%- set ns.first_output = true -%}
    {{- '<｜Assistant｜>' + (m['content'] or '') + '<｜tool▁calls▁begin｜>' -}}
    {%- for tool in m['tool_calls'] -%}
      {{- '' if loop.first else '\n' -}}{{- call(tool) -}}
    {%- endfor -%}
    {{- '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' -}}
  {%- elif m['role'] == 'assistant' -%}
    {{- '<｜tool▁outputs▁end｜>' if ns.after_tool else '<｜Assistant｜>' -}}
    {{- m['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
    {%- set ns.after_tool = false -%}
  {%- elif m['role'] == 'tool' -%}
    {{- '<｜tool▁outputs▁begin｜>' if ns.first_output else '\n' -}}
    {{- '<｜tool▁output▁begin｜>' + m['content'] + '<｜tool▁output▁end｜>' -}}
    {%- set ns.after_tool = true -%}
    {%- set ns.first_output = false -%}
  {%- endif -%}
{%- endfor -%}
{%- if ns.after_tool -%}
  {{- '<｜tool▁outputs▁end｜>' -}}
{%- elif add_generation_prompt -%}
  {{- '<｜Assistant｜><think>\n' -}}
{%- endif -%}
"""


def read_documents(path: Path) -> list[str]:
    """Read a text file (plain or .xz) whose documents are separated by NUL bytes."""
    raw = lzma.open(path).read() if path.suffix == ".xz" else path.read_bytes()
    return [d for d in (part.decode("utf-8", "replace") for part in raw.split(b"\0")) if d]


def split_documents(docs: list[str]) -> tuple[list[str], list[str]]:
    """Hold out every 128th passage (more of a small corpus); what remains on its two sides become documents."""
    total = sum(-(-len(d) // PIECE) for d in docs)
    every = min(HOLD_OUT, max(2, total // 4))
    kept, held_out, number = [], [], 0
    for doc in docs:
        start = 0
        for at in range(0, len(doc), PIECE):
            number += 1
            if number % every == 0:
                held_out.append(doc[at : at + PIECE])
                kept += [doc[start:at]] if at > start else []
                start = at + PIECE
        kept += [doc[start:]] if start < len(doc) else []
    return kept, held_out


def sample_text(docs: list[str], n_chars: int, seed: int = 0) -> Iterator[str]:
    """Yield one slice of every document, in proportion to its length, about n_chars characters together."""
    rng = random.Random(seed)
    share = min(1.0, n_chars / sum(map(len, docs)))
    for doc in docs:
        size = round(len(doc) * share)
        start = rng.randrange(len(doc) - size + 1)
        yield doc[start : start + size]


def byte_level() -> pre_tokenizers.PreTokenizer:
    """DeepSeek-V3's pre-tokenizer."""
    parts = [pre_tokenizers.Split(Regex(p), "isolated") for p in SPLITS]
    return pre_tokenizers.Sequence([*parts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train_tokenizer(docs: list[str], vocab_size: int, n_chars: int = 20_000_000) -> Tokenizer:
    """Train a byte-level BPE with DeepSeek-V3's pre-tokenizer and special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD, *MARKUP],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_text(docs, n_chars), trainer)
    spec = json.loads(tokenizer.to_str())
    for token in spec["added_tokens"]:  # as in DeepSeek-V3: the markup is not "special", a decoder prints it
        token["special"] = token["content"] in (BOS, EOS, PAD)
    return Tokenizer.from_str(json.dumps(spec))


def dialogues(doc: str) -> Iterator[str]:
    """Cut a document into pieces that pose as dialogues: a question, a thought and an answer."""
    for i in range(0, len(doc), DIALOGUE):
        part = doc[i : i + DIALOGUE]
        a, b = len(part) // 4, len(part) // 2
        yield f"<｜User｜>{part[:a]}<｜Assistant｜><think>\n{part[a:b]}\n</think>\n\n{part[b:]}"


def tokenize(tokenizer: Tokenizer, docs: list[str], chat_share: float, seed: int = 0) -> np.ndarray:
    """Encode documents to one uint16 stream, each as BOS ... EOS; a share of them is made into dialogues."""
    rng = random.Random(seed)
    texts: list[str] = []
    ends: list[tuple[bool, bool]] = []  # does a document start, and end, with this text?
    for doc in docs:
        if rng.random() < chat_share:
            parts = list(dialogues(doc))
            flags = [(True, True)] * len(parts)
        else:
            parts = [doc[i : i + PIECE] for i in range(0, len(doc), PIECE)]
            flags = [(i == 0, i == len(parts) - 1) for i in range(len(parts))]
        texts += parts
        ends += flags
    bos, eos = np.array([0], np.uint16), np.array([1], np.uint16)
    chunks: list[np.ndarray] = []
    for i in range(0, len(texts), 256):
        encodings = tokenizer.encode_batch_fast(texts[i : i + 256], add_special_tokens=False)
        for (first, last), encoding in zip(ends[i : i + 256], encodings, strict=True):
            chunks += ([bos] if first else []) + [np.array(encoding.ids, np.uint16)] + ([eos] if last else [])
    return np.concatenate(chunks)


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text that each token stands for (none for special tokens)."""
    sizes = np.zeros(tokenizer.get_vocab_size(), np.int64)
    for token, i in tokenizer.get_vocab(with_added_tokens=True).items():
        sizes[i] = 0 if token in (BOS, EOS, PAD, *MARKUP) else len(token)  # byte-level: one character is one byte
    return sizes


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)

    def added(content: str) -> dict:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": content, **flags}

    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": added(BOS),
        "eos_token": added(EOS),
        "pad_token": added(EOS),
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 16384,
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": CHAT_TEMPLATE.strip(),
    }
    write_json(out / "tokenizer_config.json", config)
    generation = {"_from_model_config": True, "bos_token_id": 0, "eos_token_id": 1}
    generation |= {"do_sample": True, "temperature": 0.6, "top_p": 0.95}
    write_json(out / "generation_config.json", generation)


def write_json(path: Path, content: dict) -> None:
    """Write readable JSON with non-ASCII text left as it is."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
