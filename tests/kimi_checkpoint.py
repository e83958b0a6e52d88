"""Random small checkpoints of both kinds of Kimi-K2, as Moonshot ships them: FP8 under K2's own names, and INT4 experts
under `language_model.` beside a vision tower; with a tiktoken vocabulary made of tiny-r1's."""

import base64
import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.models import family
from quantkit.models.patterns import characters_of_bytes
from quantkit.models.tiktoken import N_SPECIAL

Kind = Literal["fp8", "int4"]
NAMED = ("[BOS]", "[EOS]", "<|im_end|>", "<|im_user|>", "<|im_assistant|>", "[PAD]")
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "kimi_k2",
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 12,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.827,
    "rms_norm_eps": 1e-5,
    "rope_theta": 50000.0,
    "rope_scaling": {
        "type": "yarn",
        "factor": 32.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 1.0,
        "beta_slow": 1.0,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
INT4 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "group_size": 32, "strategy": "group", "symmetric": True, "type": "int"},
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*"],
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}
NOT_FP8 = ("embed_tokens", "lm_head", "mlp.gate.weight", "norm")


def tokens() -> list[bytes]:
    """tiny-r1's tokens in the order of their ids, without the special ones."""
    raw = json.loads((bundle.models_dir() / "tiny-r1" / "tokenizer.json").read_bytes())
    byte = {char: byte for byte, char in characters_of_bytes().items()}
    listed = sorted(raw["model"]["vocab"], key=raw["model"]["vocab"].get)
    return [bytes(byte[c] for c in token) for token in listed if all(c in byte for c in token)]


def write_tokenizer(folder: Path) -> int:
    """tiktoken.model and tokenizer_config.json; the size of the vocabulary."""
    ranks = tokens()
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    (folder / "tiktoken.model").write_text("\n".join(lines) + "\n")
    added = {str(len(ranks) + i): {"content": name, "special": i < 3} for i, name in enumerate(NAMED)}
    settings: dict[str, Any] = {"added_tokens_decoder": added, "bos_token": "[BOS]", "eos_token": "[EOS]"}
    settings["chat_template"] = "{% for m in messages %}<|im_user|>{{ m['content'] }}<|im_end|>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(ranks) + N_SPECIAL


def write(folder: Path, kind: Kind, e8m0: bool = False) -> tuple[Path, Path]:
    """The checkpoint, and beside it the same model as transformers reads it: float32 under plain names. e8m0: the FP8
    scales as bytes, else as float32."""
    plain = folder.with_name(folder.name + "-plain")
    folder.mkdir(), plain.mkdir()
    n_vocab = write_tokenizer(folder)
    config = CONFIG | {"vocab_size": n_vocab, "bos_token_id": n_vocab - 256, "eos_token_id": n_vocab - 255}
    generator = torch.Generator().manual_seed(3)
    stored: dict[str, torch.Tensor] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        w = torch.randn(shape, generator=generator)
        w = 0.1 * w if len(shape) == 1 else w * 1.2 / shape[-1] ** 0.5
        w = w + 1 if "norm" in name else w
        if kind == "int4" and "mlp.experts." in name:
            packed, floats[name] = _int4(name, w)
        elif kind == "fp8" and len(shape) == 2 and not any(part in name for part in NOT_FP8):
            packed, floats[name] = fp8(name, w, e8m0)
        else:
            packed = {name: w if "correction_bias" in name else w.bfloat16()}
            floats[name] = packed[name].float()
        stored |= packed
    text = {key: value for key, value in config.items() if key != "architectures"}
    own: dict[str, Any] = config | {"quantization_config": FP8}
    if kind == "int4":
        stored = {f"language_model.{name}": tensor for name, tensor in stored.items()}
        stored |= {"vision_tower.patch.weight": torch.ones(4, 4), "mm_projector.proj.0.weight": torch.ones(4, 4)}
        own = {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25", "vision_config": {}}
        own |= {"text_config": text | {"quantization_config": INT4}}
    (folder / "config.json").write_text(json.dumps(own))
    (plain / "config.json").write_text(json.dumps(config | {"model_type": "deepseek_v3", "dtype": "float32"}))
    save_file(stored, folder / "model.safetensors")
    save_file(floats, plain / "model.safetensors", metadata={"format": "pt"})
    return folder, plain


def _int4(name: str, w: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = w.view(len(w), -1, 32)
    scale = (groups.abs().amax(-1) / 7).bfloat16()
    codes = (groups / scale.float()[..., None]).round().clamp(-8, 7)
    words = ((codes.view(len(w), -1, 8).long() + 8) << torch.arange(0, 32, 4)).sum(-1)
    words = torch.where(words >= 1 << 31, words - (1 << 32), words).int()
    parts = {"packed": words, "scale": scale, "shape": torch.tensor(w.shape, dtype=torch.int32)}
    return {f"{name}_{part}": tensor for part, tensor in parts.items()}, (codes * scale.float()[..., None]).view(
        w.shape
    )


def fp8(name: str, w: torch.Tensor, e8m0: bool) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A matrix under scales that are powers of two, float32 or bytes: what is stored of it, and its values."""
    rows, columns = (-(-n // 128) for n in w.shape)
    scale = torch.full((rows, columns), 2.0**-9)
    scale[0, 0] = 2.0**-10
    wide = scale.repeat_interleave(128, 0)[: len(w)].repeat_interleave(128, 1)[:, : w.shape[1]]
    quantized = (w / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
    kept = scale.to(torch.float8_e8m0fnu) if e8m0 else scale
    return {name: quantized, f"{name}_scale_inv": kept}, quantized.float() * wide
