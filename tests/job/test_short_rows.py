"""Rows that no block of 256 divides, from config.json to a certificate: as Moonlight's 1,408, but small."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.evaluation.certify import certify
from quantkit.evaluation.oracles import llama
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models import family

TINY = bundle.models_dir() / "tiny-r1"
SIZES = {
    "hidden_size": 96,
    "intermediate_size": 160,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "quantization_config": None,
    "num_nextn_predict_layers": 0,
}
RECIPE = """name = "mixed"
description = "a type that falls back to each of the others"
target = "llama.cpp"
mla = "split"
[[rules]]
match = "ffn_{gate,up}_exps"
qtype = "IQ2_XXS"
why = "IQ4_NL"
[[rules]]
match = "ffn_*"
qtype = "Q4_K"
why = "Q5_0"
[[rules]]
match = "attn_*"
qtype = "Q5_K"
why = "Q5_1"
[[rules]]
match = "*"
qtype = "Q6_K"
why = "Q8_0"
"""


@pytest.fixture
def model(tmp_path) -> Path:
    """Random weights, with tiny-r1's tokenizer."""
    folder = tmp_path / "short-rows"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, folder / name)
    config = json.loads((TINY / "config.json").read_text()) | SIZES
    (folder / "config.json").write_text(json.dumps(config))
    weights = {}
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        values = torch.randn(shape) * (1.5 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)
        weights[name] = (values + 1 if "norm" in name else values).bfloat16()
    save_file(weights, folder / "model.safetensors")
    return folder


def test_made_verified_certified(model, tmp_path):
    recipe, out = tmp_path / "mixed.toml", tmp_path / "out"
    recipe.write_text(RECIPE)
    texts = Calibration(TextChoice(n_tokens=1024)), TextChoice(n_tokens=1024)
    files, scores = make(model, out, MakeOptions(recipe, calibration=texts[0], evaluation=texts[1]))
    types = {name: tensor.qtype for name, tensor in GGUFFile.open(files[0]).tensors.items()}
    assert types["blk.1.ffn_up_exps.weight"] == "IQ4_NL" and types["blk.0.ffn_down.weight"] == "Q5_0"
    assert types["blk.1.attn_output.weight"] == "Q5_1" and types["output.weight"] == "Q8_0"
    assert scores is not None and 0 < scores["kld_mean"] < 0.5  # lively weights; garbage has 3 and more
    found = certify(files[0], "llama.cpp", Checkpoint.open(model))
    assert found.passed, [check for check in found.checks if check.status == "fail"]
    oracles = {check.name: check.status for check in found.checks if check.name.startswith("oracle")}
    assert not llama.available() or oracles["oracle llama.cpp"] == "pass"
