"""DeepSeek-V2, V3 and R1: GGUF architecture `deepseek2`. With deepseek2_config.py all that is known of this family
(see `family.Family`).

Names, shapes and keys are llama.cpp's. The layout `split` writes attn_k_b and attn_v_b (current llama.cpp,
KTransformers >= 0.3.2), `combined` the attn_kv_b of older files. llama.cpp refuses a file that holds both.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_values import F32, U32
from quantkit.models.config import Mla, ModelConfig, Yarn
from quantkit.models.patterns import KIMI_K2
from quantkit.tensors import Assembly, TensorSpec, Weights

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "deepseek2"
LAYOUTS: tuple[Mla, ...] = ("split", "combined")
PRE: Mapping[str, tuple[str, ...]] = {
    "deepseek-v3": (  # numbers in threes, CJK runs, words and the rest
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
        r"""| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+""",
    ),
    "deepseek-llm": (  # V2, V2-Lite: line ends, letters of scripts with case, punctuation, CJK, single digits
        r"[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕ"
        r"ἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛ"
        r"Ꜣ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        r"\p{N}",
    ),
    "kimi-k2": (KIMI_K2,),
}
CHAT_TEMPLATE: str | None = None
ENDS = ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
GATING = {"softmax": 1, "sigmoid": 2}  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_*


# GGUF metadata


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """The numbers in the keys of the file's architecture, `deepseek2.*` or of a family that is like it, read exactly as
    llama.cpp does, its defaults for absent keys included."""
    arch = str(metadata["general.architecture"])

    def key(name: str, default: Any = None) -> Any:
        return required(metadata, name, default)

    kv_lora, rope = key("attention.kv_lora_rank"), key("rope.dimension_count")
    mla = f"{arch}.attention.key_length_mla" in metadata
    qk = key("attention.key_length_mla" if mla else "attention.key_length")
    gating = {v: k for k, v in GATING.items()}.get(key("expert_gating_func", 1))
    if gating is None:
        raise QuantkitError(f"GGUF metadata: {arch}.expert_gating_func {key('expert_gating_func')} is unknown")
    n_used, n_mtp = key("expert_used_count"), key("nextn_predict_layers", 0)
    return ModelConfig(
        architecture=arch,
        n_layer=key("block_count") - n_mtp,
        d=key("embedding_length"),
        n_head=key("attention.head_count"),
        q_lora=metadata.get(f"{arch}.attention.q_lora_rank"),
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
        yarn=yarn_from_gguf(metadata),
        bos=metadata.get("tokenizer.ggml.bos_token_id", 0),
        eos=metadata.get("tokenizer.ggml.eos_token_id", 1),
        more_ends=tuple(metadata[key] for key in ENDS if key in metadata),
        group_score="top2" if gating == "sigmoid" else "max",
        n_mtp=n_mtp,
    )


def required(metadata: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """A key of the file's architecture; QuantkitError if neither it nor a default is there."""
    full = f"{metadata['general.architecture']}.{name}"
    value = metadata.get(full, default)
    if value is None:
        raise QuantkitError(f"GGUF metadata: {full} is missing")
    return value


def yarn_from_gguf(metadata: Mapping[str, Any]) -> Yarn | None:
    """The rotation's scaling; None if there is none."""
    prefix = f"{metadata['general.architecture']}.rope.scaling."
    if metadata.get(prefix + "type") != "yarn":
        return None
    return Yarn(
        factor=metadata[prefix + "factor"],
        original_context=metadata[prefix + "original_context_length"],
        beta_fast=metadata.get(prefix + "yarn_beta_fast", 32.0),
        beta_slow=metadata.get(prefix + "yarn_beta_slow", 1.0),
        mscale_all_dim=10.0 * metadata.get(prefix + "yarn_log_multiplier", 0.0),
    )


def expert_keys(c: ModelConfig) -> dict[str, Any]:
    """How many experts there are, how wide, and how their outputs are weighed: what every family writes."""
    return {
        "expert_count": U32(c.n_expert),
        "expert_used_count": U32(c.n_used),
        "expert_shared_count": U32(c.n_shared),
        "expert_feed_forward_length": U32(c.n_ff_exp),
        "expert_weights_scale": F32(c.weights_scale),
        "expert_weights_norm": c.norm_weights,
    }


def metadata(c: ModelConfig, mla: Mla) -> dict[str, Any]:
    """The architecture's keys. llama.cpp loads a file without most of them and silently computes wrongly."""
    split = mla == "split"
    keys: dict[str, Any] = {
        "block_count": U32(c.n_block),
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
        **expert_keys(c),
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
    if c.n_mtp:
        keys["nextn_predict_layers"] = U32(c.n_mtp)
    return {f"{c.architecture}.{key}": value for key, value in keys.items()}


# Tensors


def specs(c: ModelConfig, mla: Mla) -> list[TensorSpec]:
    """All tensors of the output file, in file order."""
    out = [TensorSpec("token_embd.weight", (c.n_vocab, c.d), "token_embd", None, ("model.embed_tokens.weight",))]
    for layer in range(c.n_block):
        out += _attention(c, layer, mla)
        out += _moe(c, layer) if c.is_moe(layer) else _feed_forward(layer, "", "mlp.", c.n_ff, c.d)
        out += _mtp(c, layer) if layer >= c.n_layer else []
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


def _mtp(c: ModelConfig, layer: int) -> list[TensorSpec]:
    """What an MTP layer has before and behind an ordinary one. Its embedding and output matrix are the model's own,
    which llama.cpp takes where a file has no others (`open.open_model` looks)."""
    vectors = (("enorm", "enorm"), ("hnorm", "hnorm"), ("shared_head_norm", "shared_head.norm"))
    return [
        _spec("nextn.eh_proj", layer, (c.d, 2 * c.d), "eh_proj"),
        *(_spec(f"nextn.{name}", layer, (c.d,), source, fixed="F32") for name, source in vectors),
    ]


def assemble(
    weights: Weights, c: ModelConfig, spec: TensorSpec, head: int, rows: tuple[int, int], device: str
) -> "torch.Tensor":
    """Rows of a head's k_b or v_b, float32 [rows, n_in], cut out of kv_b_proj [n_head (qk_nope + v_head), kv_lora]."""
    (source,), (start, stop) = spec.sources, rows
    k = head * (c.qk_nope + c.v_head)
    v = k + c.qk_nope
    if spec.assembly == "v_b":
        return weights.read(source, v + start, v + stop, device=device)
    return weights.read(source, k, v, device=device).T[start:stop].contiguous()
