"""Checkpoint of the tiny model in DeepSeek-R1's form: names, FP8 blocks and shards; writing and reading it back."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from data import write_json
from model import Params, TinyConfig, dequantize_fp8, is_fp8, quantize_fp8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

TOP = {"embed": "model.embed_tokens.weight", "head": "lm_head.weight", "norm": "model.norm.weight"}
LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "q_a": "self_attn.q_a_proj",
    "q_a_norm": "self_attn.q_a_layernorm",
    "q_b": "self_attn.q_b_proj",
    "kv_a": "self_attn.kv_a_proj_with_mqa",
    "kv_a_norm": "self_attn.kv_a_layernorm",
    "kv_b": "self_attn.kv_b_proj",
    "o": "self_attn.o_proj",
    "router": "mlp.gate",
    "enorm": "enorm",
    "hnorm": "hnorm",
    "eh_proj": "eh_proj",
    "head_norm": "shared_head.norm",
}
STACKED = ("gate", "up", "down")


def stack_names(n: int, part: str, cfg: TinyConfig) -> list[str]:
    """Checkpoint names (without `.weight`) of a stacked feed-forward parameter, in stacking order."""
    if n < cfg.first_k_dense_replace:
        return [f"model.layers.{n}.mlp.{part}_proj"]
    experts = [f"model.layers.{n}.mlp.experts.{e}.{part}_proj" for e in range(cfg.n_routed_experts)]
    return [*experts, f"model.layers.{n}.mlp.shared_experts.{part}_proj"]


def locations(params: list[str], cfg: TinyConfig) -> dict[str, tuple[str, int | None]]:
    """Map checkpoint weight names to (parameter, index in its stack or None)."""
    where: dict[str, tuple[str, int | None]] = {}
    for name in params:
        if name in TOP:
            where[TOP[name]] = (name, None)
            continue
        n, part = name.split(".")
        if part in STACKED:
            where |= {f"{s}.weight": (name, i) for i, s in enumerate(stack_names(int(n), part, cfg))}
        else:
            where[f"model.layers.{n}.{LAYER[part]}.weight"] = (name, None)
    return where


def checkpoint_tensors(params: Params, bias: Tensor, cfg: TinyConfig) -> dict[str, Tensor]:
    """All tensors of the checkpoint, in layer order; FP8 weights are followed by their scales."""
    tensors: dict[str, Tensor] = {}
    for full, (name, i) in locations(list(params), cfg).items():
        w = params[name].detach().cpu()
        w = w if i is None else w[i]
        if is_fp8(name):
            tensors[full], tensors[f"{full}_scale_inv"] = quantize_fp8(w)
        else:
            tensors[full] = w.bfloat16()
        if name.endswith("router"):
            layer = int(name.split(".")[0]) - cfg.first_k_dense_replace
            tensors[full.replace(".weight", ".e_score_correction_bias")] = bias[layer].cpu().float()
    return tensors


def save_checkpoint(params: Params, bias: Tensor, cfg: TinyConfig, out: Path, n_shards: int = 4) -> int:
    """Write config.json, the shards and their index; returns the bytes of all tensors."""
    tensors = checkpoint_tensors(params, bias, cfg)
    total = sum(t.nbytes for t in tensors.values())
    shards: list[dict[str, Tensor]] = [{}]
    for name, t in tensors.items():
        filled = sum(x.nbytes for x in shards[-1].values())
        if filled > total / n_shards and not name.endswith("_scale_inv") and len(shards) < n_shards:
            shards.append({})
        shards[-1][name] = t.contiguous()
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):06d}.safetensors"
        save_file(shard, out / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=0) + "\n")
    write_json(out / "config.json", cfg.to_hf())
    return total


def load_checkpoint(path: Path, device: str = "cpu") -> tuple[Params, Tensor, TinyConfig]:
    """Read a checkpoint written by save_checkpoint back to FP32 parameters and routing biases."""
    hf = json.loads((path / "config.json").read_text())
    cfg = TinyConfig(**{k: v for k, v in hf.items() if k in TinyConfig.__dataclass_fields__ and k != "mscale"})
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    files = {f: safe_open(path / f, "pt") for f in sorted(set(index.values()))}

    def read(name: str) -> Tensor:
        t = files[index[name]].get_tensor(name)
        return dequantize_fp8(t, read(f"{name}_scale_inv")) if t.dtype == torch.float8_e4m3fn else t.float()

    parts: dict[str, list[Tensor]] = {}
    where = locations(parameter_names(cfg), cfg)
    for full, (name, _) in where.items():
        parts.setdefault(name, []).append(read(full))
    params = {n: torch.stack(t) if n.endswith(STACKED) else t[0] for n, t in parts.items()}
    bias = [read(f"model.layers.{n}.mlp.gate.e_score_correction_bias") for n in cfg.moe_layers()]
    return {n: t.to(device) for n, t in params.items()}, torch.stack(bias).to(device), cfg


def parameter_names(cfg: TinyConfig) -> list[str]:
    """Names of all training parameters of a model."""
    names = list(TOP)
    for n in range(cfg.n_layers):
        parts = [p for p in LAYER if p not in ("router", "enorm", "hnorm", "eh_proj", "head_norm")] + list(STACKED)
        parts += ["router"] if n >= cfg.first_k_dense_replace else []
        parts += ["enorm", "hnorm", "eh_proj", "head_norm"] if n >= cfg.num_hidden_layers else []
        names += [f"{n}.{p}" for p in parts]
    return names
