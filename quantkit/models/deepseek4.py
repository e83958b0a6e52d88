"""DeepSeek-V4: GGUF architecture `deepseek4`, names, shapes and keys as llama.cpp has them (src/models/deepseek4.cpp).
With deepseek4_config.py all that is known of this family (see `family.Family`).

Beside routed experts it has little of `deepseek2`: one key of a head's width that is the value too, a window and
compressed entries instead of all earlier tokens, hyper-connections, and first layers whose experts follow from the
token. Its checkpoints have names of their own, and one GGUF layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_values import F32, U32
from quantkit.models import deepseek2, deepseek32
from quantkit.models.config import MAX_LAYERS, Compression, Mla, ModelConfig, Streams, Yarn
from quantkit.tensors import Assembly, TensorSpec, Weights

if TYPE_CHECKING:
    import torch

ARCHITECTURE = "deepseek4"
LAYOUTS: tuple[Mla, ...] = ("split",)
# llama.cpp splits `joyai-llm`, as others call V4's, by the same expressions (b11434, src/llama-vocab.cpp).
PRE: Mapping[str, tuple[str, ...]] = {"deepseek-v3": deepseek2.PRE["deepseek-v3"]}
# DeepSeek publishes code that builds prompts, and no template. This is what that code makes of plain turns, thinking or
# not; earlier answers go without their reasoning, as it leaves that out too.
CHAT_TEMPLATE: str | None = """{%- set system = namespace(text='') -%}
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {%- set system.text = system.text + ('\\n\\n' if system.text else '') + (message['content'] or '') -%}
  {%- endif -%}
{%- endfor -%}
{{- bos_token + system.text -}}
{%- set turn = namespace(user=false) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'assistant' -%}
    {{- '<｜Assistant｜></think>' + (message['content'] or '') + '<｜end▁of▁sentence｜>' -}}
    {%- set turn.user = false -%}
  {%- elif message['role'] != 'system' -%}
    {{- ('\\n\\n' if turn.user else '<｜User｜>') + (message['content'] or '') -}}
    {%- set turn.user = true -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<｜Assistant｜>' + ('<think>' if thinking or enable_thinking else '</think>') -}}
{%- endif -%}"""
GATING = 4  # llama.cpp's LLAMA_EXPERT_GATING_FUNC_TYPE_SQRT_SOFTPLUS
COMPRESSION = ("sliding_window", "compress_rope_freq_base", "output_group_count", "output_lora_rank")
STREAMS = ("count", "sinkhorn_iterations", "epsilon")
"""Keys of what `Compression` and `Streams` hold, in their order."""
OVERLAPPING = 4  # the ratio whose entries reach into the block before, and are chosen by an indexer


# GGUF metadata


def from_gguf(metadata: Mapping[str, Any]) -> ModelConfig:
    """As llama.cpp reads them; keys of `deepseek2` that it does not read are not asked for."""

    def key(name: str, default: Any = None) -> Any:
        return deepseek2.required(metadata, name, default)

    if key("expert_gating_func") != GATING:
        raise QuantkitError(f"GGUF metadata: {ARCHITECTURE}.expert_gating_func is not {GATING} (sqrtsoftplus)")
    n_layer, rope, head = key("block_count"), key("rope.dimension_count"), key("attention.key_length")
    n_vocab = key("vocab_size", len(metadata.get("tokenizer.ggml.tokens", ())) or None)
    ratios = tuple(key("attention.compress_ratios"))[: min(n_layer, MAX_LAYERS)]
    return ModelConfig(
        architecture=ARCHITECTURE,
        n_layer=n_layer,
        d=key("embedding_length"),
        n_head=key("attention.head_count"),
        q_lora=key("attention.q_lora_rank"),
        kv_lora=head,
        qk_nope=head - rope,
        qk_rope=rope,
        v_head=head,
        n_ff=key("expert_feed_forward_length"),
        n_ff_exp=key("expert_feed_forward_length"),
        n_dense=0,
        n_expert=key("expert_count"),
        n_used=key("expert_used_count"),
        n_shared=key("expert_shared_count"),
        n_group=1,
        n_group_used=1,
        scoring="sqrtsoftplus",
        norm_weights=key("expert_weights_norm"),
        weights_scale=key("expert_weights_scale"),
        has_bias=True,
        n_vocab=n_vocab,
        n_context=key("context_length"),
        rms_eps=key("attention.layer_norm_rms_epsilon"),
        rope_base=key("rope.freq_base", 10000.0),
        yarn=_yarn(metadata),
        bos=metadata.get("tokenizer.ggml.bos_token_id", 0),
        eos=metadata.get("tokenizer.ggml.eos_token_id", 1),
        more_ends=tuple(metadata[key] for key in deepseek2.ENDS if key in metadata),
        indexer=deepseek32.indexer_from_gguf(metadata, True, tuple(ratio == OVERLAPPING for ratio in ratios)),
        compression=Compression(ratios, *(key(f"attention.{name}") for name in COMPRESSION)),
        streams=Streams(*(key(f"hyper_connection.{name}") for name in STREAMS)),
        n_hash=key("hash_layer_count"),
        limit=_limit(key("swiglu_clamp_exp"), n_layer),
    )


def _limit(said: Any, n_layer: int) -> float:
    """Of all layers together, as the original has it."""
    limits = {*said[:n_layer]} if isinstance(said, list) else {said}
    if len(limits) != 1:
        raise QuantkitError(f"GGUF metadata: {ARCHITECTURE}.swiglu_clamp_exp is not the same for all layers")
    return limits.pop()


def _yarn(metadata: Mapping[str, Any]) -> Yarn | None:
    """As V2's, but that this architecture has no multiplier."""
    found = deepseek2.yarn_from_gguf(metadata)
    return None if found is None else replace(found, mscale_all_dim=Yarn.mscale_all_dim)


def metadata(c: ModelConfig, mla: Mla) -> dict[str, Any]:
    """The architecture's keys, all that the loader asks for."""
    assert c.indexer and c.compression and c.streams and c.q_lora and c.limit is not None
    keys: dict[str, Any] = {
        "block_count": U32(c.n_layer),
        "context_length": U32(c.n_context),
        "embedding_length": U32(c.d),
        "embedding_length_out": U32(c.width),
        "attention.head_count": U32(c.n_head),
        "attention.head_count_kv": U32(1),
        "attention.key_length": U32(c.qk_head),
        "attention.value_length": U32(c.v_head),
        "attention.layer_norm_rms_epsilon": F32(c.rms_eps),
        "attention.q_lora_rank": U32(c.q_lora),
        "attention.sliding_window": U32(c.compression.window),
        "attention.output_group_count": U32(c.compression.n_group),
        "attention.output_lora_rank": U32(c.compression.lora),
        "attention.compress_ratios": list(c.compression.ratios),
        "attention.compress_rope_freq_base": F32(c.compression.rope_base),
        "attention.indexer.head_count": U32(c.indexer.n_head),
        "attention.indexer.key_length": U32(c.indexer.width),
        "attention.indexer.top_k": U32(c.indexer.top_k),
        "hyper_connection.count": U32(c.streams.n),
        "hyper_connection.sinkhorn_iterations": U32(c.streams.iterations),
        "hyper_connection.epsilon": F32(c.streams.eps),
        "hash_layer_count": U32(c.n_hash),
        "vocab_size": U32(c.n_vocab),
        **deepseek2.expert_keys(c),
        "expert_gating_func": U32(GATING),
        "swiglu_clamp_exp": [float(c.limit)] * c.n_layer,
        "swiglu_clamp_shexp": [float(c.limit)] * c.n_layer,
        "rope.dimension_count": U32(c.qk_rope),
        "rope.freq_base": F32(c.rope_base),
    }
    if c.yarn:
        keys |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": F32(c.yarn.factor),
            "rope.scaling.original_context_length": U32(c.yarn.original_context),
            "rope.scaling.yarn_beta_fast": F32(c.yarn.beta_fast),
            "rope.scaling.yarn_beta_slow": F32(c.yarn.beta_slow),
        }
    return {f"{ARCHITECTURE}.{key}": value for key, value in keys.items()}


# Tensors


@dataclass(frozen=True)
class _Layer:
    """Makes the specs of a layer; its names in the checkpoint have no `.weight` where it is a bare parameter."""

    layer: int

    def matrix(self, role: str, n_out: int, n_in: int, source: str) -> TensorSpec:
        return self._one(role, (n_out, n_in), f"{source}.weight")

    def norm(self, role: str, n: int, source: str) -> TensorSpec:
        return self._one(role, (n,), f"{source}.weight", "F32")

    def bare(self, role: str, shape: tuple[int, ...], source: str, fixed: str = "F32") -> TensorSpec:
        return self._one(role, shape, source, fixed)

    def stack(self, role: str, shape: tuple[int, int, int], projection: str) -> TensorSpec:
        sources = tuple(f"layers.{self.layer}.ffn.experts.{e}.{projection}.weight" for e in range(shape[0]))
        return self._spec(role, shape, sources, "stack")

    def _one(self, role: str, shape: tuple[int, ...], source: str, fixed: str | None = None) -> TensorSpec:
        return self._spec(role, shape, (f"layers.{self.layer}.{source}",), "copy", fixed)

    def _spec(
        self, role: str, shape: tuple[int, ...], sources: tuple[str, ...], assembly: Assembly, fixed: str | None = None
    ) -> TensorSpec:
        kind = "bias" if role == "exp_probs_b" else "weight"
        return TensorSpec(f"blk.{self.layer}.{role}.{kind}", shape, role, self.layer, sources, assembly, fixed)


def specs(c: ModelConfig, mla: Mla) -> list[TensorSpec]:
    """All tensors of the output file, in file order; of both layouts the same."""
    assert c.streams

    def outside(role: str, shape: tuple[int, ...], source: str, fixed: str | None = None) -> TensorSpec:
        return TensorSpec(f"{role}.weight", shape, role, None, (source,), fixed=fixed)

    n = c.streams.n
    out = [outside("token_embd", (c.n_vocab, c.d), "embed.weight")]
    for layer in range(c.n_layer):
        make = _Layer(layer)
        out += [*_attention(c, make), *_compressor(c, make), *_feed_forward(c, make)]
    return [
        *out,
        outside("output_hc_fn", (n, c.width), "hc_head_fn", "F32"),
        outside("output_hc_base", (n,), "hc_head_base", "F32"),
        outside("output_hc_scale", (1,), "hc_head_scale", "F32"),
        outside("output_norm", (c.d,), "norm.weight", "F32"),
        outside("output", (c.n_vocab, c.d), "head.weight"),
    ]


def _connections(c: ModelConfig, make: _Layer, half: str) -> list[TensorSpec]:
    """Hyper-connections of a half of a layer: weights of what goes in, what comes out, and of how streams mix."""
    assert c.streams
    n = (2 + c.streams.n) * c.streams.n
    return [
        make.bare(f"hc_{half}_fn", (n, c.width), f"hc_{half}_fn"),
        make.bare(f"hc_{half}_base", (n,), f"hc_{half}_base"),
        make.bare(f"hc_{half}_scale", (3,), f"hc_{half}_scale"),
    ]


def _attention(c: ModelConfig, make: _Layer) -> list[TensorSpec]:
    assert c.compression and c.q_lora
    groups, lora = c.compression.n_group, c.compression.lora
    return [
        *_connections(c, make, "attn"),
        make.norm("attn_norm", c.d, "attn_norm"),
        make.matrix("attn_q_a", c.q_lora, c.d, "attn.wq_a"),
        make.norm("attn_q_a_norm", c.q_lora, "attn.q_norm"),
        make.matrix("attn_q_b", c.n_head * c.qk_head, c.q_lora, "attn.wq_b"),
        make.matrix("attn_kv", c.qk_head, c.d, "attn.wkv"),
        make.norm("attn_kv_a_norm", c.qk_head, "attn.kv_norm"),
        make.bare("attn_sinks", (c.n_head,), "attn.attn_sink"),
        make.matrix("attn_output_a", groups * lora, c.n_head * c.v_head // groups, "attn.wo_a"),
        make.matrix("attn_output_b", c.d, groups * lora, "attn.wo_b"),
    ]


def _compressor(c: ModelConfig, make: _Layer) -> list[TensorSpec]:
    assert c.compression and c.indexer and c.q_lora
    ratio = c.compression.ratios[make.layer]

    def entries(role: str, width: int, source: str) -> list[TensorSpec]:
        n = width * (2 if ratio == OVERLAPPING else 1)
        return [
            make.matrix(f"{role}_kv", n, c.d, f"{source}.wkv"),
            make.matrix(f"{role}_gate", n, c.d, f"{source}.wgate"),
            make.bare(f"{role}_ape", (ratio, n), f"{source}.ape"),
            make.norm(f"{role}_norm", width, f"{source}.norm"),
        ]

    out = entries("attn_compressor", c.qk_head, "attn.compressor") if ratio else []
    if ratio == OVERLAPPING:
        n_head, width = c.indexer.n_head, c.indexer.width
        out += [
            make.bare("indexer.proj", (n_head, c.d), "attn.indexer.weights_proj.weight"),
            make.matrix("indexer.attn_q_b", n_head * width, c.q_lora, "attn.indexer.wq_b"),
            *entries("indexer_compressor", width, "attn.indexer.compressor"),
        ]
    return out


def _feed_forward(c: ModelConfig, make: _Layer) -> list[TensorSpec]:
    n, ff, shared = c.n_expert, c.n_ff_exp, c.n_ff_exp * c.n_shared
    by_token = make.layer < c.n_hash
    choice = (
        make.bare("ffn_gate_tid2eid", (c.n_vocab, c.n_used), "ffn.gate.tid2eid", "I32")
        if by_token
        else make.bare("exp_probs_b", (n,), "ffn.gate.bias")
    )
    out = [
        *_connections(c, make, "ffn"),
        make.norm("ffn_norm", c.d, "ffn_norm"),
        make.bare("ffn_gate_inp", (n, c.d), "ffn.gate.weight"),
        choice,
        make.stack("ffn_gate_exps", (n, ff, c.d), "w1"),
        make.stack("ffn_up_exps", (n, ff, c.d), "w3"),
        make.stack("ffn_down_exps", (n, c.d, ff), "w2"),
    ]
    if c.n_shared:
        out += [
            make.matrix("ffn_gate_shexp", shared, c.d, "ffn.shared_experts.w1"),
            make.matrix("ffn_up_shexp", shared, c.d, "ffn.shared_experts.w3"),
            make.matrix("ffn_down_shexp", c.d, shared, "ffn.shared_experts.w2"),
        ]
    return out


def assemble(
    weights: Weights, c: ModelConfig, spec: TensorSpec, matrix: int, rows: tuple[int, int], device: str
) -> "torch.Tensor":
    """Every tensor is one of the checkpoint's, or a stack of them."""
    raise AssertionError(f"{spec.name} is assembled as {spec.assembly}")
