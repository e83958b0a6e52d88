"""A sensitivity that knows no model: what a role gains and what a type errs, for use before anything was measured.

log damage = log GAIN[role] / (tensors of that role) + log ERROR[type], fitted by `scripts/research/fit_prior.py` on the
measured sensitivities of two trained models of R1's architecture (tiny-r1, 5.8 M weights, and another of 51 M), encoded
by ggml with an imatrix; GAIN is the geometric mean of the two, in nats a token at Q4_K. How well it does:
docs/results/allocation.md.
"""

from quantkit.codecs.types import QTYPES

ERROR = {name: qtype.damage for name, qtype in QTYPES.items() if qtype.damage}
"""qtype -> damage as a multiple of Q4_K's."""

GAIN = {
    "ffn_gate_exps": 0.00307,
    "ffn_up_exps": 0.00224,
    "ffn_down_exps": 0.00354,
    "ffn_gate_shexp": 0.00068,
    "ffn_up_shexp": 0.00056,
    "ffn_down_shexp": 0.00095,
    "ffn_gate": 0.00061,
    "ffn_up": 0.00052,
    "ffn_down": 0.00103,
    "attn_q_a": 0.00062,
    "attn_q_b": 0.00127,
    "attn_q": 0.00127,
    "attn_kv_a_mqa": 0.00621,
    "attn_k_b": 0.00027,
    "attn_v_b": 0.00274,
    "attn_kv_b": 0.00301,
    "attn_output": 0.00457,
    "indexer.attn_q_b": 0.00127,
    "indexer.attn_k": 0.00621,
    "attn_kv": 0.00621,
    "attn_output_a": 0.00274,
    "attn_output_b": 0.00457,
    "attn_compressor_kv": 0.00621,
    "attn_compressor_gate": 0.00621,
    "indexer_compressor_kv": 0.00621,
    "indexer_compressor_gate": 0.00621,
    "token_embd": 0.00450,
    "output": 0.00614,
}
"""role -> damage of all its tensors together at Q4_K, nats a token. attn_q and attn_kv_b, which neither model has, are
those of the matrices that they replace; the indexer's and DeepSeek-V4's, which no measured model has, those of the
attention's matrices that multiply the same."""

LEVEL = 1.5
"""R1's published perplexities (Q8_0 3.349; Unsloth's 1.58, 1.73 and 2.22 bit 5.575, 4.724, 4.096) as log ratios, over
what GAIN and ERROR alone predict for those files: 1.67, 1.54 and 1.43."""
