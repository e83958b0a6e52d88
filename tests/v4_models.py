"""Small random models of DeepSeek-V4, made and computed by transformers' own class in float32, and written as DeepSeek
publishes them: its names, FP4 experts, FP8 elsewhere."""

import atexit
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quantkit import bundle

TINY = bundle.models_dir() / "tiny-r1"
T = 320  # tokens: two blocks of 128, eighty of 4
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
EXPERT, FP8 = (
    r"ffn\.experts\.\d+\.w[123]\.weight",
    r"(attn\.w[qo]_[ab]|attn\.wkv|shared_experts\.w\d|indexer\.wq_b)\.weight",
)
SIZES: dict[str, Any] = {
    "vocab_size": 768,
    "hidden_size": 256,
    "moe_intermediate_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 64,
    "q_lora_rank": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "o_groups": 4,
    "o_lora_rank": 32,
    "index_n_heads": 32,
    "index_head_dim": 128,
    "sliding_window": 32,
    "num_hash_layers": 1,
    "compress_rope_theta": 160000.0,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "swiglu_limit": 0.5,
    "routed_scaling_factor": 1.5,
    "num_nextn_predict_layers": 0,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {"factor": 16.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}


@dataclass(frozen=True)
class Small:
    """folder: a checkpoint with a tokenizer. tokens int64 [1, T], logits float32 [1, T, n_vocab] by transformers.
    weights: of the model, by their published names, as transformers computed with them."""

    folder: Path
    tokens: torch.Tensor
    logits: torch.Tensor
    weights: dict[str, torch.Tensor]


def config(ratios: Sequence[int] = (0, 4, 128), **changes: Any) -> dict[str, Any]:
    """config.json of a small model, as DeepSeek writes it: one ratio more than there are layers."""
    return {
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        **SIZES,
        "num_hidden_layers": len(ratios),
        "compress_ratios": [*ratios, 0],
        "qk_rope_head_dim": 32,
        "index_topk": 512,
        "expert_dtype": "fp4",
        "rope_scaling": {"type": "yarn", **YARN},
        "scoring_func": "sqrtsoftplus",
        "topk_method": "noaux_tc",
        "norm_topk_prob": True,
        **changes,
    }


def fp4(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 of the shape of w, and scales float32 [..., n / 32], powers of two."""
    groups = w.reshape(*w.shape[:-1], -1, 32)
    scale = torch.exp2(torch.ceil(torch.log2(groups.abs().amax(-1, keepdim=True) / 6)))
    codes = (groups / scale).unsqueeze(-1).sub(E2M1).abs().argmin(-1)
    return codes.view(w.shape).to(torch.uint8), scale[..., 0]


def fp8(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float8_e4m3fn of the shape of w, and scales float32 of blocks of 128 x 128, powers of two."""
    rows, columns = (-(-n // 128) for n in w.shape)
    scale = torch.empty(rows, columns)
    for r in range(rows):
        for c in range(columns):
            block = w[128 * r : 128 * r + 128, 128 * c : 128 * c + 128]
            scale[r, c] = torch.exp2(torch.ceil(torch.log2(block.abs().max() / 448)))
    return (w / spread(scale, w.shape)).to(torch.float8_e4m3fn), scale


def spread(scale: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    return scale.repeat_interleave(128, 0)[: shape[0]].repeat_interleave(128, 1)[:, : shape[1]]


def published(name: str) -> str:
    """DeepSeek's name of what transformers saves."""
    name = name.removeprefix("model.").replace("embed_tokens.", "embed.").replace("hc_head.hc_", "hc_head_")
    return name.replace("attn.norm.weight", "attn.kv_norm.weight")


def filled(model: Any) -> None:
    """Random numbers that no part of the model is blind to; expert rows as FP4, most other matrices as FP8 can say."""
    for name, p in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith("tid2eid"):
            p.copy_(torch.stack([torch.randperm(8)[:2] for _ in range(len(p))]))
        elif name.endswith("e_score_correction_bias"):
            p.normal_(0, 0.1)
        elif "norm.weight" in name:
            p.copy_(1 + 0.1 * torch.randn_like(p))
        elif name.endswith(("sinks", "position_bias", ".base", "hc_base")):
            p.normal_(0, 0.5)
        elif p.ndim > 1 and p.dtype == torch.float32:
            p.copy_(torch.randn_like(p) * 1.5 / p.shape[-1] ** 0.5)
            if "experts.gate_up_proj" in name or "experts.down_proj" in name:
                codes, scale = fp4(p)
                p.copy_(E2M1[codes.int()] * scale.repeat_interleave(32, -1))
            elif re.search(r"(q_[ab]_proj|self_attn\.kv_proj|o_[ab]_proj|shared_experts\.\w+_proj)\.weight", name):
                raw, scale = fp8(p)
                p.copy_(raw.float() * spread(scale, p.shape))


def stored(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a published checkpoint."""
    out = {}
    for name, w in weights.items():
        if re.search(EXPERT, name):
            codes, scale = fp4(w)
            out[name] = (codes[:, 0::2] | (codes[:, 1::2] << 4)).view(torch.int8).contiguous()
            out[name.removesuffix("weight") + "scale"] = scale.to(torch.float8_e8m0fnu)
        elif re.search(FP8, name):
            raw, scale = fp8(w)
            out[name], out[name.removesuffix("weight") + "scale"] = raw, scale.to(torch.float8_e8m0fnu)
        else:
            out[name] = w
    return out


@cache
def made(ratios: tuple[int, ...] = (0, 4, 128), top_k: int = 512) -> Small:
    """One for all tests of a process; nobody changes it."""
    from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

    torch.manual_seed(0)
    raw = config(ratios, index_topk=top_k)
    theirs = {key: value for key, value in raw.items() if key not in ("architectures", "rope_scaling", "expert_dtype")}
    theirs |= {"compress_ratios": list(ratios), "rope_parameters": {"rope_type": "yarn", **YARN}}
    settings = DeepseekV4Config(**theirs)
    settings._attn_implementation = "eager"
    model = DeepseekV4ForCausalLM(settings).float().eval()
    tokens = torch.randint(2, 700, (1, T), generator=torch.Generator().manual_seed(1))
    tokens[0, 0] = 0
    with torch.no_grad():
        filled(model)
        logits = model(tokens, use_cache=False).logits.float()
    folder = Path(mkdtemp(prefix="quantkit-v4-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    model.save_pretrained(folder)
    weights = {published(name): w for name, w in load_file(folder / "model.safetensors").items()}
    save_file(stored(weights), folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder / file)
    return Small(folder, tokens, logits, weights)
