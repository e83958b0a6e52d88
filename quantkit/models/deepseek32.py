"""DeepSeek-V3.2: GGUF architecture `deepseek32`, which is `deepseek2` with an indexer in every layer (DeepSeek sparse
attention, arXiv 2512.02556, 2.1). All that is known of this family (see `family.Family` and `family.ConfigFile`).

The functions with other names serve families that are like it (glm_dsa.py). Up to index_topk tokens a model of it
computes what `deepseek2` does without the indexer, bit for bit.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_values import U32
from quantkit.models import deepseek2, deepseek2_config
from quantkit.models.config import MAX_LAYERS, Indexer, Mla, ModelConfig
from quantkit.models.hf_config import WHERE, ConfigClass, Keys
from quantkit.tensors import TensorSpec

ARCHITECTURE = "deepseek32"
LAYOUTS: tuple[Mla, ...] = ("split",)  # llama.cpp: "DEEPSEEK32 architecture requires MLA"
PRE: Mapping[str, tuple[str, ...]] = {"deepseek-v3": deepseek2.PRE["deepseek-v3"]}
CHAT_TEMPLATE: str | None = None
HF_ARCHITECTURES: tuple[str, ...] = ("DeepseekV32ForCausalLM",)
assemble = deepseek2.assemble

READ = deepseek2_config.READ | {"index_n_heads", "index_head_dim", "index_topk", "mlp_layer_types", "layer_types"}
CLASS = ConfigClass(
    {**deepseek2_config.CLASSES[deepseek2_config.V3].defaults, "index_n_heads": 64, "index_head_dim": 128}
    | {"index_topk": 2048},
    READ,
    deepseek2_config.NEUTRAL,
    {**deepseek2_config.FIXED, "indexer_rope_interleave": (False, None)},
    {"num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"},
)
SOURCES = {  # role -> of which tensor of the checkpoint's indexer
    "indexer.attn_q_b": "wq_b.weight",
    "indexer.attn_k": "wk.weight",
    "indexer.proj": "weights_proj.weight",
    "indexer.k_norm": "k_norm.weight",
    "indexer.k_norm_b": "k_norm.bias",
}


# config.json


def without_indexer(raw: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of the same weights without the indexer's, whose every token attends to all before it."""
    own = (*(key for key in raw if key.startswith("index")), "mlp_layer_types", "layer_types")
    return {key: value for key, value in raw.items() if key not in own} | {
        "architectures": [deepseek2_config.V3],
        "model_type": "deepseek_v3",
    }


ALSO: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {deepseek2.ARCHITECTURE: without_indexer}


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json, as `family.ConfigFile`."""
    keys = CLASS.settled(raw)
    return indexed(raw, keys, ARCHITECTURE, Indexer(*sizes(keys), interleaved=False, full=()))


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """As `family.ConfigFile`."""
    return CLASS.unknown(raw)


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """config.json as DeepSeek writes it."""
    return deepseek2_config.to_hf(c) | {
        "architectures": list(HF_ARCHITECTURES),
        "model_type": "deepseek_v32",
        **sizes_to_hf(c),
    }


def sizes(keys: Keys) -> tuple[int, int, int]:
    """Heads, width and top-k of config.json."""
    n_head, width, top_k = (keys.whole(f"index_{key}") for key in ("n_heads", "head_dim", "topk"))
    return n_head, width, top_k


def indexed(raw: Mapping[str, Any], keys: Keys, architecture: str, indexer: Indexer) -> ModelConfig:
    """The numbers of a model with an indexer. keys: of config.json, settled. indexer.full: () for every layer."""
    c = deepseek2_config.numbers(raw, keys, raw["architectures"][0])
    kinds = keys.values.get("mlp_layer_types")
    if kinds is not None and (
        len(kinds) != c.n_layer
        or kinds != ["dense"] * min(c.n_dense, c.n_layer) + ["sparse"] * max(0, c.n_layer - c.n_dense)
    ):
        raise QuantkitError(
            f"{WHERE}: mlp_layer_types does not say that the first {c.n_dense} layers (first_k_dense_replace) of "
            f"{c.n_layer} are dense, and all others sparse"
        )
    kinds = keys.values.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"indexed_attention", "full_attention"}):
        raise QuantkitError(f"{WHERE}: layer_types has other attention than indexed_attention")
    return replace(
        c,
        architecture=architecture,
        indexer=replace(indexer, full=indexer.full or (True,) * min(c.n_layer, MAX_LAYERS)),
    )


def sizes_to_hf(c: ModelConfig) -> dict[str, Any]:
    """The indexer's keys of config.json."""
    assert c.indexer
    return {"index_n_heads": c.indexer.n_head, "index_head_dim": c.indexer.width, "index_topk": c.indexer.top_k}


# GGUF


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """As llama.cpp reads them (src/models/deepseek32.cpp)."""
    c = deepseek2.from_gguf(metadata)
    return replace(c, indexer=indexer_from_gguf(metadata, False, (True,) * min(c.n_layer, MAX_LAYERS)))


def indexer_from_gguf(metadata: Mapping[str, Any], interleaved: bool, full: tuple[bool, ...]) -> Indexer:
    """The `attention.indexer.*` keys of either architecture."""
    keys = ("head_count", "key_length", "top_k")
    n_head, width, top_k = (deepseek2.required(metadata, f"attention.indexer.{key}") for key in keys)
    return Indexer(n_head, width, top_k, interleaved, full)


def metadata(c: ModelConfig, mla: Mla) -> dict[str, Any]:
    """deepseek2's keys, and the indexer's."""
    assert c.indexer
    numbers = {"head_count": c.indexer.n_head, "key_length": c.indexer.width, "top_k": c.indexer.top_k}
    own = {f"{c.architecture}.attention.indexer.{key}": U32(value) for key, value in numbers.items()}
    return deepseek2.metadata(c, mla) | own


def specs(c: ModelConfig, mla: Mla) -> list[TensorSpec]:
    """deepseek2's tensors, and the indexer's after the attention of each layer that has one."""
    out = []
    for spec in deepseek2.specs(c, mla):
        out.append(spec)
        if spec.role == "attn_output" and spec.layer is not None and c.has_indexer(spec.layer):
            out += _indexer(c, spec.layer)
    return out


def _indexer(c: ModelConfig, layer: int) -> list[TensorSpec]:
    assert c.indexer and c.q_lora
    n_head, width = c.indexer.n_head, c.indexer.width

    def one(role: str, name: str, shape: tuple[int, ...], fixed: str | None = None) -> TensorSpec:
        source = f"model.layers.{layer}.self_attn.indexer.{SOURCES[role]}"
        return TensorSpec(f"blk.{layer}.indexer.{name}", shape, role, layer, (source,), fixed=fixed)

    return [
        one("indexer.attn_q_b", "attn_q_b.weight", (n_head * width, c.q_lora)),
        one("indexer.attn_k", "attn_k.weight", (width, c.d)),
        one("indexer.proj", "proj.weight", (n_head, c.d), "F32"),
        one("indexer.k_norm", "k_norm.weight", (width,), "F32"),
        one("indexer.k_norm_b", "k_norm.bias", (width,), "F32"),
    ]
