"""Whether we read a config.json as others do: a misread one would certify itself, since all of quantkit reads it alike.

The model that it describes is made small (the widths that no arithmetic depends on, and a dense and a MoE layer of it),
filled with random weights by `transformers`, and computed by both. R1's is checked in seconds, without its weights.
stock llama.cpp could not do this: it reads the metadata that we made of config.json.
"""

import json
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantkit.errors import QuantkitError, out_of_memory
from quantkit.evaluation.certificate import Check
from quantkit.evaluation.oracles import hf
from quantkit.evaluation.oracles.child import OracleError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.tensor_table import CONFIG
from quantkit.models import family
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits

NAME = "oracle transformers"
UNCHECKED = "unchecked: only quantkit has read it"
TOKENS = 160
MOST_KLD = 1e-4  # float32 on both sides: 1e-8; a wrong rope 2, another activation 0.2
# Widths only: rope's, and all that is routed, stay as they are.
SMALL: Mapping[str, int] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "vocab_size": 96,
    "num_nextn_predict_layers": 0,
}
LEFT_OUT = ("quantization_config", "auto_map", "dtype", "torch_dtype")
BY_LAYER = ("layer_types", "mlp_layer_types", "indexer_types", "index_topk_pattern")
RULES = ("index_topk_freq", "index_skip_topk_offset")  # that say the same as indexer_types, of the whole model


def check(raw: Mapping[str, Any]) -> Check:
    """The model of this config.json by transformers' class and by us. raw: one that `family.from_hf` reads.

    A computation that breaks down on either side fails; where nobody could be asked, or memory ran out, that is a
    warning.
    """
    try:
        return _check(json.dumps(small(raw), sort_keys=True))
    except (QuantkitError, RuntimeError, OSError, ValueError, KeyError, MemoryError) as error:
        if lacking := out_of_memory(error):
            return Check(NAME, "warn", f"{UNCHECKED}: too little {lacking}")
        return Check(NAME, "fail", f"{type(error).__name__}: {error}")


def small(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a small model that computes as that of `raw` does."""
    if raw.get("model_type") == "deepseek_v4":
        return _small_v4(raw)
    dense = int(raw.get("first_k_dense_replace", 1) > 0)
    left_out = LEFT_OUT + (RULES if raw.get("indexer_types") else ())
    kept = {key: value for key, value in raw.items() if key not in left_out}
    if kept.get("model_type") == "kimi_k2":  # DeepSeek's class under names that only Kimi's own code knows
        kept |= {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}
    first = int(raw.get("first_k_dense_replace", 1))  # the layer that will be the small model's MoE layer
    for key in BY_LAYER:
        if kept.get(key):
            kept[key] = kept[key][:dense] + kept[key][first : first + 1]
    shrunk = {key: value for key, value in SMALL.items() if kept.get(key) is not None}
    ids = {key: None if "pad" in key else 0 for key in kept if key.endswith("_token_id")}
    return kept | shrunk | ids | {"num_hidden_layers": dense + 1, "first_k_dense_replace": dense}


# Widths of DeepSeek-V4 besides: heads fall into output groups, and a head must have more numbers than turn.
SMALL_V4: Mapping[str, int] = {"num_attention_heads": 16, "num_key_value_heads": 1, "head_dim": 96, "o_lora_rank": 16}


def _small_v4(raw: Mapping[str, Any]) -> dict[str, Any]:
    """With one layer of each kind: of attention, and of routing by the token or not."""
    c = family.from_hf(raw)
    assert c.compression
    kinds = [(i < c.n_hash, ratio) for i, ratio in enumerate(c.compression.ratios)]
    layers = [kinds.index(kind) for kind in dict.fromkeys(kinds)]
    own = {"compress_ratios": [kinds[i][1] for i in layers], "num_hash_layers": sum(kinds[i][0] for i in layers)}
    if c.qk_rope != 64 or 16 % c.compression.n_group:
        own |= {"head_dim": c.qk_head, "num_attention_heads": c.n_head}
    shrunk = {key: value for key, value in {**SMALL, **SMALL_V4}.items() if raw.get(key) is not None}
    left_out = (*LEFT_OUT, *BY_LAYER, "expert_dtype", "partial_rotary_factor")
    kept = {key: value for key, value in raw.items() if key not in left_out}
    ids = {key: None if "pad" in key else 0 for key in kept if key.endswith("_token_id")}
    turning = {"qk_rope_head_dim": c.qk_rope, "num_hidden_layers": len(layers)}
    return kept | shrunk | ids | turning | own


@lru_cache(8)
def _check(text: str) -> Check:
    config = json.loads(text)
    if not hf.available():
        return Check(NAME, "warn", f"{UNCHECKED}; pip install transformers")
    tokens = torch.randint(1, config["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        try:
            theirs = hf.random_model(config, folder, tokens.numpy())
        except OracleError as error:
            return Check(NAME, "warn", f"{UNCHECKED}: {error.reason()}")
        (folder / CONFIG).write_text(text, encoding="utf-8")
        with Checkpoint.open(folder) as checkpoint:
            ours = _logits(CheckpointSource(checkpoint), tokens)
    kld = divergence(torch.from_numpy(theirs), ours)
    name = config["architectures"][0]
    if np.isfinite(kld) and kld < MOST_KLD:
        return Check(NAME, "pass", f"{hf.version()}: its {name} reads config.json as we do (KLD {kld:.0e})")
    return Check(NAME, "fail", f"{hf.version()}: its {name} computes another model of this config.json: KLD {kld:.2g}")


@torch.inference_mode()
def _logits(source: CheckpointSource, tokens: torch.Tensor) -> torch.Tensor:
    return head_logits(source, source.head(), final_hidden(source, tokens))


def divergence(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Mean KL divergence of our distributions from theirs, in nats, of logits [..., n_vocab]."""
    p, q = theirs.double().log_softmax(-1), ours.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
