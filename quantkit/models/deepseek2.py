"""DeepSeek-V2, V3 and R1: GGUF architecture `deepseek2`. The one file that knows this family (see `family.Family`).

Names, shapes and keys are llama.cpp's. The layout `split` writes attn_k_b and attn_v_b (current llama.cpp,
KTransformers >= 0.3.2), `combined` the attn_kv_b of older files. llama.cpp refuses a file that holds both.
"""

from collections.abc import Mapping
from typing import Any

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_values import F32, U32
from quantkit.models.config import Mla, ModelConfig, Yarn
from quantkit.tensors import Assembly, TensorSpec, Weights

ARCHITECTURE = "deepseek2"
HF_ARCHITECTURES: tuple[str, ...] = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
LAYOUTS: tuple[Mla, ...] = ("split", "combined")
PRE: Mapping[str, tuple[str, ...]] = {
    "deepseek-v3": (  # numbers in threes, CJK runs, words and the rest
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    )
}
GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_*


# config.json


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json. KeyError for a key that is missing, QuantkitError for what is not supported."""
    is_v3 = "DeepseekV3ForCausalLM" in raw["architectures"]
    if raw.get("moe_layer_freq", 1) != 1:
        raise QuantkitError(f"config.json: moe_layer_freq {raw['moe_layer_freq']} is not supported, only 1")
    if raw.get("attention_bias"):
        raise QuantkitError("config.json: attention_bias true is not supported")
    method = raw.get("topk_method", "noaux_tc" if is_v3 else "greedy")
    if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise QuantkitError(f"config.json: topk_method {method!r} is not supported")
    grouped = method != "greedy"
    return ModelConfig(
        architecture=ARCHITECTURE,
        n_layer=int(raw["num_hidden_layers"]),
        d=int(raw["hidden_size"]),
        n_head=int(raw["num_attention_heads"]),
        q_lora=None if raw.get("q_lora_rank") is None else int(raw["q_lora_rank"]),
        kv_lora=int(raw["kv_lora_rank"]),
        qk_nope=int(raw["qk_nope_head_dim"]),
        qk_rope=int(raw["qk_rope_head_dim"]),
        v_head=int(raw["v_head_dim"]),
        n_ff=int(raw["intermediate_size"]),
        n_ff_exp=int(raw["moe_intermediate_size"]),
        n_dense=int(raw.get("first_k_dense_replace", 0)),
        n_expert=int(raw["n_routed_experts"]),
        n_used=int(raw["num_experts_per_tok"]),
        n_shared=int(raw.get("n_shared_experts") or 0),
        n_group=int(raw.get("n_group") or 1) if grouped else 1,
        n_group_used=int(raw.get("topk_group") or 1) if grouped else 1,
        scoring=str(raw.get("scoring_func", "sigmoid" if is_v3 else "softmax")),
        norm_weights=bool(raw.get("norm_topk_prob", is_v3)),
        weights_scale=float(raw.get("routed_scaling_factor", 1.0)),
        has_bias=method == "noaux_tc",
        n_vocab=int(raw["vocab_size"]),
        n_context=int(raw.get("max_position_embeddings", 4096)),
        rms_eps=float(raw.get("rms_norm_eps", 1e-6)),
        rope_base=float(raw.get("rope_theta", 10000.0)),
        yarn=_yarn_from_hf(raw.get("rope_scaling")),
        bos=_token_id(raw, "bos_token_id", 0),
        eos=_token_id(raw, "eos_token_id", 1),
        tied=bool(raw.get("tie_word_embeddings", False)),
        group_score="top2" if method == "noaux_tc" else "max",
    )


def _token_id(raw: Mapping[str, Any], key: str, default: int) -> int:
    value = raw.get(key, default)
    return int(value[0] if isinstance(value, list) else default if value is None else value)


def _yarn_from_hf(scaling: Mapping[str, Any] | None) -> Yarn | None:
    if not scaling:
        return None
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind != "yarn":
        raise QuantkitError(f"config.json: rope_scaling type {kind!r} is not supported, only yarn")
    mscale, mscale_all = float(scaling.get("mscale", 1)), float(scaling.get("mscale_all_dim", 0))
    if mscale != mscale_all:
        # llama.cpp assumes the two cancel in cos and sin; a file of any other model would compute wrongly there.
        raise QuantkitError(f"config.json: rope_scaling mscale {mscale} differs from mscale_all_dim {mscale_all}")
    return Yarn(
        factor=float(scaling["factor"]),
        original_context=int(scaling["original_max_position_embeddings"]),
        beta_fast=float(scaling.get("beta_fast", 32)),
        beta_slow=float(scaling.get("beta_slow", 1)),
        mscale_all_dim=mscale_all,
    )


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """config.json as DeepSeek writes it, all keys that modelling code reads. Floats of a GGUF are float32: six digits
    restore the numbers they were made from."""
    v3 = c.scoring == "sigmoid"
    grouped = "group_limited_greedy" if c.n_group > 1 else "greedy"
    head = {
        "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v3" if v3 else "deepseek_v2",
        "torch_dtype": "bfloat16",
    }
    experts = {
        "n_routed_experts": c.n_expert,
        "num_experts_per_tok": c.n_used,
        "n_shared_experts": c.n_shared or None,
        "n_group": c.n_group,
        "topk_group": c.n_group_used,
        "topk_method": "noaux_tc" if c.has_bias else grouped,
        "scoring_func": c.scoring,
        "norm_topk_prob": c.norm_weights,
        "routed_scaling_factor": _short(c.weights_scale),
        **{"ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001},
    }
    rest = {
        "rms_norm_eps": _short(c.rms_eps),
        "rope_theta": _short(c.rope_base),
        "rope_scaling": _yarn_to_hf(c.yarn) if c.yarn else None,
        "max_position_embeddings": c.n_context,
        **{"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02},
        **{"pretraining_tp": 1, "use_cache": True},
        "tie_word_embeddings": c.tied,
        "bos_token_id": c.bos,
        "eos_token_id": c.eos,
    }
    return head | _sizes_to_hf(c) | experts | rest


def _sizes_to_hf(c: ModelConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.n_vocab,
        "hidden_size": c.d,
        "intermediate_size": c.n_ff,
        "moe_intermediate_size": c.n_ff_exp,
        "num_hidden_layers": c.n_layer,
        "first_k_dense_replace": c.n_dense,
        "moe_layer_freq": 1,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": c.n_head,
        "q_lora_rank": c.q_lora,
        "kv_lora_rank": c.kv_lora,
        "qk_nope_head_dim": c.qk_nope,
        "qk_rope_head_dim": c.qk_rope,
        "v_head_dim": c.v_head,
    }


def _yarn_to_hf(yarn: Yarn) -> dict[str, Any]:
    return {
        "type": "yarn",
        "factor": _short(yarn.factor),
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": _short(yarn.beta_fast),
        "beta_slow": _short(yarn.beta_slow),
        "mscale": _short(yarn.mscale_all_dim),
        "mscale_all_dim": _short(yarn.mscale_all_dim),
    }


def _short(number: float) -> float:
    return float(f"{number:.6g}")


# GGUF metadata


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """The numbers in the `deepseek2.*` keys, read exactly as llama.cpp does, its defaults for absent keys included."""

    def key(name: str, default: Any = None) -> Any:
        value = metadata.get(f"deepseek2.{name}", default)
        if value is None:
            raise QuantkitError(f"GGUF metadata: deepseek2.{name} is missing")
        return value

    kv_lora, rope = key("attention.kv_lora_rank"), key("rope.dimension_count")
    mla = "deepseek2.attention.key_length_mla" in metadata
    qk = key("attention.key_length_mla" if mla else "attention.key_length")
    gating = {v: k for k, v in GATING.items()}.get(key("expert_gating_func", 1))
    if gating is None:
        raise QuantkitError(f"GGUF metadata: deepseek2.expert_gating_func {key('expert_gating_func')} is unknown")
    n_used = key("expert_used_count")
    return ModelConfig(
        architecture=ARCHITECTURE,
        n_layer=key("block_count"),
        d=key("embedding_length"),
        n_head=key("attention.head_count"),
        q_lora=metadata.get("deepseek2.attention.q_lora_rank"),
        kv_lora=kv_lora,
        qk_nope=qk - rope,
        qk_rope=rope,
        v_head=key("attention.value_length_mla" if mla else "attention.value_length"),
        n_ff=key("feed_forward_length"),
        n_ff_exp=key("expert_feed_forward_length"),
        n_dense=key("leading_dense_block_count", 0),
        n_expert=key("expert_count"),
        n_used=n_used,
        n_shared=key("expert_shared_count", 0),
        n_group=key("expert_group_count", 1),
        n_group_used=key("expert_group_used_count", 1),
        scoring=gating,
        norm_weights=key("expert_weights_norm", False),
        weights_scale=key("expert_weights_scale", 1.0),
        has_bias=gating == "sigmoid",
        n_vocab=key("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None),
        n_context=key("context_length"),
        rms_eps=key("attention.layer_norm_rms_epsilon"),
        rope_base=key("rope.freq_base", 10000.0),
        yarn=_yarn_from_gguf(metadata),
        bos=metadata.get("tokenizer.ggml.bos_token_id", 0),
        eos=metadata.get("tokenizer.ggml.eos_token_id", 1),
        group_score="top2" if gating == "sigmoid" else "max",
    )


def _yarn_from_gguf(metadata: Mapping[str, Any]) -> Yarn | None:
    prefix = "deepseek2.rope.scaling."
    if metadata.get(prefix + "type") != "yarn":
        return None
    return Yarn(
        factor=metadata[prefix + "factor"],
        original_context=metadata[prefix + "original_context_length"],
        beta_fast=metadata.get(prefix + "yarn_beta_fast", 32.0),
        beta_slow=metadata.get(prefix + "yarn_beta_slow", 1.0),
        mscale_all_dim=10.0 * metadata.get(prefix + "yarn_log_multiplier", 0.0),
    )


def metadata(c: ModelConfig, mla: Mla) -> dict[str, Any]:
    """The `deepseek2.*` keys. llama.cpp loads a file without most of them and silently computes wrongly."""
    split = mla == "split"
    keys: dict[str, Any] = {
        "block_count": U32(c.n_layer),
        "context_length": U32(c.n_context),
        "embedding_length": U32(c.d),
        "feed_forward_length": U32(c.n_ff),
        "attention.head_count": U32(c.n_head),
        "attention.head_count_kv": U32(1 if split else c.n_head),
        "attention.layer_norm_rms_epsilon": F32(c.rms_eps),
        "attention.kv_lora_rank": U32(c.kv_lora),
        "attention.key_length": U32(c.kv_lora + c.qk_rope if split else c.qk_head),
        "attention.value_length": U32(c.kv_lora if split else c.v_head),
        "leading_dense_block_count": U32(c.n_dense),
        "vocab_size": U32(c.n_vocab),
        "expert_count": U32(c.n_expert),
        "expert_used_count": U32(c.n_used),
        "expert_shared_count": U32(c.n_shared),
        "expert_feed_forward_length": U32(c.n_ff_exp),
        "expert_weights_scale": F32(c.weights_scale),
        "expert_weights_norm": c.norm_weights,
        "expert_gating_func": U32(GATING[c.scoring]),
        "expert_group_count": U32(c.n_group),
        "expert_group_used_count": U32(c.n_group_used),
        "rope.dimension_count": U32(c.qk_rope),
        "rope.freq_base": F32(c.rope_base),
    }
    if c.q_lora is not None:
        keys["attention.q_lora_rank"] = U32(c.q_lora)
    if split:
        keys["attention.key_length_mla"] = U32(c.qk_head)
        keys["attention.value_length_mla"] = U32(c.v_head)
    if c.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": F32(c.yarn.factor),
            "rope.scaling.original_context_length": U32(c.yarn.original_context),
            "rope.scaling.yarn_log_multiplier": F32(0.1 * c.yarn.mscale_all_dim),
            "rope.scaling.yarn_beta_fast": F32(c.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": F32(c.yarn.beta_slow),
        }
    return {f"deepseek2.{key}": value for key, value in keys.items()}


# Tensors


def specs(c: ModelConfig, mla: Mla) -> list[TensorSpec]:
    """All tensors of the output file, in file order."""
    out = [TensorSpec("token_embd.weight", (c.n_vocab, c.d), "token_embd", None, ("model.embed_tokens.weight",))]
    for layer in range(c.n_layer):
        out += _attention(c, layer, mla)
        out += _moe(c, layer) if c.is_moe(layer) else _feed_forward(layer, "", "mlp.", c.n_ff, c.d)
    out.append(TensorSpec("output_norm.weight", (c.d,), "output_norm", None, ("model.norm.weight",), fixed="F32"))
    if not c.tied:
        out.append(TensorSpec("output.weight", (c.n_vocab, c.d), "output", None, ("lm_head.weight",)))
    return out


def _spec(
    role: str, layer: int, shape: tuple[int, ...], *sources: str, assembly: Assembly = "copy", fixed: str | None = None
) -> TensorSpec:
    full = tuple(f"model.layers.{layer}.{source}.weight" for source in sources)
    return TensorSpec(f"blk.{layer}.{role}.weight", shape, role, layer, full, assembly, fixed)


def _attention(c: ModelConfig, layer: int, mla: Mla) -> list[TensorSpec]:
    def one(role: str, shape: tuple[int, ...], source: str, fixed: str | None = None) -> TensorSpec:
        return _spec(role, layer, shape, source, fixed=fixed)

    out = [one("attn_norm", (c.d,), "input_layernorm", "F32")]
    if c.q_lora is None:
        out.append(one("attn_q", (c.n_head * c.qk_head, c.d), "self_attn.q_proj"))
    else:
        out += [
            one("attn_q_a", (c.q_lora, c.d), "self_attn.q_a_proj"),
            one("attn_q_a_norm", (c.q_lora,), "self_attn.q_a_layernorm", "F32"),
            one("attn_q_b", (c.n_head * c.qk_head, c.q_lora), "self_attn.q_b_proj"),
        ]
    out += [
        one("attn_kv_a_mqa", (c.kv_lora + c.qk_rope, c.d), "self_attn.kv_a_proj_with_mqa"),
        one("attn_kv_a_norm", (c.kv_lora,), "self_attn.kv_a_layernorm", "F32"),
    ]
    kv_b = "self_attn.kv_b_proj"
    if mla == "split":
        out += [
            _spec("attn_k_b", layer, (c.n_head, c.kv_lora, c.qk_nope), kv_b, assembly="k_b"),
            _spec("attn_v_b", layer, (c.n_head, c.v_head, c.kv_lora), kv_b, assembly="v_b"),
        ]
    else:
        out.append(one("attn_kv_b", (c.n_head * (c.qk_nope + c.v_head), c.kv_lora), kv_b))
    out += [
        one("attn_output", (c.d, c.n_head * c.v_head), "self_attn.o_proj"),
        one("ffn_norm", (c.d,), "post_attention_layernorm", "F32"),
    ]
    return out


def _feed_forward(layer: int, suffix: str, prefix: str, n_ff: int, d: int) -> list[TensorSpec]:
    return [
        _spec(f"ffn_gate{suffix}", layer, (n_ff, d), prefix + "gate_proj"),
        _spec(f"ffn_up{suffix}", layer, (n_ff, d), prefix + "up_proj"),
        _spec(f"ffn_down{suffix}", layer, (d, n_ff), prefix + "down_proj"),
    ]


def _moe(c: ModelConfig, layer: int) -> list[TensorSpec]:
    def stack(role: str, n_out: int, n_in: int, projection: str) -> TensorSpec:
        experts = (f"mlp.experts.{e}.{projection}" for e in range(c.n_expert))
        return _spec(role, layer, (c.n_expert, n_out, n_in), *experts, assembly="stack")

    out = [_spec("ffn_gate_inp", layer, (c.n_expert, c.d), "mlp.gate", fixed="F32")]
    if c.has_bias:
        source = f"model.layers.{layer}.mlp.gate.e_score_correction_bias"
        name = f"blk.{layer}.exp_probs_b.bias"
        out.append(TensorSpec(name, (c.n_expert,), "exp_probs_b", layer, (source,), fixed="F32"))
    out += [
        stack("ffn_gate_exps", c.n_ff_exp, c.d, "gate_proj"),
        stack("ffn_up_exps", c.n_ff_exp, c.d, "up_proj"),
        stack("ffn_down_exps", c.d, c.n_ff_exp, "down_proj"),
    ]
    if c.n_shared:
        out += _feed_forward(layer, "_shexp", "mlp.shared_experts.", c.n_ff_exp * c.n_shared, c.d)
    return out


def assemble(
    weights: Weights, c: ModelConfig, spec: TensorSpec, head: int, rows: tuple[int, int], device: str
) -> torch.Tensor:
    """Rows of a head's k_b or v_b, float32 [rows, n_in], cut out of kv_b_proj [n_head (qk_nope + v_head), kv_lora]."""
    (source,), (start, stop) = spec.sources, rows
    k = head * (c.qk_nope + c.v_head)
    v = k + c.qk_nope
    if spec.assembly == "v_b":
        return weights.read(source, v + start, v + stop, device=device)
    return weights.read(source, k, v, device=device).T[start:stop].contiguous()
