"""A compact torch forward of small DeepSeek-V3 checkpoints, for the encoder harness only.

Weights live in a flat dict under GGUF names ("blk.1.ffn_gate_exps": float32 [experts, out, in]), so that a variant is
made by replacing entries. Everything is float32; chunks of 512 tokens are independent (causal inside a chunk).
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open

LINEAR = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_output": "self_attn.o_proj",
}
NORMS = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
}


class Reader:
    def __init__(self, folder: Path):
        self.folder = folder
        self.index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        self.files = {f: safe_open(str(folder / f), "pt") for f in sorted(set(self.index.values()))}

    def __call__(self, name: str) -> torch.Tensor:
        w = self.files[self.index[name]].get_tensor(name).float()
        if name + "_scale_inv" not in self.index:
            return w
        s = self.files[self.index[name + "_scale_inv"]].get_tensor(name + "_scale_inv")
        s = s.repeat_interleave(128, 0).repeat_interleave(128, 1)
        return w * s[: w.shape[0], : w.shape[1]]


def load(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Config and all weights, dequantized from FP8. kv_b is cut into k_b and v_b [heads, rows, kv_lora]."""
    config, read = json.loads((folder / "config.json").read_text()), Reader(folder)
    w = {"token_embd": read("model.embed_tokens.weight"), "output": read("lm_head.weight")}
    w["output_norm"] = read("model.norm.weight")
    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for i in range(config["num_hidden_layers"]):
        p, b = f"model.layers.{i}.", f"blk.{i}."
        for ours, theirs in (LINEAR | NORMS).items():
            w[b + ours] = read(f"{p}{theirs}.weight")
        kv_b = read(p + "self_attn.kv_b_proj.weight").view(heads, -1, config["kv_lora_rank"])
        w[b + "attn_k_b"], w[b + "attn_v_b"] = kv_b[:, :nope].contiguous(), kv_b[:, nope:].contiguous()
        dense = i < config["first_k_dense_replace"]
        if not dense:
            w[b + "ffn_gate_inp"] = read(p + "mlp.gate.weight")
            w[b + "exp_probs_b"] = read(p + "mlp.gate.e_score_correction_bias")
        for role in ("gate", "up", "down"):
            if dense:
                w[f"{b}ffn_{role}"] = read(f"{p}mlp.{role}_proj.weight")
            else:
                w[f"{b}ffn_{role}_shexp"] = read(f"{p}mlp.shared_experts.{role}_proj.weight")
                experts = range(config["n_routed_experts"])
                stack = [read(f"{p}mlp.experts.{e}.{role}_proj.weight") for e in experts]
                w[f"{b}ffn_{role}_exps"] = torch.stack(stack)
    return config, w


def rms_norm(x, weight, eps=1e-6):
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def yarn_tables(config: dict, n: int, device="cpu") -> tuple[torch.Tensor, torch.Tensor, float]:
    """cos, sin [n, rope/2] and the softmax scale (YaRN: rotation frequencies blended, attention scaled by mscale²)."""
    dim, base, rope = config["qk_rope_head_dim"], config["rope_theta"], config["rope_scaling"]
    freq = base ** (-torch.arange(0, dim, 2).float() / dim)

    def correction(rotations):
        turns = rope["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(base))

    low = max(math.floor(correction(rope["beta_fast"])), 0)
    high = min(math.ceil(correction(rope["beta_slow"])), dim - 1)
    ramp = ((torch.arange(dim // 2).float() - low) / max(high - low, 1e-3)).clamp(0, 1)
    freq = freq / rope["factor"] * ramp + freq * (1 - ramp)
    angle = torch.arange(n).float()[:, None] * freq
    mscale = 0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1
    scale = (config["qk_nope_head_dim"] + dim) ** -0.5 * mscale**2
    return angle.cos().to(device), angle.sin().to(device), scale


def rotate(x, cos, sin):
    """Interleaved RoPE on [..., tokens, heads, dim]."""
    a, b = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[:, None], sin[:, None]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


def attention(config, w, b, x, tables, see):
    chunks, n, _ = x.shape
    heads, nope, rope = config["num_attention_heads"], config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    cos, sin, scale = tables
    see(b + "attn_q_a", x)
    see(b + "attn_kv_a_mqa", x)
    q_a = rms_norm(x @ w[b + "attn_q_a"].T, w[b + "attn_q_a_norm"])
    see(b + "attn_q_b", q_a)
    q = (q_a @ w[b + "attn_q_b"].T).view(chunks, n, heads, nope + rope)
    kv = x @ w[b + "attn_kv_a_mqa"].T
    c = rms_norm(kv[..., : config["kv_lora_rank"]], w[b + "attn_kv_a_norm"])
    see(b + "attn_v_b", c)
    k_rope = rotate(kv[..., config["kv_lora_rank"] :].unsqueeze(-2), cos, sin)
    k_nope = torch.einsum("bnc,hdc->bnhd", c, w[b + "attn_k_b"])
    v = torch.einsum("bnc,hdc->bnhd", c, w[b + "attn_v_b"])
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], cos, sin)), -1)
    k = torch.cat((k_nope, k_rope.expand(-1, -1, heads, -1)), -1)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2).reshape(chunks, n, -1)
    see(b + "attn_output", y)
    return y @ w[b + "attn_output"].T


def route(config, w, b, x):
    """Sigmoid scores, biased group-limited selection; weights normalised and scaled. x [t, d] -> ids, weights."""
    scores = torch.sigmoid(x @ w[b + "ffn_gate_inp"].T)
    biased = scores + w[b + "exp_probs_b"]
    groups = biased.view(len(x), config["n_group"], -1)
    keep = groups.topk(2, -1).values.sum(-1).topk(config["topk_group"], -1).indices
    mask = torch.zeros_like(groups[..., 0]).scatter_(1, keep, 1.0)[..., None].expand_as(groups).flatten(1)
    ids = biased.masked_fill(mask == 0, float("-inf")).topk(config["num_experts_per_tok"], -1).indices
    weights = scores.gather(1, ids)
    return ids, weights / (weights.sum(-1, keepdim=True) + 1e-20) * config["routed_scaling_factor"]


def swiglu(x, gate, up):
    return F.silu(x @ gate.T) * (x @ up.T)


def moe(config, w, b, x, see):
    flat = x.reshape(-1, x.shape[-1])
    ids, weights = route(config, w, b, flat)
    out = torch.zeros_like(flat)
    for e in range(config["n_routed_experts"]):
        token, slot = (ids == e).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        xe, we = flat[token], weights[token, slot]
        h = swiglu(xe, w[b + "ffn_gate_exps"][e], w[b + "ffn_up_exps"][e])
        see(b + "exps", (e, token, xe, h, we))
        out.index_add_(0, token, (h @ w[b + "ffn_down_exps"][e].T) * we[:, None])
    see(b + "ffn_gate_shexp", flat)
    h = swiglu(flat, w[b + "ffn_gate_shexp"], w[b + "ffn_up_shexp"])
    see(b + "ffn_down_shexp", h)
    return (out + h @ w[b + "ffn_down_shexp"].T).view_as(x)


def layer(config, w, i, x, tables, see):
    """One block on [chunks, tokens, d]; `see(name, inputs)` is called with the inputs of each matrix."""
    b = f"blk.{i}."
    x = x + attention(config, w, b, rms_norm(x, w[b + "attn_norm"]), tables, see)
    h = rms_norm(x, w[b + "ffn_norm"])
    if i >= config["first_k_dense_replace"]:
        return x + moe(config, w, b, h, see)
    see(b + "ffn_gate", h)
    m = swiglu(h, w[b + "ffn_gate"], w[b + "ffn_up"])
    see(b + "ffn_down", m)
    return x + m @ w[b + "ffn_down"].T


def nothing(name, inputs):
    pass


def logits(config, w, ids, see=nothing):
    """ids int64 [chunks, tokens] -> float32 [chunks, tokens/2 - 1, vocab], the scored second half of each chunk."""
    tables = yarn_tables(config, ids.shape[1], ids.device)
    x = w["token_embd"][ids]
    for i in range(config["num_hidden_layers"]):
        x = layer(config, w, i, x, tables, see)
    half = ids.shape[1] // 2
    return rms_norm(x[:, half:-1], w["output_norm"]) @ w["output"].T
