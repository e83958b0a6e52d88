"""`quantkit inspect`: what a model or a file holds, from headers alone."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

from quantkit.errors import printable
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.geometry import Geometry
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.model_names import is_gguf
from quantkit.formats.tensor_table import weight_of
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.models.open import open_model
from quantkit.sizes import both_units

SHOWN = 400  # characters of a key or value


def describe(name: str) -> str:
    """A readable account of a checkpoint folder, a bundled model or a GGUF file; QuantkitError if it is broken."""
    if is_gguf(name) or name.endswith(".gguf"):
        lines = _gguf(GGUFFile.open(Path(name)))
    else:
        lines = _checkpoint(name, open_model(name))
    return "\n".join(map(printable, lines))


def facts(name: str) -> dict[str, Any]:
    """The same for programs: `kind`, `name`, `model` (its numbers), `types`, `bytes`, `tensors`; of a GGUF also its
    `files` and `metadata`, without the vocabulary."""
    if is_gguf(name) or name.endswith(".gguf"):
        file = GGUFFile.open(Path(name))
        rows = [(t.name, t.qtype, t.shape, t.n_bytes) for t in file.tensors.values()]
        config = family.from_gguf(file.metadata) if family.knows(file.metadata) else None
        about: dict[str, Any] = {"kind": "gguf", "name": name, "files": [str(path) for path in file.files]}
        metadata = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.ggml.")}
        more: dict[str, Any] = {"file_bytes": file.n_bytes, "metadata": metadata}
    else:
        source = open_model(name)
        config = family.from_hf(source.config)
        source.validate(family.source_shapes(config))
        rows = [(key, e.dtype, e.shape, e.n_bytes) for key, e in source.tensors.items()]
        about, more = {"kind": "checkpoint", "name": name}, {}
    types: dict[str, dict[str, int]] = {}
    for _, kind, shape, n_bytes in rows:
        of = types.setdefault(kind, {"tensors": 0, "weights": 0, "bytes": 0})
        of["tensors"], of["weights"], of["bytes"] = (
            of["tensors"] + 1,
            of["weights"] + prod(shape),
            of["bytes"] + n_bytes,
        )
    tensors = [{"name": key, "type": kind, "shape": list(shape), "bytes": n} for key, kind, shape, n in rows]
    total = sum(row[-1] for row in rows)
    return {
        **about,
        "model": asdict(config) if config else None,
        "bytes": total,
        "types": types,
        **more,
        "tensors": tensors,
    }


def _model_lines(c: ModelConfig) -> list[str]:
    q, index = f"q_lora {c.q_lora}" if c.q_lora else "plain q", c.indexer
    scorer = index and f"{index.n_head} heads of {index.width}, top {index.top_k:,}, in {sum(index.full)} layers"
    kv = f"kv_lora {c.kv_lora}, nope {c.qk_nope} + rope {c.qk_rope}, v {c.v_head}"
    if c.compression:
        kv = f"one key of {c.qk_nope} + rope {c.qk_rope}, window {c.compression.window}"
        by = ", ".join(f"{c.compression.ratios.count(ratio)} of the layers by {ratio}" for ratio in (4, 128))
    return [
        f"layers      {c.n_layer} ({c.n_dense} dense, {c.n_moe} MoE), hidden {c.d}, vocabulary {c.n_vocab:,}",
        f"attention   {c.n_head} heads, {q}, {kv}",
        *([f"compressed  {by}"] if c.compression else []),
        *([f"indexer     {scorer}"] if scorer else []),
        f"experts     {c.n_expert} routed + {c.n_shared} shared, top-{c.n_used}, {c.scoring}, "
        f"{c.n_group_used} of {c.n_group} groups",
        f"FFN         {c.n_ff_exp} of an expert, {c.n_ff} dense",
    ]


def _types(rows: Iterable[tuple[str, int, int]]) -> list[str]:
    """rows: (type, weights, bytes) per tensor."""
    count, weights, size = Counter[str](), Counter[str](), Counter[str]()
    for kind, n_weights, n_bytes in rows:
        count[kind] += 1
        weights[kind] += n_weights
        size[kind] += n_bytes
    head = f"{'type':<10}{'tensors':>9}{'weights':>18}{'bytes':>18}"
    body = [f"{k:<10}{count[k]:>9,}{weights[k]:>18,}{size[k]:>18,}" for k, _ in size.most_common()]
    total = f"{'total':<10}{sum(count.values()):>9,}{sum(weights.values()):>18,}{sum(size.values()):>18,}"
    return [head, *body, f"{total}  {both_units(sum(size.values()))}"]


def _checkpoint(name: str, source: Checkpoint | Geometry) -> list[str]:
    config = family.from_hf(source.config)
    needed = family.source_shapes(config)
    source.validate(needed)
    rows = [(e.dtype, prod(e.shape), e.n_bytes) for e in source.stored.values()]
    extra = sum(1 for name in source.tensors if weight_of(name) not in needed)
    lines = [f"checkpoint  {name}", *_model_lines(config), "", *_types(rows)]
    if extra:
        lines.append(f"{extra} tensors are not used (multi-token prediction)")
    return lines


def _gguf(file: GGUFFile) -> list[str]:
    rows = [(tensor.qtype, prod(tensor.shape), tensor.n_bytes) for tensor in file.tensors.values()]
    bits = 8 * sum(row[2] for row in rows) / max(1, sum(row[1] for row in rows))
    keys = {key: value for key, value in file.metadata.items() if not key.startswith("tokenizer.")}
    shown = [f"{_short(key):<48} {_short(str(value))}" for key, value in keys.items() if not isinstance(value, list)]
    size = f"{file.n_bytes:,} bytes: {both_units(file.n_bytes)}, {bits:.3f} bpw"
    lines = [f"file        {file.path} ({len(file.files)} file(s), {size})"]
    if family.knows(file.metadata):
        lines += _model_lines(family.from_gguf(file.metadata))
    return [*lines, "", *_types(rows), "", *shown]


def _short(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} [{len(text):,} characters]"
