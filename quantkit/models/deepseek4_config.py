"""config.json of DeepSeek-V4: every key of transformers' DeepseekV4Config, what DeepSeek writes instead, and back."""

from collections.abc import Callable, Mapping
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.models.config import Compression, Indexer, ModelConfig, Streams, Yarn
from quantkit.models.deepseek2_config import short, token_id
from quantkit.models.deepseek4 import ARCHITECTURE, OVERLAPPING
from quantkit.models.hf_config import WHERE, ConfigClass, Keys, rope

HF_ARCHITECTURES: tuple[str, ...] = ("DeepseekV4ForCausalLM",)
ALSO: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {}
KINDS = {"sliding_attention": 0, "compressed_sparse_attention": OVERLAPPING, "heavily_compressed_attention": 128}
BY_TOKEN, BY_SCORE = "hash_moe", "moe"
CLASS = ConfigClass(
    {
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.5,
        "norm_topk_prob": True,
        "max_position_embeddings": 1048576,
        "rms_norm_eps": 1e-6,
        "compress_rope_theta": 160000.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "num_hash_layers": 3,
        "swiglu_limit": 10.0,
        "sliding_window": 128,
        "o_groups": 8,
        "o_lora_rank": 1024,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 512,
    },
    frozenset(
        """vocab_size hidden_size moe_intermediate_size num_hidden_layers num_attention_heads head_dim q_lora_rank
        qk_rope_head_dim partial_rotary_factor n_routed_experts num_experts_per_tok rope_theta rope_scaling
        rope_parameters original_max_position_embeddings compress_ratios layer_types mlp_layer_types
        compress_rates""".split()
    ),
    # How experts are stored (their tensors say it), the loss, noise while training, or the MTP layer, in no file.
    frozenset("expert_dtype router_aux_loss_coef router_jitter_noise num_nextn_predict_layers ep_size".split()),
    {
        "hidden_act": ("silu", "swish"),
        "attention_bias": (False, None),
        "mlp_bias": (False, None),
        "num_key_value_heads": (1,),
        "scoring_func": ("sqrtsoftplus",),
        "topk_method": ("noaux_tc", None),
        "norm_topk_prob": (True,),
        "hc_mult": (4,),  # llama.cpp's, and everybody's
        "tie_word_embeddings": (False,),
        "n_group": (1, None),
        "topk_group": (1, None),
    },
    {"num_local_experts": "n_routed_experts", "intermediate_size": "moe_intermediate_size"},
)


def from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """The numbers in config.json, as `family.ConfigFile`."""
    keys = CLASS.settled(raw)
    n_layer, head, n_context = (keys.whole(key) for key in ("num_hidden_layers", "head_dim", "max_position_embeddings"))
    theta, compress_theta, yarn = _rope(raw, keys, n_context)
    ratios, turning = _ratios(keys, n_layer), _turning(keys, head)
    n_head, width, top_k = (keys.whole(f"index_{key}") for key in ("n_heads", "head_dim", "topk"))
    return ModelConfig(
        architecture=ARCHITECTURE,
        n_layer=n_layer,
        d=keys.whole("hidden_size"),
        n_head=keys.whole("num_attention_heads"),
        q_lora=keys.whole("q_lora_rank"),
        kv_lora=head,
        qk_nope=head - turning,
        qk_rope=turning,
        v_head=head,
        n_ff=keys.whole("moe_intermediate_size"),
        n_ff_exp=keys.whole("moe_intermediate_size"),
        n_dense=0,
        n_expert=keys.whole("n_routed_experts"),
        n_used=keys.whole("num_experts_per_tok"),
        n_shared=keys.optional("n_shared_experts") or 0,
        n_group=1,
        n_group_used=1,
        scoring="sqrtsoftplus",
        norm_weights=True,
        weights_scale=keys.real("routed_scaling_factor"),
        has_bias=True,
        n_vocab=keys.whole("vocab_size"),
        n_context=n_context,
        rms_eps=keys.real("rms_norm_eps"),
        rope_base=theta,
        yarn=yarn,
        bos=token_id(raw, "bos_token_id", 0),
        eos=token_id(raw, "eos_token_id", 1),
        indexer=Indexer(n_head, width, top_k, True, tuple(ratio == OVERLAPPING for ratio in ratios)),
        compression=Compression(
            ratios, keys.whole("sliding_window"), compress_theta, keys.whole("o_groups"), keys.whole("o_lora_rank")
        ),
        streams=Streams(keys.whole("hc_mult"), keys.whole("hc_sinkhorn_iters"), keys.real("hc_eps")),
        n_hash=_hash_layers(keys, n_layer),
        limit=keys.real("swiglu_limit"),
    )


def unknown_keys(raw: Mapping[str, Any]) -> list[str]:
    """As `family.ConfigFile`."""
    return CLASS.unknown(raw)


def _listed(keys: Keys, key: str) -> list[Any] | None:
    value = keys.values.get(key)
    if value is not None and not isinstance(value, list):
        raise QuantkitError(f"{WHERE}: {key} {value!r:.60} is not a list")
    return value


def _ratios(keys: Keys, n_layer: int) -> tuple[int, ...]:
    """Of each layer, by `compress_ratios`, whose tail is of layers behind the last, or by transformers' `layer_types`.
    What is said twice must agree."""
    rates = keys.values.get("compress_rates") or {}
    for kind, rate in rates.items():
        if KINDS.get(kind) != rate:
            raise QuantkitError(f"{WHERE}: compress_rates {kind} {rate!r:.20} is not supported, only {KINDS.get(kind)}")
    known: Mapping[str, Mapping[Any, int]] = {
        "compress_ratios": {ratio: ratio for ratio in KINDS.values()},
        "layer_types": KINDS,
    }
    said = set[tuple[int, ...]]()
    for key, meaning in known.items():
        if (given := _listed(keys, key)) is None:
            continue
        if len(given) < n_layer:
            raise QuantkitError(f"{WHERE}: {key} is of {len(given)} layers, num_hidden_layers is {n_layer}")
        for layer, one in enumerate(given[:n_layer]):
            if type(one) not in (int, str) or one not in meaning:
                allowed = " ".join(map(str, meaning))
                raise QuantkitError(f"{WHERE}: {key} of layer {layer} is {one!r:.40}, which is none of {allowed}")
        said.add(tuple(meaning[one] for one in given[:n_layer]))
    if not said:
        raise KeyError("compress_ratios")
    if len(said) > 1:
        raise QuantkitError(f"{WHERE}: compress_ratios and layer_types do not say the same of all layers")
    return said.pop()


def _hash_layers(keys: Keys, n_layer: int) -> int:
    """How many of the first layers route by the token: `num_hash_layers`, or transformers' `mlp_layer_types`."""
    kinds = _listed(keys, "mlp_layer_types")
    if kinds is None:
        return min(n_layer, keys.whole("num_hash_layers"))
    n = kinds.count(BY_TOKEN)
    if kinds != [BY_TOKEN] * n + [BY_SCORE] * (n_layer - n):
        raise QuantkitError(f"{WHERE}: mlp_layer_types is not of {n_layer} layers, first {BY_TOKEN}, then {BY_SCORE}")
    return n


def _turning(keys: Keys, head: int) -> int:
    """Numbers at the end of a head that turn."""
    if keys.values.get("qk_rope_head_dim") is not None:
        return keys.whole("qk_rope_head_dim")
    if keys.values.get("partial_rotary_factor") is None:
        raise KeyError("qk_rope_head_dim")
    return int(head * keys.real("partial_rotary_factor"))


def _rope(raw: Mapping[str, Any], keys: Keys, n_context: int) -> tuple[float, float, Yarn | None]:
    """θ of plain layers, θ of those that compress, and YaRN, which is of these alone and scales no scores."""
    given = raw.get("rope_parameters")
    tables = [table for table in (given, raw.get("rope_scaling")) if isinstance(table, dict)]
    theta, compress = {}, keys.real("compress_rope_theta")
    if isinstance(given, dict) and isinstance(given.get("compress"), dict):
        main, tables = given.get("main") or {}, [given["compress"]]
        if main.get("rope_type", "default") != "default":
            raise QuantkitError(f"{WHERE}: rope_parameters main {main['rope_type']!r:.40} is not default")
        theta = {"rope_theta": main["rope_theta"]} if "rope_theta" in main else {}
        compress = Keys(given["compress"], f"{WHERE}: rope_parameters").real("rope_theta")
    left_out = ("rope_theta", "partial_rotary_factor", "mscale", "mscale_all_dim", "main")
    flat = {key: value for table in tables for key, value in table.items() if key not in left_out}
    kept = {key: value for key, value in raw.items() if key not in ("rope_parameters", "rope_scaling")}
    if flat.get("rope_type", flat.get("type")) == "yarn":
        flat |= {"mscale": 1, "mscale_all_dim": 1}  # they cancel: cos and sin are not scaled, nor are scores
    base, yarn = rope({**kept, **theta, "rope_scaling": flat or None}, n_context)
    return base, compress, Yarn(**{**yarn, "mscale_all_dim": 0.0}) if yarn else None


def to_hf(c: ModelConfig) -> dict[str, Any]:
    """config.json as DeepSeek writes it."""
    assert c.indexer and c.compression and c.streams and c.limit is not None
    scaling = c.yarn and {
        "type": "yarn",
        "factor": short(c.yarn.factor),
        "original_max_position_embeddings": c.yarn.original_context,
        "beta_fast": short(c.yarn.beta_fast),
        "beta_slow": short(c.yarn.beta_slow),
    }
    sizes = {
        "vocab_size": c.n_vocab,
        "hidden_size": c.d,
        "moe_intermediate_size": c.n_ff_exp,
        "num_hidden_layers": c.n_layer,
        "num_attention_heads": c.n_head,
        "num_key_value_heads": 1,
        "head_dim": c.qk_head,
        "qk_rope_head_dim": c.qk_rope,
        "q_lora_rank": c.q_lora,
        "o_groups": c.compression.n_group,
        "o_lora_rank": c.compression.lora,
        "sliding_window": c.compression.window,
        "index_n_heads": c.indexer.n_head,
        "index_head_dim": c.indexer.width,
        "index_topk": c.indexer.top_k,
    }
    experts = {
        "n_routed_experts": c.n_expert,
        "n_shared_experts": c.n_shared,
        "num_experts_per_tok": c.n_used,
        "num_hash_layers": c.n_hash,
        **{"scoring_func": c.scoring, "topk_method": "noaux_tc", "norm_topk_prob": c.norm_weights},
        **{"routed_scaling_factor": short(c.weights_scale), "swiglu_limit": short(c.limit)},
    }
    rest = {
        "compress_ratios": list(c.compression.ratios),
        "compress_rope_theta": short(c.compression.rope_base),
        "hc_mult": c.streams.n,
        "hc_sinkhorn_iters": c.streams.iterations,
        "hc_eps": short(c.streams.eps),
        "rms_norm_eps": short(c.rms_eps),
        "rope_theta": short(c.rope_base),
        "rope_scaling": scaling,
        "max_position_embeddings": c.n_context,
        **{"hidden_act": "silu", "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16"},
        "bos_token_id": c.bos,
        "eos_token_id": c.eos,
    }
    return {"architectures": list(HF_ARCHITECTURES), "model_type": "deepseek_v4", **sizes, **experts, **rest}
