"""The models around R1, small and random, from their checkpoints to a certified two-bit file: V3.1 with scales that are
powers of two, V2 with groups and a softmax, V2-Lite without q_lora and with experts that no block of 256 divides."""

import json
import shutil
from pathlib import Path
from typing import Any

import kimi_checkpoint
import pytest
import torch
from oracle_files import twin
from safetensors.torch import save_file

from quantkit import bundle
from quantkit.calibration.corpus import TextChoice
from quantkit.calibration.options import Calibration
from quantkit.evaluation.certify import certify
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import llama
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.job.make import make
from quantkit.job.options import MakeOptions
from quantkit.models import family
from quantkit.models.open import open_weights
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import final_hidden, head_logits

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
# llama.cpp takes what has 26 or 27 layers for V2-Lite, and asks all others for q_lora_rank.
LITE: dict[str, Any] = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None}
LITE |= {"num_hidden_layers": 26, "hidden_size": 128, "moe_intermediate_size": 96, "intermediate_size": 160}
LITE |= {"rope_scaling": json.loads((TINY / "config.json").read_text())["rope_scaling"]}
LITE["rope_scaling"] |= {"mscale": 0.707, "mscale_all_dim": 0.707}
# What 26 layers write into the residual stream: of full size, they multiply what 8 bits of inputs err beyond the limit
# of `certify`, which is for trained models (docs/results/families.md).
LITE_WRITES = 0.1
MODELS = {"v3.1": {}, "v2": V2, "v2-lite": V2 | LITE | {"n_routed_experts": 4, "routed_scaling_factor": 1.0}}


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
        if own.get("num_hidden_layers") == 26 and name.endswith(("o_proj.weight", "down_proj.weight")):
            w = LITE_WRITES * w
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
    assert down == ({"IQ4_NL", "Q8_0"} if name == "v2-lite" else {"Q3_K", "Q6_K"})  # rows of 96 and 160
    with open_weights(folder) as checkpoint:
        found = {check.name: check for check in certify(path, "llama.cpp", checkpoint).checks}
    assert not [check for check in found.values() if check.status == "fail"]
    if name == "v2":
        assert "chooses experts wrongly" in found["target"].detail
    elif llama.available():
        assert found["oracle llama.cpp"].status == "pass"
    if name == "v2-lite" and llama.available():
        tokens = torch.arange(64)[None] * 11
        theirs = llama.logits(twin(path, tmp_path / "twin.gguf"), tokens.numpy(), cache="f32", flash_attention=0)
        source = open_source(path)
        with torch.inference_mode():
            ours = head_logits(source, source.head(), final_hidden(source, tokens))
        kld = divergence(ours, torch.from_numpy(theirs))
        print(f"V2-Lite, weights of 2.51 bits as F32: KLD of llama.cpp from our layers {kld:.1e}")
        assert kld < 1e-6
