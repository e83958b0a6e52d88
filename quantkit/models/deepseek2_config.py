"""config.json of DeepSeek-V2, V3 and R1: every key of transformers' DeepseekV2Config and DeepseekV3Config, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.models.config import ModelConfig, Yarn
from quantkit.models.hf_config import WHERE, ConfigClass, Keys, rope

V2, V3 = "DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM"
KIMI = "KimiK25ForConditionalGeneration"  # K2.5, K2.6: a text model of class V3 that also sees (formats/text_model.py)
HF_ARCHITECTURES: tuple[str, ...] = (V2, V3, KIMI)
READ = frozenset(
    """vocab_size hidden_size intermediate_size moe_intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts
    n_shared_experts num_experts_per_tok rope_theta rope_scaling rope_parameters original_max_position_embeddings
    """.split()
)
# Derived from others, of the loss, of how experts are spread over machines, or of the MTP layer, which no file holds.
NEUTRAL = frozenset(
    """head_dim qk_head_dim ep_size seq_aux aux_loss_alpha router_aux_loss_coef num_nextn_predict_layers
    num_mtp_layers""".split()
)
FIXED: Mapping[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),  # llama.cpp turns neighbours, whatever a file says
}
# What an absent key means; where DeepSeek's own class and transformers' differ there is no default.
CLASSES: Mapping[str, ConfigClass] = {
    V3: ConfigClass(
        {
            "n_group": 8,
            "topk_group": 4,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "first_k_dense_replace": 3,
            "n_shared_experts": 1,
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        READ,
        NEUTRAL,
        FIXED,
        {"num_local_experts": "n_routed_experts"},
    ),
    V2: ConfigClass(
        {
            "n_group": None,
            "topk_group": None,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "first_k_dense_replace": 0,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": False,
        },
        READ,
        NEUTRAL,
        FIXED,
        {"num_experts": "n_routed_experts"},
    ),
}
ALSO: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}
METHODS = {"noaux_tc": "sigmoid", "greedy": "softmax", "group_limited_greedy": "softmax"}


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json. KeyError for a key that is missing, QuantkitError for what is not supported."""
    name = _class_of(raw)
    return numbers(raw, CLASSES[name].settled(raw), name)


def numbers(raw: Mapping[str, Any], keys: Keys, name: str) -> ModelConfig:
    """Those that all models with MLA and routed experts have. keys: of config.json, settled; name: of its class."""
    method = _method(keys, name)
    grouped = method != "greedy"
    n_head, n_context = keys.whole("num_attention_heads"), keys.whole("max_position_embeddings")
    if raw.get("num_key_value_heads") is not None and keys.whole("num_key_value_heads") != n_head:
        raise QuantkitError(
            f"{WHERE}: num_key_value_heads {raw['num_key_value_heads']} is not supported, only {n_head} as "
            "num_attention_heads"
        )
    rope_base, yarn = rope(raw, n_context)
    return ModelConfig(
        architecture="deepseek2",
        n_layer=keys.whole("num_hidden_layers"),
        d=keys.whole("hidden_size"),
        n_head=n_head,
        q_lora=keys.optional("q_lora_rank"),
        kv_lora=keys.whole("kv_lora_rank"),
        qk_nope=keys.whole("qk_nope_head_dim"),
        qk_rope=keys.whole("qk_rope_head_dim"),
        v_head=keys.whole("v_head_dim"),
        n_ff=keys.whole("intermediate_size"),
        n_ff_exp=keys.whole("moe_intermediate_size"),
        n_dense=keys.whole("first_k_dense_replace"),
        n_expert=keys.whole("n_routed_experts"),
        n_used=keys.whole("num_experts_per_tok"),
        n_shared=keys.optional("n_shared_experts") or 0,
        n_group=keys.whole("n_group") if grouped else 1,
        n_group_used=keys.whole("topk_group") if grouped else 1,
        scoring=METHODS[method],
        norm_weights=keys.flag("norm_topk_prob"),
        weights_scale=keys.real("routed_scaling_factor"),
        has_bias=method == "noaux_tc",
        n_vocab=keys.whole("vocab_size"),
        n_context=n_context,
        rms_eps=keys.real("rms_norm_eps"),
        rope_base=rope_base,
        yarn=Yarn(**yarn) if yarn else None,
        bos=token_id(raw, "bos_token_id", 0),
        eos=token_id(raw, "eos_token_id", 1),
        tied=keys.flag("tie_word_embeddings"),
        group_score="top2" if method == "noaux_tc" else "max",
    )


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """What config.json says that nobody knows the meaning of: `key value`."""
    return CLASSES[_class_of(raw)].unknown(raw)


def _class_of(raw: Mapping[str, Any]) -> str:
    return V3 if {V3, KIMI} & set(raw["architectures"]) else V2


def _method(keys: Keys, name: str) -> str:
    """How experts are chosen, with what goes together in a model that there is."""
    method, scoring = keys.word("topk_method"), keys.word("scoring_func")
    if method not in METHODS or (name != V2 and method != "noaux_tc"):
        only = "noaux_tc" if name != V2 else " ".join(METHODS)
        raise QuantkitError(f"{WHERE}: topk_method {method!r} is not supported in a {name}, only {only}")
    if scoring != METHODS[method]:
        raise QuantkitError(
            f"{WHERE}: scoring_func {scoring!r} with topk_method {method} is not supported, only {METHODS[method]}"
        )
    if method != "noaux_tc" and keys.flag("norm_topk_prob"):
        # DeepSeek's own code then normalises and does not scale; transformers scales and does not normalise.
        raise QuantkitError(f"{WHERE}: norm_topk_prob true is not supported with topk_method {method}: only false")
    return method


def token_id(raw: Mapping[str, Any], key: str, default: int) -> int:
    """The first token of a key that may list several."""
    value = raw.get(key, default)
    value = next(iter(value), None) if isinstance(value, list) else value
    return default if value is None else Keys({key: value}).whole(key)


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """config.json as DeepSeek writes it, all keys that modelling code reads. Floats of a GGUF are float32: six digits
    restore the numbers they were made from."""
    v3 = c.scoring == "sigmoid"
    grouped = "group_limited_greedy" if c.n_group > 1 else "greedy"
    head = {
        "architectures": [V3 if v3 else V2],
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
        "routed_scaling_factor": short(c.weights_scale),
        **{"ep_size": 1, "seq_aux": True, "aux_loss_alpha": 0.001},
    }
    rest = {
        "rms_norm_eps": short(c.rms_eps),
        "rope_theta": short(c.rope_base),
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
        "factor": short(yarn.factor),
        "original_max_position_embeddings": yarn.original_context,
        "beta_fast": short(yarn.beta_fast),
        "beta_slow": short(yarn.beta_slow),
        "mscale": short(yarn.mscale_all_dim),
        "mscale_all_dim": short(yarn.mscale_all_dim),
    }


def short(number: float) -> float:
    """A float32 of a GGUF as the number that it was made from: six digits restore it."""
    return float(f"{number:.6g}")
