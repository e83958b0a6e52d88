"""The numbers of a DeepSeek-V2/V3/R1 model, from a Hugging Face config.json or from GGUF metadata."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError

ARCHITECTURES = {"DeepseekV3ForCausalLM", "DeepseekV2ForCausalLM"}
MAX_SIZE, MAX_LAYERS, MAX_EXPERTS = 1 << 24, 1 << 12, 1 << 17  # the last of all layers; R1 has 15,616
GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_*


@dataclass(frozen=True)
class Yarn:
    """YaRN context extension: the factors that shape rotary frequencies and the softmax scale."""

    factor: float
    original_context: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def attention_factor(self) -> float:
        """mscale of DeepSeek's modelling code: the softmax scale is multiplied by its square."""
        return 0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


@dataclass(frozen=True)
class DeepseekConfig:
    """Everything the layer mathematics, the tensor list and the metadata need. q_lora None: a plain q projection."""

    n_layer: int
    d: int
    n_head: int
    q_lora: int | None
    kv_lora: int
    qk_nope: int
    qk_rope: int
    v_head: int
    n_ff: int
    n_ff_exp: int
    n_dense: int
    n_expert: int
    n_used: int
    n_shared: int
    n_group: int
    n_group_used: int
    scoring: str
    norm_weights: bool
    weights_scale: float
    has_bias: bool
    n_vocab: int
    n_context: int
    rms_eps: float
    rope_base: float
    yarn: Yarn | None
    bos: int
    eos: int
    tied: bool = False
    group_score: str = "top2"  # noaux_tc scores a group by its two best experts; V2 by its best

    @property
    def n_moe(self) -> int:
        return self.n_layer - self.n_dense

    @property
    def qk_head(self) -> int:
        return self.qk_nope + self.qk_rope

    @property
    def softmax_scale(self) -> float:
        mscale = self.yarn.attention_factor if self.yarn else 1.0
        return self.qk_head**-0.5 * mscale * mscale

    def is_moe(self, layer: int) -> bool:
        return layer >= self.n_dense

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "DeepseekConfig":
        """Read config.json. QuantkitError names the key that is missing or not supported."""
        names = config.get("architectures") or []
        if not isinstance(names, list) or not any(name in names for name in ARCHITECTURES):
            raise QuantkitError(f"config.json: architecture {names or 'missing'} is not one of {sorted(ARCHITECTURES)}")
        try:
            return cls._from_hf(config, is_v3="DeepseekV3ForCausalLM" in names)
        except KeyError as missing:
            raise QuantkitError(f"config.json: key {missing} is missing") from None
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise QuantkitError(f"config.json: {error}") from None

    @classmethod
    def _from_hf(cls, c: Mapping[str, Any], is_v3: bool) -> "DeepseekConfig":
        if c.get("moe_layer_freq", 1) != 1:
            raise QuantkitError(f"config.json: moe_layer_freq {c['moe_layer_freq']} is not supported, only 1")
        if c.get("attention_bias"):
            raise QuantkitError("config.json: attention_bias true is not supported")
        method = c.get("topk_method", "noaux_tc" if is_v3 else "greedy")
        if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
            raise QuantkitError(f"config.json: topk_method {method!r} is not supported")
        grouped = method != "greedy"
        config = cls(
            n_layer=int(c["num_hidden_layers"]),
            d=int(c["hidden_size"]),
            n_head=int(c["num_attention_heads"]),
            q_lora=None if c.get("q_lora_rank") is None else int(c["q_lora_rank"]),
            kv_lora=int(c["kv_lora_rank"]),
            qk_nope=int(c["qk_nope_head_dim"]),
            qk_rope=int(c["qk_rope_head_dim"]),
            v_head=int(c["v_head_dim"]),
            n_ff=int(c["intermediate_size"]),
            n_ff_exp=int(c["moe_intermediate_size"]),
            n_dense=int(c.get("first_k_dense_replace", 0)),
            n_expert=int(c["n_routed_experts"]),
            n_used=int(c["num_experts_per_tok"]),
            n_shared=int(c.get("n_shared_experts") or 0),
            n_group=int(c.get("n_group") or 1) if grouped else 1,
            n_group_used=int(c.get("topk_group") or 1) if grouped else 1,
            scoring=str(c.get("scoring_func", "sigmoid" if is_v3 else "softmax")),
            norm_weights=bool(c.get("norm_topk_prob", is_v3)),
            weights_scale=float(c.get("routed_scaling_factor", 1.0)),
            has_bias=method == "noaux_tc",
            n_vocab=int(c["vocab_size"]),
            n_context=int(c.get("max_position_embeddings", 4096)),
            rms_eps=float(c.get("rms_norm_eps", 1e-6)),
            rope_base=float(c.get("rope_theta", 10000.0)),
            yarn=_yarn_from_hf(c.get("rope_scaling")),
            bos=_token_id(c, "bos_token_id", 0),
            eos=_token_id(c, "eos_token_id", 1),
            tied=bool(c.get("tie_word_embeddings", False)),
            group_score="top2" if method == "noaux_tc" else "max",
        )
        config._check("config.json")
        return config

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> "DeepseekConfig":
        """Read the `deepseek2.*` keys exactly as llama.cpp does, its defaults for absent keys included."""
        try:
            return cls._from_gguf(metadata)
        except KeyError as missing:
            raise QuantkitError(f"GGUF metadata: {missing} is missing") from None
        except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
            raise QuantkitError(f"GGUF metadata: deepseek2 keys are of the wrong type ({error})") from None

    @classmethod
    def _from_gguf(cls, metadata: Mapping[str, Any]) -> "DeepseekConfig":
        if metadata.get("general.architecture") != "deepseek2":
            raise QuantkitError(f"architecture {metadata.get('general.architecture')!r} is not deepseek2")

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
        config = cls(
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
        config._check("GGUF metadata")
        return config

    def to_hf(self) -> dict[str, Any]:
        """config.json as DeepSeek writes it, all keys that modelling code reads. Floats of a GGUF are float32: six
        digits restore the numbers they were made from."""
        v3 = self.scoring == "sigmoid"
        yarn = (
            None
            if self.yarn is None
            else {
                "type": "yarn",
                "factor": _short(self.yarn.factor),
                "original_max_position_embeddings": self.yarn.original_context,
                "beta_fast": _short(self.yarn.beta_fast),
                "beta_slow": _short(self.yarn.beta_slow),
                "mscale": _short(self.yarn.mscale_all_dim),
                "mscale_all_dim": _short(self.yarn.mscale_all_dim),
            }
        )
        grouped = "group_limited_greedy" if self.n_group > 1 else "greedy"
        return {
            "architectures": ["DeepseekV3ForCausalLM" if v3 else "DeepseekV2ForCausalLM"],
            "model_type": "deepseek_v3" if v3 else "deepseek_v2",
            "torch_dtype": "bfloat16",
            "vocab_size": self.n_vocab,
            "hidden_size": self.d,
            "intermediate_size": self.n_ff,
            "moe_intermediate_size": self.n_ff_exp,
            "num_hidden_layers": self.n_layer,
            "first_k_dense_replace": self.n_dense,
            "moe_layer_freq": 1,
            "num_attention_heads": self.n_head,
            "num_key_value_heads": self.n_head,
            "q_lora_rank": self.q_lora,
            "kv_lora_rank": self.kv_lora,
            "qk_nope_head_dim": self.qk_nope,
            "qk_rope_head_dim": self.qk_rope,
            "v_head_dim": self.v_head,
            "n_routed_experts": self.n_expert,
            "num_experts_per_tok": self.n_used,
            "n_shared_experts": self.n_shared or None,
            "n_group": self.n_group,
            "topk_group": self.n_group_used,
            "topk_method": "noaux_tc" if self.has_bias else grouped,
            "scoring_func": self.scoring,
            "norm_topk_prob": self.norm_weights,
            "routed_scaling_factor": _short(self.weights_scale),
            "ep_size": 1,
            "seq_aux": True,
            "aux_loss_alpha": 0.001,
            "rms_norm_eps": _short(self.rms_eps),
            "rope_theta": _short(self.rope_base),
            "rope_scaling": yarn,
            "max_position_embeddings": self.n_context,
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "pretraining_tp": 1,
            "use_cache": True,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": self.eos,
        }

    def _check(self, where: str) -> None:
        sizes = (
            self.n_layer,
            self.d,
            self.n_head,
            self.kv_lora,
            self.qk_nope,
            self.qk_rope,
            self.v_head,
            self.n_ff,
            self.n_ff_exp,
            self.n_expert,
            self.n_used,
            self.n_group,
            self.n_group_used,
            self.n_vocab,
        )
        whole = (*sizes, self.n_dense, self.n_shared, self.q_lora or 0, self.n_context, self.bos, self.eos)
        if not all(type(number) is int for number in whole):
            raise QuantkitError(f"{where}: a size or token id is not a whole number")
        many = self.n_layer > MAX_LAYERS or self.n_layer * self.n_expert > MAX_EXPERTS
        if many or max(*sizes, self.n_shared) > MAX_SIZE:
            raise QuantkitError(
                f"{where}: {self.n_layer} layers of {self.n_expert} experts, or another size, are beyond any model"
            )
        if min(sizes) < 1 or not 0 <= self.n_dense <= self.n_layer or self.n_shared < 0:
            raise QuantkitError(f"{where}: sizes must be positive and dense layers at most {self.n_layer}")
        if self.scoring not in GATING:
            raise QuantkitError(f"{where}: scoring_func {self.scoring!r} is not one of {sorted(GATING)}")
        if self.n_expert % self.n_group or self.n_group_used > self.n_group:
            raise QuantkitError(f"{where}: {self.n_expert} experts do not fall into {self.n_group} equal groups")
        if self.n_used > self.n_group_used * (self.n_expert // self.n_group):
            raise QuantkitError(f"{where}: top-{self.n_used} needs more experts than the kept groups hold")
        yarn = tuple(vars(self.yarn).values()) if self.yarn else ()
        floats = (self.rms_eps, self.rope_base, self.weights_scale, *yarn)
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in floats):
            raise QuantkitError(f"{where}: epsilon, scale or rope parameters are not finite numbers")
        positive = (self.rope_base, *yarn[:2], 1 if self.q_lora is None else self.q_lora)  # yarn: factor, context
        if self.rms_eps < 0 or min(positive) <= 0:
            raise QuantkitError(f"{where}: epsilon, q_lora or a rope parameter is negative or zero")
        if self.qk_rope % 2:
            raise QuantkitError(f"{where}: qk_rope_head_dim {self.qk_rope} is odd")


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _token_id(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key, default)
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
