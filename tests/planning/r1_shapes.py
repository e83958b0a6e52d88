"""R1's tensors written out from llama.cpp's naming, independently of quantkit.models, as a check on it."""

from quantkit.tensors import TensorSpec

N_LAYER, N_DENSE, N_EXPERT, N_VOCAB = 61, 3, 256, 129280

# (role, shape slowest first, fixed type)
ATTENTION_IN = (
    ("attn_norm", (7168,), "F32"),
    ("attn_q_a", (1536, 7168), None),
    ("attn_q_a_norm", (1536,), "F32"),
    ("attn_q_b", (24576, 1536), None),
    ("attn_kv_a_mqa", (576, 7168), None),
    ("attn_kv_a_norm", (512,), "F32"),
)
KV_B = {
    "split": (("attn_k_b", (128, 512, 128), None), ("attn_v_b", (128, 128, 512), None)),
    "combined": (("attn_kv_b", (32768, 512), None),),
}
ATTENTION_OUT = (("attn_output", (7168, 16384), None), ("ffn_norm", (7168,), "F32"))
DENSE = (
    ("ffn_gate", (18432, 7168), None),
    ("ffn_up", (18432, 7168), None),
    ("ffn_down", (7168, 18432), None),
)
MOE = (
    ("ffn_gate_inp", (256, 7168), "F32"),
    ("exp_probs_b", (256,), "F32"),
    ("ffn_gate_exps", (256, 2048, 7168), None),
    ("ffn_up_exps", (256, 2048, 7168), None),
    ("ffn_down_exps", (256, 7168, 2048), None),
    ("ffn_gate_shexp", (2048, 7168), None),
    ("ffn_up_shexp", (2048, 7168), None),
    ("ffn_down_shexp", (7168, 2048), None),
)


def specs(mla: str = "split", n_layer: int = N_LAYER, n_dense: int = N_DENSE) -> list[TensorSpec]:
    out = [_spec("token_embd", None, (N_VOCAB, 7168), None)]
    for layer in range(n_layer):
        ffn = DENSE if layer < n_dense else MOE
        out += [_spec(role, layer, s, fixed) for role, s, fixed in (*ATTENTION_IN, *KV_B[mla], *ATTENTION_OUT, *ffn)]
    return [*out, _spec("output_norm", None, (7168,), "F32"), _spec("output", None, (N_VOCAB, 7168), None)]


def _spec(role: str, layer: int | None, shape: tuple[int, ...], fixed: str | None) -> TensorSpec:
    suffix = "bias" if role == "exp_probs_b" else "weight"
    name = f"{role}.{suffix}" if layer is None else f"blk.{layer}.{role}.{suffix}"
    return TensorSpec(name, shape, role, layer, (), fixed=fixed)
