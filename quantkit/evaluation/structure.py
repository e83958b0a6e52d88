"""Splits, metadata, tensors and types of a GGUF file, judged by rule: each function yields what is wrong, a line each.

Anyone may have written the file: a value of the wrong kind may raise TypeError, ValueError or KeyError here.
"""

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import read_text_file
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.formats.safetensors_header import load_object
from quantkit.formats.tensor_table import CONFIG, TensorTable
from quantkit.formats.text_model import TextModel
from quantkit.models import family
from quantkit.models.config import Mla, ModelConfig, layouts_of
from quantkit.planning import targets
from quantkit.tensors import NEXTN

MOST_EXPERTS = 1 << 16
LONG_CONTEXT, WITHOUT_YARN = 32768, "glm-dsa."  # beyond this every DeepSeek model needs YaRN, and GLM-5 has none
NAMED = 3  # files that a warning names

REQUIRED = (
    "block_count",
    "context_length",
    "embedding_length",
    "attention.layer_norm_rms_epsilon",
    "attention.kv_lora_rank",
    "expert_feed_forward_length",
    "expert_shared_count",
    "feed_forward_length",
    "attention.head_count",
    "leading_dense_block_count",
    "expert_count",
    "expert_used_count",
)
NOT_THERE: Mapping[str, tuple[str, ...]] = {
    "deepseek4": ("attention.kv_lora_rank", "feed_forward_length", "leading_dense_block_count")
}
"""Those of REQUIRED that an architecture has not."""
# What llama.cpp takes for a key that is absent (src/llama-model.cpp); vocab_size it counts in the tokenizer.
ABSENT: Mapping[str, Any] = {
    "expert_group_count": 1,
    "expert_group_used_count": 1,
    "expert_weights_norm": False,
    "expert_gating_func": 1,
    "rope.scaling.yarn_beta_fast": 32.0,
    "rope.scaling.yarn_beta_slow": 1.0,
    "rope.freq_base": 10000.0,
}
CONSEQUENCE: Mapping[str, str] = {
    "expert_gating_func": "llama.cpp would take softmax",
    "expert_weights_norm": "llama.cpp would not normalise expert weights",
    "expert_weights_scale": "llama.cpp would not scale expert weights",
    "attention.key_length_mla": "llama.cpp would expect attn_kv_b",
    "attention.value_length_mla": "llama.cpp would expect attn_kv_b",
    "rope.scaling.type": "llama.cpp would compute without YaRN",
    "rope.scaling.yarn_log_multiplier": "llama.cpp would scale attention wrongly",
}


def own_config(file: GGUFFile) -> ModelConfig | None:
    """The file's own numbers, if they can be those of a model at all."""
    try:
        config = family.from_gguf(file.metadata)
        whole = all(type(getattr(config, f.name)) is int for f in fields(config) if f.type is int)
        return config if whole and config.n_block <= len(file.tensors) and config.n_expert <= MOST_EXPERTS else None
    except (QuantkitError, KeyError, TypeError, ValueError):
        return None


def known_config(file: GGUFFile, reference: TensorTable | None) -> tuple[ModelConfig | None, str]:
    """The numbers that the file must have, and whose they are: the reference's, or those of a bundled model."""
    if reference is not None:
        own, architecture = family.from_hf(reference.config), file.metadata.get("general.architecture")
        if architecture != own.architecture and architecture in family.written_as(reference.config):
            own = family.from_hf(family.seen_as(reference.config, architecture))
        return _with_its_mtp(own, file), f"{reference.name}/config.json"
    keys = ("block_count", "embedding_length", "expert_count", "expert_feed_forward_length", "feed_forward_length")
    prefix = file.metadata.get("general.architecture")
    found = [file.metadata.get(f"{prefix}.{key}") for key in keys]
    for name in bundle.model_names():
        raw = _bundled_config(bundle.models_dir() / name)
        if not family.is_known(raw):  # a geometry alone
            continue
        c = _with_its_mtp(family.from_hf(raw), file)
        if found == [c.n_block, c.d, c.n_expert, c.n_ff_exp, c.n_ff]:
            return c, f"{name}'s config.json, a bundled model of this geometry"
    return None, ""


def _with_its_mtp(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """The numbers without MTP layers if the file has none, as it may."""
    return config if any(f".{NEXTN}." in name for name in file.tensors) else replace(config, n_mtp=0)


def _bundled_config(folder: Path) -> dict[str, Any]:
    """config.json of a bundled model, as a checkpoint has it."""
    where = str(folder / CONFIG)
    return TextModel.of(load_object(read_text_file(folder / CONFIG), where), where).config


def files(file: GGUFFile) -> Iterator[str]:
    """Splits and headers were checked when the file was opened."""
    for part in file.files:
        end = max((t.offset + t.n_bytes for t in file.tensors.values() if t.file == part), default=0)
        tail = part.stat().st_size - end
        if tail > 1 << 16:
            yield f"{part.name}: {tail:,} bytes after the last tensor belong to nothing"


def beside(file: GGUFFile, target: str) -> str | None:
    """What lies in the same folder and would disturb the target, or not be found by all of its versions."""
    if targets.get(target).single_file and len(file.files) > 1:
        return (
            f"{len(file.files)} splits: {target} takes them since June 2026 (FROM their folder); older versions load a "
            "single file, as llama-gguf-split --merge makes one"
        )
    if target != "ktransformers":
        return None
    folder, parts = file.path.parent, {part.name for part in file.files}
    found = (Path(root, name).relative_to(folder) for root, _, names in os.walk(folder) for name in names)
    others = sorted(str(p) for p in found if p.suffix in (".gguf", ".safetensors") and str(p) not in parts)
    if not others:
        return None
    more = f" and {len(others) - NAMED} more" if len(others) > NAMED else ""
    return f"KTransformers reads everything in and below the folder, {', '.join(others[:NAMED])}{more} too"


def layout(file: GGUFFile) -> Mla:
    """The MLA layout that the file is in."""
    return "combined" if "combined" in layouts_of(file.tensors) else "split"


def metadata(file: GGUFFile, known: ModelConfig | None) -> Iterator[str]:
    """Keys that llama.cpp needs, that must fit each other, and that must be the original's."""
    meta: Mapping[str, Any] = file.metadata
    architecture = meta.get("general.architecture")
    families = [known.architecture] if known else list(family.BY_ARCHITECTURE)
    if architecture not in families:
        yield f"general.architecture is {architecture!r}, not {' or '.join(families)}"
        return
    prefix = f"{architecture}."
    missing = [key for key in REQUIRED if prefix + key not in meta and key not in NOT_THERE.get(str(architecture), ())]
    yield from (f"{prefix}{key} is missing: llama.cpp refuses the file" for key in missing)
    if any(key in missing for key in ("attention.head_count", "attention.kv_lora_rank", "block_count")):
        return
    if known is None:
        if architecture not in NOT_THERE:  # its keys are all asked for where they are read
            yield from _consistent(file, prefix)
        return
    for key, wrapped in family.metadata(known, layout(file), "").items():
        name, want = key.removeprefix(prefix), getattr(wrapped, "value", wrapped)
        if key.startswith("general.") or (name == "vocab_size" and key not in meta) or name in missing:
            continue
        have = meta.get(key, ABSENT.get(name))
        if have is None or not _same(have, want):
            state = f"is {meta[key]}" if key in meta else "is missing"
            why = f": {CONSEQUENCE[name]}" if name in CONSEQUENCE and key not in meta else ""
            yield f"{key} {state}, must be {want}{why}"


def _consistent(file: GGUFFile, prefix: str) -> Iterator[str]:
    """What can be seen without the original. prefix: of the architecture's keys."""

    def key(name: str) -> Any:
        return file.metadata.get(prefix + name)

    split, lora, rope = layout(file) == "split", key("attention.kv_lora_rank"), key("rope.dimension_count")
    if rope is None:
        yield f"{prefix}rope.dimension_count is missing"
        return
    if split:
        wanted = {"attention.head_count_kv": 1, "attention.key_length": lora + rope, "attention.value_length": lora}
        for name in ("attention.key_length_mla", "attention.value_length_mla"):
            if key(name) is None:
                yield f"{prefix}{name} is missing: {CONSEQUENCE[name]}"
    else:
        wanted = {"attention.head_count_kv": key("attention.head_count"), "attention.key_length_mla": None}
    for name, want in wanted.items():
        if key(name) != want:
            yield f"{prefix}{name} is {key(name)}, must be {want} in the {layout(file)} layout"
    has_bias = any(".exp_probs_b." in name for name in file.tensors)
    if has_bias and (key("expert_gating_func") != 2 or not key("expert_weights_norm")):
        yield f"the router has a bias (V3, R1), so {prefix}expert_gating_func must be 2 and expert_weights_norm true"
    yarn = key("rope.scaling.type") == "yarn"
    if not yarn and prefix != WITHOUT_YARN and (key("context_length") or 0) > LONG_CONTEXT:
        yield f"{prefix}rope.scaling.type is not yarn, with a context of {key('context_length'):,}"
    for name in ("factor", "original_context_length", "yarn_log_multiplier") if yarn else ():
        if not key(f"rope.scaling.{name}"):
            yield f"{prefix}rope.scaling.{name} is missing"


def _same(have: Any, want: Any) -> bool:
    if isinstance(want, float) and isinstance(have, (int, float)):
        return math.isclose(have, want, rel_tol=1e-5)
    return type(have) is type(want) and have == want


def tensors(file: GGUFFile, known: ModelConfig | None) -> Iterator[str]:
    """Exactly the tensors of this architecture, each with its shape, and in the type that the format asks for."""
    config = known or own_config(file)
    if config is None:
        family.from_gguf(file.metadata)  # says what is wrong, unless it is a matter of size
        yield "a size in the metadata is no whole number, or more than the file can hold"
        return
    names = set(file.tensors)
    if len(layouts_of(names)) > 1:
        yield "attn_kv_b and attn_k_b/attn_v_b in one file: llama.cpp rejects tensors of both MLA layouts"
    for spec in family.specs(config, layout(file)):
        names.discard(spec.name)
        found = file.tensors.get(spec.name)
        if found is None:
            if not (spec.name == "output.weight" and (config.tied or known is None)):
                yield f"{spec.name} is missing"
        elif tuple(found.shape) != spec.shape:
            yield f"{spec.name} has shape {tuple(found.shape)}, must be {spec.shape} (slowest first)"
        elif spec.fixed and found.qtype != spec.fixed:
            yield f"{spec.name} is {found.qtype}, must be {spec.fixed}"
    yield from (
        f"{name} belongs to no {config.architecture} model: llama.cpp rejects extra tensors" for name in sorted(names)
    )


def types(file: GGUFFile, target: str) -> Iterator[str]:
    """Types that the target is known not to compute."""
    for tensor in file.tensors.values():
        try:
            targets.check(target, tensor.name, tensor.shape, tensor.qtype)
        except QuantkitError as error:
            yield str(error)
