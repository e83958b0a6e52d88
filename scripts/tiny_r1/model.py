"""The tiny DeepSeek-V3 model: configuration, FP8 rounding and a functional forward pass for training.

Parameters live in one flat dict of FP32 tensors. The experts of a layer are stacked (routed ones first, the shared one
last), so that all of them run as one wide feed-forward block and the router's weights act as a mask. For 16 experts of
width 256 this costs less time than gathering tokens per expert.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

FP8_MAX = 448.0
BLOCK = 128
FP8_SUFFIXES = ("q_a", "q_b", "kv_a", "kv_b", "o", "gate", "up", "down")
Params = dict[str, Tensor]


@dataclass(frozen=True)
class TinyConfig:
    """Sizes of the model; the names follow DeepSeek's config.json."""

    vocab_size: int = 768
    hidden_size: int = 256
    intermediate_size: int = 256
    moe_intermediate_size: int = 256
    num_hidden_layers: int = 4
    num_nextn_predict_layers: int = 1
    first_k_dense_replace: int = 1
    num_attention_heads: int = 4
    q_lora_rank: int = 256
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 32
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    n_routed_experts: int = 16
    num_experts_per_tok: int = 4
    n_shared_experts: int = 1
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_factor: float = 40.0
    rope_original: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0

    @property
    def n_layers(self) -> int:
        """All decoder layers, the multi-token-prediction (MTP) layer included: it is the last one."""
        return self.num_hidden_layers + self.num_nextn_predict_layers

    def moe_layers(self) -> list[int]:
        """Indices of the layers that route tokens to experts."""
        return list(range(self.first_k_dense_replace, self.n_layers))

    def to_hf(self) -> dict:
        """Return the config.json content, in the form that DeepSeek-R1 ships."""
        plain = {k: v for k, v in asdict(self).items() if not k.startswith(("rope_f", "rope_o", "beta_", "mscale"))}
        return {
            "architectures": ["DeepseekV3ForCausalLM"],
            "model_type": "deepseek_v3",
            **plain,
            "num_key_value_heads": self.num_attention_heads,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": True,
            "moe_layer_freq": 1,
            "hidden_act": "silu",
            "max_position_embeddings": int(self.rope_factor * self.rope_original),
            "rope_scaling": {
                "type": "yarn",
                "factor": int(self.rope_factor),
                "original_max_position_embeddings": self.rope_original,
                "beta_fast": int(self.beta_fast),
                "beta_slow": int(self.beta_slow),
                "mscale": self.mscale,
                "mscale_all_dim": self.mscale_all_dim,
            },
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "ep_size": 1,
            "initializer_range": 0.02,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "quantization_config": {
                "activation_scheme": "dynamic",
                "fmt": "e4m3",
                "quant_method": "fp8",
                "weight_block_size": [BLOCK, BLOCK],
            },
        }


# ---------------------------------------------------------------------------------------------------------------- FP8


def block_scales(w: Tensor) -> Tensor:
    """Scale of every 128x128 block (the last one of a row or column may be ragged): amax / 448."""
    rows, cols = w.shape[-2:]
    padded = F.pad(w.abs(), (0, -cols % BLOCK, 0, -rows % BLOCK))
    blocks = padded.unflatten(-1, (-1, BLOCK)).unflatten(-3, (-1, BLOCK))  # (..., row block, 128, column block, 128)
    return blocks.amax(dim=(-3, -1)).clamp_min(1e-12) / FP8_MAX


def expand_scales(scales: Tensor, rows: int, cols: int) -> Tensor:
    """Repeat block scales so that they match a matrix of the given size."""
    return scales.repeat_interleave(BLOCK, -2)[..., :rows, :].repeat_interleave(BLOCK, -1)[..., :cols]


def quantize_fp8(w: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a matrix (or a stack of them) to E4M3; returns the FP8 values and the F32 block scales."""
    scales = block_scales(w.float())
    full = expand_scales(scales, *w.shape[-2:])
    return (w.float() / full).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scales


def dequantize_fp8(q: Tensor, scales: Tensor) -> Tensor:
    """Undo quantize_fp8 in FP32."""
    return q.float() * expand_scales(scales.float(), *q.shape[-2:])


def is_fp8(name: str) -> bool:
    """Whether the checkpoint stores this parameter as FP8 (norms, embeddings, router and eh_proj stay BF16)."""
    return name.rsplit(".", 1)[-1] in FP8_SUFFIXES


def rounded(name: str, w: Tensor) -> Tensor:
    """The value that the checkpoint will hold, with a straight-through gradient."""
    with torch.no_grad():
        target = dequantize_fp8(*quantize_fp8(w)) if is_fp8(name) else w.bfloat16().float()
        delta = target - w
    return w + delta


# --------------------------------------------------------------------------------------------------------- parameters


def init_params(cfg: TinyConfig, seed: int, device: str) -> Params:
    """Random FP32 parameters. Names: `embed`, `head`, `norm`, `N.<part>`; experts are stacked, the shared one last."""
    gen = torch.Generator().manual_seed(seed)
    h, heads = cfg.hidden_size, cfg.num_attention_heads

    def normal(*shape: int, gain: float = 0.7) -> Tensor:
        return torch.randn(*shape, generator=gen) * gain / math.sqrt(shape[-1])

    params = {"embed": torch.randn(cfg.vocab_size, h, generator=gen) * 0.2, "head": normal(cfg.vocab_size, h, gain=0.3)}
    params["norm"] = torch.ones(h)
    for n in range(cfg.n_layers):
        qk = cfg.qk_nope_head_dim + cfg.qk_rope_head_dim
        layer = {
            "attn_norm": torch.ones(h),
            "ffn_norm": torch.ones(h),
            "q_a": normal(cfg.q_lora_rank, h),
            "q_a_norm": torch.ones(cfg.q_lora_rank),
            "q_b": normal(heads * qk, cfg.q_lora_rank),
            "kv_a": normal(cfg.kv_lora_rank + cfg.qk_rope_head_dim, h),
            "kv_a_norm": torch.ones(cfg.kv_lora_rank),
            "kv_b": normal(heads * (cfg.qk_nope_head_dim + cfg.v_head_dim), cfg.kv_lora_rank),
            "o": normal(h, heads * cfg.v_head_dim, gain=0.2),
        }
        dense = n < cfg.first_k_dense_replace
        stack = 1 if dense else cfg.n_routed_experts + cfg.n_shared_experts
        width = cfg.intermediate_size if dense else cfg.moe_intermediate_size
        layer |= {"gate": normal(stack, width, h), "up": normal(stack, width, h)}
        layer["down"] = normal(stack, h, width, gain=0.2)
        if not dense:
            layer["router"] = normal(cfg.n_routed_experts, h, gain=0.5)
        if n >= cfg.num_hidden_layers:
            layer |= {"enorm": torch.ones(h), "hnorm": torch.ones(h), "head_norm": torch.ones(h)}
            layer["eh_proj"] = normal(h, 2 * h)
        params |= {f"{n}.{k}": v for k, v in layer.items()}
    return {k: v.to(device).requires_grad_() for k, v in params.items()}


def prepare(params: Params, dtype: torch.dtype, round_weights: bool) -> Params:
    """Weights for the forward pass: optionally rounded as the checkpoint rounds them, matrices in `dtype`.

    The experts' matrices are laid side by side; norms and the router stay FP32.
    """
    out = {}
    for name, p in params.items():
        w = rounded(name, p) if round_weights else p
        part = name.rsplit(".", 1)[-1]
        if part in ("gate", "up"):
            w = w.flatten(0, 1)
        elif part == "down":
            w = w.permute(1, 0, 2).flatten(1)
        out[name] = w if part.endswith("norm") or part == "router" else w.to(dtype)
    return out


# ------------------------------------------------------------------------------------------------------------ forward


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's attention temperature."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_tables(cfg: TinyConfig, length: int, device: str) -> tuple[Tensor, Tensor]:
    """Cosines and sines (length, rope_dim / 2) with YaRN's blend of interpolated and original frequencies."""
    dim = cfg.qk_rope_head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    original = cfg.rope_theta**-exponent

    def turning_dim(rotations: float) -> float:
        return dim * math.log(cfg.rope_original / (rotations * 2 * math.pi)) / (2 * math.log(cfg.rope_theta))

    low = max(math.floor(turning_dim(cfg.beta_fast)), 0)
    high = min(math.ceil(turning_dim(cfg.beta_slow)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / max(high - low, 1e-3)).clamp(0, 1)
    freqs = original / cfg.rope_factor * ramp + original * (1 - ramp)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), freqs)
    amp = yarn_mscale(cfg.rope_factor, cfg.mscale) / yarn_mscale(cfg.rope_factor, cfg.mscale_all_dim)
    return (angles.cos() * amp).float().to(device), (angles.sin() * amp).float().to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs; x is (batch, length, heads, rope_dim)."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm, computed in FP32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def top_mask(scores: Tensor, k: int) -> Tensor:
    """Mask of the k largest entries of the last dimension; ties go to the lower index."""
    index = torch.arange(scores.shape[-1], device=scores.device)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    beaten = (other > mine) | ((other == mine) & (index[None, :] < index[:, None]))
    return beaten.sum(-1) < k


def route(x: Tensor, router: Tensor, bias: Tensor, cfg: TinyConfig) -> tuple[Tensor, Tensor]:
    """Group-limited sigmoid routing: weights of all experts (zero if not chosen) and the mask of the chosen ones."""
    scores = F.linear(x, router).sigmoid()
    with torch.no_grad():
        biased = scores + bias
        groups = biased.unflatten(-1, (cfg.n_group, -1))
        group_scores = (groups * top_mask(groups, 2)).sum(-1)
        allowed = top_mask(group_scores, cfg.topk_group).unsqueeze(-1).expand_as(groups).flatten(-2)
        mask = top_mask(biased.masked_fill(~allowed, -torch.inf), cfg.num_experts_per_tok)
    chosen = scores * mask
    return chosen / (chosen.sum(-1, keepdim=True) + 1e-20) * cfg.routed_scaling_factor, mask


def attention(x: Tensor, w: Params, n: int, rope: tuple[Tensor, Tensor], cfg: TinyConfig) -> Tensor:
    """Multi-head latent attention on normalized input; x is (batch, length, hidden)."""
    heads, nope, rdim, vdim = cfg.num_attention_heads, cfg.qk_nope_head_dim, cfg.qk_rope_head_dim, cfg.v_head_dim
    dtype, eps = w[f"{n}.o"].dtype, cfg.rms_norm_eps
    x = x.to(dtype)
    q = rms_norm(F.linear(x, w[f"{n}.q_a"]), w[f"{n}.q_a_norm"], eps).to(dtype)
    q = F.linear(q, w[f"{n}.q_b"]).unflatten(-1, (heads, nope + rdim))
    q = torch.cat((q[..., :nope], rotate(q[..., nope:], *rope)), -1)
    latent, k_rope = F.linear(x, w[f"{n}.kv_a"]).split((cfg.kv_lora_rank, rdim), -1)
    latent = rms_norm(latent, w[f"{n}.kv_a_norm"], eps).to(dtype)
    k_nope, v = F.linear(latent, w[f"{n}.kv_b"]).unflatten(-1, (heads, nope + vdim)).split((nope, vdim), -1)
    k_rope = rotate(k_rope.unsqueeze(-2), *rope).expand(-1, -1, heads, -1)
    k = torch.cat((k_nope, k_rope), -1)
    scale = (nope + rdim) ** -0.5 * yarn_mscale(cfg.rope_factor, cfg.mscale_all_dim) ** 2
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    return F.linear(out.transpose(1, 2).flatten(-2), w[f"{n}.o"])


def feed_forward(x: Tensor, w: Params, n: int, bias: Tensor, cfg: TinyConfig) -> tuple[Tensor, Tensor | None]:
    """Dense or expert feed-forward block; also returns how many tokens each expert received."""
    gate, up, down = w[f"{n}.gate"], w[f"{n}.up"], w[f"{n}.down"]
    y = x.to(gate.dtype)
    act = F.silu(F.linear(y, gate)) * F.linear(y, up)
    if n < cfg.first_k_dense_replace:
        return F.linear(act, down), None
    weights, mask = route(x, w[f"{n}.router"], bias[n - cfg.first_k_dense_replace], cfg)
    weights = torch.cat((weights, torch.ones_like(weights[..., :1])), -1).to(act.dtype)
    act = (act.unflatten(-1, (weights.shape[-1], -1)) * weights.unsqueeze(-1)).flatten(-2)
    return F.linear(act, down), mask.flatten(0, -2).sum(0)


def decoder_layer(x: Tensor, w: Params, n: int, bias: Tensor, rope: tuple[Tensor, Tensor], cfg: TinyConfig):
    """One pre-norm layer on the FP32 residual stream."""
    x = x + attention(rms_norm(x, w[f"{n}.attn_norm"], cfg.rms_norm_eps), w, n, rope, cfg)
    y, load = feed_forward(rms_norm(x, w[f"{n}.ffn_norm"], cfg.rms_norm_eps), w, n, bias, cfg)
    return x + y, load


def losses(w: Params, bias: Tensor, tokens: Tensor, rope: tuple[Tensor, Tensor], cfg: TinyConfig):
    """Run the model on `tokens` (batch, length + 2), whose first column should be the BOS token.

    Returns the next-token losses (batch, length), the MTP layer's losses for the token after that, and the expert
    loads (MoE layers, experts).
    """
    length, eps, dtype = tokens.shape[1] - 2, cfg.rms_norm_eps, w["head"].dtype
    loads = []

    def nll(hidden: Tensor, target: Tensor) -> Tensor:
        logits = F.linear(hidden.to(dtype), w["head"]).float()
        return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view_as(target)

    x = F.embedding(tokens[:, : length + 1], w["embed"]).float()
    x, following = x[:, :length], x[:, 1:]
    for n in range(cfg.num_hidden_layers):
        x, load = decoder_layer(x, w, n, bias, rope, cfg)
        loads += [load] if load is not None else []
    x = rms_norm(x, w["norm"], eps)
    main = nll(x, tokens[:, 1 : length + 1])

    n = cfg.num_hidden_layers
    both = torch.cat((rms_norm(following, w[f"{n}.enorm"], eps), rms_norm(x, w[f"{n}.hnorm"], eps)), -1)
    y, load = decoder_layer(F.linear(both.to(dtype), w[f"{n}.eh_proj"]).float(), w, n, bias, rope, cfg)
    mtp = nll(rms_norm(y, w[f"{n}.head_norm"], eps), tokens[:, 2:])
    return main, mtp, torch.stack([*loads, load])
