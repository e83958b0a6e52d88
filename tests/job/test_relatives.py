"""The models around R1, small and random, from their checkpoints to a certified two-bit file: V3.1 with scales that are
powers of two, and V2 with groups and a softmax."""

import json
import shutil
from pathlib import Path
from typing import Any

import kimi_checkpoint
import pytest
import torch
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.evaluation.certify import certify
from quantkit.evaluation.oracles import llama
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models import family
from quantkit.models.open import open_weights

TINY = bundle.models_dir() / "tiny-r1"
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 2,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
}
V2: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "routed_scaling_factor": 16.0,
    "topk_method": "group_limited_greedy",
    "n_shared_experts": 2,
    "quantization_config": None,
}
MODELS: dict[str, dict[str, Any]] = {"v3.1": {}, "v2": V2}


def written(folder: Path, own: dict[str, Any]) -> Path:
    """A checkpoint: FP8 with scales as F8_E8M0 where tiny-r1 has FP8, or BF16; the template in a file of its own."""
    folder.mkdir()
    config = json.loads((TINY / "config.json").read_text()) | SIZES | own
    (folder / "config.json").write_text(json.dumps(config))
    settings = json.loads((TINY / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").write_text(settings.pop("chat_template"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copy(TINY / "tokenizer.json", folder / "tokenizer.json")
    generator, stored = torch.Generator().manual_seed(4), dict[str, torch.Tensor]()
    for name, shape in family.source_shapes(family.from_hf(config)).items():
        w = torch.randn(shape, generator=generator)
        w = w * 1.2 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * w + ("norm" in name)
        coarse = config["quantization_config"] and len(shape) == 2
        if coarse and not any(part in name for part in kimi_checkpoint.NOT_FP8):
            stored |= kimi_checkpoint.fp8(name, w, e8m0=True)[0]
        else:
            stored[name] = w if "correction_bias" in name else w.bfloat16()
    save_file(stored, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", MODELS)
def test_made_and_certified(name, tmp_path):
    folder = written(tmp_path / name, MODELS[name])
    calibration, evaluation = Calibration(TextChoice(n_tokens=1024)), TextChoice(n_tokens=512)
    how = MakeOptions("2.51bit", "llama.cpp", calibration=calibration, evaluation=evaluation, encoder="ggml")
    (path,), scores = make(folder, tmp_path / "out", how)
    file = GGUFFile.open(path)
    assert scores is not None and 0 < scores["kld_mean"] < 1
    assert file.metadata["tokenizer.chat_template"] == (folder / "chat_template.jinja").read_text()
    down = {file.tensors[f"blk.{layer}.ffn_down{exps}.weight"].qtype for layer, exps in ((0, ""), (1, "_exps"))}
    assert down == {"Q3_K", "Q6_K"}
    with open_weights(folder) as checkpoint:
        found = {check.name: check for check in certify(path, "llama.cpp", checkpoint).checks}
    assert all(check.status != "fail" for check in found.values()), found
    if name == "v2":
        assert "chooses experts wrongly" in found["target"].detail
    elif llama.available():
        assert found["oracle llama.cpp"].status == "pass"
