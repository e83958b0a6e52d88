"""Small random models with sparse attention, made and computed by transformers' own classes in float32."""

import atexit
import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.evaluation.oracles import hf
from quantkit.models import family, glm_dsa
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.stream import Source, head_logits, stream

TINY = bundle.models_dir() / "tiny-r1"
T = 128  # tokens
SIZES = {
    "vocab_size": 768,
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "index_topk": 2048,
    "index_head_dim": 64,
    "index_n_heads": 32,
    "max_position_embeddings": 4096,
    "num_nextn_predict_layers": 0,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}
OWN: dict[str, dict[str, Any]] = {
    "DeepseekV32ForCausalLM": {
        "model_type": "deepseek_v32",
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {"rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0, **YARN},
    },
    "GlmMoeDsaForCausalLM": {
        "model_type": "glm_moe_dsa",
        "n_group": 1,
        "topk_group": 1,
        "qk_nope_head_dim": 96,
        "v_head_dim": 64,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "indexer_types": ["full", "shared", "full"],
        "max_position_embeddings": 202752,
    },
}
V32, GLM = OWN


@dataclass(frozen=True)
class Small:
    """folder: a checkpoint with a tokenizer. tokens int64 [1, T], logits float32 [1, T, n_vocab] by transformers."""

    folder: Path
    tokens: torch.Tensor
    logits: torch.Tensor


def config(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a small model of this class."""
    return {**SIZES, "architectures": [name], **OWN[name], **changes}


def as_glm(folder: Path) -> None:
    """The tokenizer of the folder as GLM's: another pre-tokenizer, words looked up whole, no BOS in any file."""
    raw = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    byte_level = raw["pre_tokenizer"]["pretokenizers"][-1]
    (pattern,) = glm_dsa.PRE["glm4"]
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    raw["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    raw["model"]["ignore_merges"] = True
    raw["post_processor"] = None
    unused = next(token for token in reversed(raw["added_tokens"]) if token["id"] not in (0, 1))
    raw["model"]["vocab"]["[gMASK]"] = raw["model"]["vocab"].pop(unused["content"])
    unused["content"] = "[gMASK]"
    (folder / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": raw["added_tokens"][1]["content"]}))


def add_mtp(folder: Path, raw: dict[str, Any]) -> None:
    """A random layer behind the last, which transformers' classes do not have, in a shard of its own."""
    config, generator = family.from_hf(raw), torch.Generator().manual_seed(2)
    tensors = {}
    for name, shape in family.source_shapes(config).items():
        if name.startswith(f"model.layers.{config.n_layer}."):
            w = torch.randn(shape, generator=generator)
            tensors[name] = 1.5 * w * shape[-1] ** -0.5 if len(shape) > 1 else 0.2 * w
            tensors[name] += 1.0 if "norm" in name and name.endswith("weight") else 0.0
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    with safe_open(folder / "model-00001-of-00002.safetensors", "pt") as file:
        index = dict.fromkeys(file.keys(), "model-00001-of-00002.safetensors")
    index |= dict.fromkeys(tensors, "model-00002-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@cache
def made(name: str, layers: int = 3, top_k: int = 2048, mtp: int = 0) -> Small:
    """One for all tests of a process; nobody changes it. mtp: MTP layers besides, 0 or 1."""
    folder = Path(mkdtemp(prefix="quantkit-dsa-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tokens = torch.randint(2, 700, (1, T), generator=torch.Generator().manual_seed(1))
    tokens[0, 0] = 0
    changes: dict[str, Any] = {"num_hidden_layers": layers, "index_topk": top_k}
    if name == GLM:
        changes["indexer_types"] = OWN[GLM]["indexer_types"][:layers]
    raw = config(name, **changes, first_k_dense_replace=int(layers > 1))
    logits = hf.random_model(raw, folder, tokens.numpy())
    if mtp:
        raw["num_nextn_predict_layers"] = mtp
        add_mtp(folder, raw)
    (folder / "config.json").write_text(json.dumps(raw), encoding="utf-8")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder / file)
    if name == GLM:
        as_glm(folder)
    return Small(folder, tokens, torch.from_numpy(logits))


@torch.inference_mode()
def drafted(source: Source, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of tokens int64 [n, t]: what the head sees of all but the last, [n, t - 1, d], and the MTP layer's logits of what
    comes after the next token, [n, t - 1, n_vocab]."""
    seen, (_, output) = None, source.head()
    for step in stream(source, tokens, mtp=True):
        if step.weights.mtp:
            seen = rms_norm(step.hidden[:, :-1], source.output_norm(), source.config.rms_eps)
            return seen, head_logits(source, (step.weights.mtp.head_norm, output), step.compute())
        step.compute()
    raise AssertionError("the model has no MTP layer")
