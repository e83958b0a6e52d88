"""GLM-5, 5.1 and 5.2: GGUF architecture `glm-dsa`, which is `deepseek32` with an indexer whose rotary embedding turns
neighbours, and which some layers leave to those before them (IndexShare, arXiv 2603.12201). All that is known of this
family (see `family.Family` and `family.ConfigFile`).
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.models import deepseek2, deepseek2_config, deepseek32
from quantkit.models.config import MAX_LAYERS, Indexer, Mla, ModelConfig
from quantkit.models.hf_config import WHERE, ConfigClass, Keys

ARCHITECTURE = "glm-dsa"
LAYOUTS = deepseek32.LAYOUTS
PRE: Mapping[str, tuple[str, ...]] = {
    "glm4": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    )
}
CHAT_TEMPLATE: str | None = None
HF_ARCHITECTURES: tuple[str, ...] = ("GlmMoeDsaForCausalLM",)
FREQUENCY, OFFSET = 1, 2  # transformers' defaults: every layer has an indexer
LONG_CONTEXT = 1 << 20  # from which on llama.cpp takes a file without indexer types for GLM-5.2
assemble, specs = deepseek2.assemble, deepseek32.specs
UNSAID = {"index_n_heads": 32, "n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "max_position_embeddings": 202752}
CLASS = ConfigClass(
    {**deepseek32.CLASS.defaults, **UNSAID},
    deepseek32.READ | {"indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"},
    # Of the MTP layer, and of the precision that a trainer's router has.
    deepseek2_config.NEUTRAL | {"index_share_for_mtp_iteration", "moe_router_dtype"},
    {**deepseek2_config.FIXED, "indexer_rope_interleave": (True, None)},
    deepseek32.CLASS.aliases,
)
ALSO = deepseek2_config.ALSO


# config.json


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json, as `family.ConfigFile`."""
    keys = CLASS.settled(raw)
    indexer = Indexer(*deepseek32.sizes(keys), interleaved=True, full=_full(keys, keys.whole("num_hidden_layers")))
    return deepseek32.indexed(raw, keys, ARCHITECTURE, indexer)


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """As `family.ConfigFile`."""
    return CLASS.unknown(raw)


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """config.json as Z.ai writes it."""
    assert c.indexer
    old = deepseek2_config.to_hf(c)
    rope = {"rope_theta": old.pop("rope_theta"), "rope_type": "default"} | (old.pop("rope_scaling") or {})
    return old | {
        "architectures": list(HF_ARCHITECTURES),
        "model_type": "glm_moe_dsa",
        "rope_parameters": rope,
        **deepseek32.sizes_to_hf(c),
        "indexer_types": ["full" if full else "shared" for full in c.indexer.full],
        "indexer_rope_interleave": True,
    }


def _full(keys: Keys, n_layer: int) -> tuple[bool, ...]:
    """Which layers have an indexer: `indexer_types`, or a pattern of letters, or every so many, as transformers reads
    them. What is said twice must agree."""
    values, said = keys.values, dict[str, tuple[bool, ...]]()
    for key, names in (("indexer_types", ("full", "shared")), ("index_topk_pattern", ("F", "S"))):
        kinds = values.get(key)
        if kinds is None:
            continue
        known = {name: i == 0 for i, name in enumerate(("full", "shared"))} | {names[0]: True, names[1]: False}
        if not isinstance(kinds, list | str) or not all(isinstance(k, str) and k in known for k in kinds):
            raise QuantkitError(f"{WHERE}: {key} is not of {names[0]} and {names[1]} alone")
        said[key] = tuple(known[kind] for kind in kinds)
    if values.get("index_topk_freq") is not None and values.get("index_topk_pattern") is None:
        every = max(1, keys.whole("index_topk_freq"))
        offset = OFFSET if values.get("index_skip_topk_offset") is None else keys.whole("index_skip_topk_offset")
        layers = range(min(n_layer, MAX_LAYERS))
        said["index_topk_freq"] = tuple(max(i - offset + 1, 0) % every == 0 for i in layers)
    if len(set(said.values())) > 1:
        raise QuantkitError(f"{WHERE}: {' and '.join(said)} do not name the same layers")
    return next(iter(said.values()), ())


# GGUF


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """As llama.cpp reads them (src/models/glm-dsa.cpp), which gives a file without indexer types GLM-5.2's if its
    context is long."""
    c = deepseek2.from_gguf({f"{ARCHITECTURE}.expert_gating_func": deepseek2.GATING["sigmoid"], **metadata})
    full = metadata.get(f"{ARCHITECTURE}.attention.indexer.types")
    if full is None:
        shares = c.n_context >= LONG_CONTEXT
        full = [not shares or max(i - 2, 0) % 4 == 0 for i in range(min(c.n_layer, MAX_LAYERS))]
    indexer = deepseek32.indexer_from_gguf(metadata, True, tuple(full))
    return replace(c, indexer=indexer)


def metadata(c: ModelConfig, mla: Mla) -> dict[str, Any]:
    """deepseek32's keys, and which layers have an indexer: always, see `from_gguf`."""
    assert c.indexer
    return deepseek32.metadata(c, mla) | {f"{ARCHITECTURE}.attention.indexer.types": list(c.indexer.full)}
