"""DeepSeek-V2/V3/R1 as a GGUF file of architecture `deepseek2`: tensor names, shapes, assembly and metadata.

The layout is llama.cpp's; `mla="split"` writes attn_k_b and attn_v_b (current llama.cpp, KTransformers >= 0.3.2),
`mla="combined"` the attn_kv_b of older files. llama.cpp refuses a file that holds both.
"""

import re
from collections.abc import Iterator
from typing import Any, Literal

import torch

from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_encode import F32, U32
from quantkit.models.config import GATING, DeepseekConfig
from quantkit.tensors import Assembly, TensorSpec

Mla = Literal["split", "combined"]
EXPERT = re.compile(r"\.experts\.(\d+)\.")
SLICE_WEIGHTS = 16 << 20  # weights per job: 64 MB as float32, about R1's expert


def specs(config: DeepseekConfig, mla: Mla = "split") -> list[TensorSpec]:
    """All tensors of the output file, in file order."""
    out = [_spec("token_embd", None, (config.n_vocab, config.d), ["model.embed_tokens"])]
    for layer in range(config.n_layer):
        out += _attention(config, layer, mla)
        out += _moe(config, layer) if config.is_moe(layer) else _dense(config, layer)
    out.append(_spec("output_norm", None, (config.d,), ["model.norm"], fixed="F32"))
    if not config.tied:
        out.append(_spec("output", None, (config.n_vocab, config.d), ["lm_head"]))
    return out


def _spec(
    role: str,
    layer: int | None,
    shape: tuple[int, ...],
    sources: list[str],
    *,
    assembly: Assembly = "copy",
    fixed: str | None = None,
    suffix: str = ".weight",
    source_suffix: str = ".weight",
) -> TensorSpec:
    name = role + suffix if layer is None else f"blk.{layer}.{role}{suffix}"
    prefix = "" if layer is None else f"model.layers.{layer}."
    full = tuple(prefix + source + source_suffix for source in sources)
    return TensorSpec(name, shape, role, layer, full, assembly, fixed)


def _attention(c: DeepseekConfig, layer: int, mla: Mla) -> list[TensorSpec]:
    def one(role: str, shape: tuple[int, ...], source: str, **options: Any) -> TensorSpec:
        return _spec(role, layer, shape, [source], **options)

    out = [one("attn_norm", (c.d,), "input_layernorm", fixed="F32")]
    if c.q_lora is None:
        out.append(one("attn_q", (c.n_head * c.qk_head, c.d), "self_attn.q_proj"))
    else:
        out += [
            one("attn_q_a", (c.q_lora, c.d), "self_attn.q_a_proj"),
            one("attn_q_a_norm", (c.q_lora,), "self_attn.q_a_layernorm", fixed="F32"),
            one("attn_q_b", (c.n_head * c.qk_head, c.q_lora), "self_attn.q_b_proj"),
        ]
    out += [
        one("attn_kv_a_mqa", (c.kv_lora + c.qk_rope, c.d), "self_attn.kv_a_proj_with_mqa"),
        one("attn_kv_a_norm", (c.kv_lora,), "self_attn.kv_a_layernorm", fixed="F32"),
    ]
    if mla == "split":
        out += [
            one("attn_k_b", (c.n_head, c.kv_lora, c.qk_nope), "self_attn.kv_b_proj", assembly="k_b"),
            one("attn_v_b", (c.n_head, c.v_head, c.kv_lora), "self_attn.kv_b_proj", assembly="v_b"),
        ]
    else:
        out.append(one("attn_kv_b", (c.n_head * (c.qk_nope + c.v_head), c.kv_lora), "self_attn.kv_b_proj"))
    out += [
        one("attn_output", (c.d, c.n_head * c.v_head), "self_attn.o_proj"),
        one("ffn_norm", (c.d,), "post_attention_layernorm", fixed="F32"),
    ]
    return out


def _dense(c: DeepseekConfig, layer: int) -> list[TensorSpec]:
    return [
        _spec("ffn_gate", layer, (c.n_ff, c.d), ["mlp.gate_proj"]),
        _spec("ffn_up", layer, (c.n_ff, c.d), ["mlp.up_proj"]),
        _spec("ffn_down", layer, (c.d, c.n_ff), ["mlp.down_proj"]),
    ]


def _moe(c: DeepseekConfig, layer: int) -> list[TensorSpec]:
    def stack(role: str, n_out: int, n_in: int, projection: str) -> TensorSpec:
        experts = [f"mlp.experts.{e}.{projection}" for e in range(c.n_expert)]
        return _spec(role, layer, (c.n_expert, n_out, n_in), experts, assembly="stack")

    out = [_spec("ffn_gate_inp", layer, (c.n_expert, c.d), ["mlp.gate"], fixed="F32")]
    if c.has_bias:
        source = ["mlp.gate.e_score_correction_bias"]
        out.append(_spec("exp_probs_b", layer, (c.n_expert,), source, fixed="F32", suffix=".bias", source_suffix=""))
    out += [
        stack("ffn_gate_exps", c.n_ff_exp, c.d, "gate_proj"),
        stack("ffn_up_exps", c.n_ff_exp, c.d, "up_proj"),
        stack("ffn_down_exps", c.d, c.n_ff_exp, "down_proj"),
    ]
    if c.n_shared:
        n_ff = c.n_ff_exp * c.n_shared
        out += [
            _spec("ffn_gate_shexp", layer, (n_ff, c.d), ["mlp.shared_experts.gate_proj"]),
            _spec("ffn_up_shexp", layer, (n_ff, c.d), ["mlp.shared_experts.up_proj"]),
            _spec("ffn_down_shexp", layer, (c.d, n_ff), ["mlp.shared_experts.down_proj"]),
        ]
    return out


def source_shapes(config: DeepseekConfig) -> dict[str, tuple[int, ...]]:
    """Every checkpoint tensor that the file is made from, with its shape (the MTP layer is not among them)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for spec in specs(config, "combined"):
        for source in spec.sources:
            shapes[source] = spec.shape[1:] if spec.assembly == "stack" else spec.shape
    return shapes


def reading_order(config: DeepseekConfig) -> tuple[list[str], list[list[str]]]:
    """Checkpoint tensors in the order in which a pass reads them: those outside the layers, and those of each layer.

    Within a layer the experts come last, each with its three matrices together.
    """
    kept: list[str] = []
    layers: list[list[str]] = [[] for _ in range(config.n_layer)]
    for spec in specs(config, "combined"):
        (kept if spec.layer is None else layers[spec.layer]).extend(spec.sources)
    for names in layers:
        names.sort(key=lambda name: int(match[1]) if (match := EXPERT.search(name)) else -1)
    return kept, layers


def slices(spec: TensorSpec) -> Iterator[tuple[int, int]]:
    """Row ranges of a tensor's jobs: whole experts for a stack, whole heads for k_b and v_b, else about SLICE_WEIGHTS.

    Rows never cross a matrix, so each job has one importance vector.
    """
    per_matrix = spec.n_rows // spec.n_matrices
    step = max(1, min(per_matrix, SLICE_WEIGHTS // spec.n_in))
    for first in range(0, spec.n_rows, per_matrix):
        for start in range(first, first + per_matrix, step):
            yield start, min(start + step, first + per_matrix)


def read(
    checkpoint: Checkpoint, config: DeepseekConfig, spec: TensorSpec, start: int, stop: int, device: str = "cpu"
) -> torch.Tensor:
    """Rows start:stop of a tensor flattened to [n_rows, n_in], float32, from the original weights.

    The range must lie within one matrix, as `slices` makes it.
    """
    per_matrix = spec.n_rows // spec.n_matrices
    matrix, first = divmod(start, per_matrix)
    last = first + stop - start
    if spec.assembly == "stack":
        return checkpoint.read(spec.sources[matrix], first, last, device=device)
    if spec.assembly == "copy":
        if len(spec.shape) == 1:
            return checkpoint.read(spec.sources[0], device=device).reshape(1, -1)
        return checkpoint.read(spec.sources[0], start, stop, device=device)
    head = matrix * (config.qk_nope + config.v_head)
    if spec.assembly == "v_b":
        begin = head + config.qk_nope
        return checkpoint.read(spec.sources[0], begin + first, begin + last, device=device)
    k = checkpoint.read(spec.sources[0], head, head + config.qk_nope, device=device)  # [qk_nope, kv_lora]
    return k.T[first:last].contiguous()


def metadata(config: DeepseekConfig, mla: Mla, name: str) -> dict[str, Any]:
    """`general.*` and `deepseek2.*` keys. llama.cpp loads a file without most of them and silently computes wrongly."""
    c, split = config, mla == "split"
    arch: dict[str, Any] = {
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
        arch["attention.q_lora_rank"] = U32(c.q_lora)
    if split:
        arch["attention.key_length_mla"] = U32(c.qk_head)
        arch["attention.value_length_mla"] = U32(c.v_head)
    if c.yarn:
        arch |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": F32(c.yarn.factor),
            "rope.scaling.original_context_length": U32(c.yarn.original_context),
            "rope.scaling.yarn_log_multiplier": F32(0.1 * c.yarn.mscale_all_dim),
            "rope.scaling.yarn_beta_fast": F32(c.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": F32(c.yarn.beta_slow),
        }
    general = {"general.architecture": "deepseek2", "general.type": "model", "general.name": name}
    return general | {f"deepseek2.{key}": value for key, value in arch.items()}
