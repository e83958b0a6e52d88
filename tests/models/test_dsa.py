"""DeepSeek-V3.2 and GLM-5: our reference against transformers' own classes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from dsa_models import GLM, V32, T, config, made
from safetensors.torch import load_file, save_file

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf
from quantkit.evaluation.verify import check_same_model
from quantkit.formats.checkpoint import Checkpoint
from quantkit.job.plan import plan_model, predict_plan
from quantkit.models import family
from quantkit.models.open import open_model, open_weights
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits

pytestmark = pytest.mark.skipif(not hf.available(), reason="needs transformers")


def streamed(source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(source, source.head(), final_hidden(source, tokens))


@pytest.mark.parametrize(("layers", "top_k"), [(3, 64), (1, 32)])
@pytest.mark.parametrize("name", [V32, GLM])
def test_reference_is_transformers_model(name, layers, top_k):
    small = made(name, layers, top_k)
    source = CheckpointSource(Checkpoint.open(small.folder))
    found = divergence(small.logits, streamed(source, small.tokens))
    print(f"{name}, {layers} layers, top {top_k} of {T}: KLD of our reference from transformers {found:.1e}")
    assert found < 1e-6
    engine = TorchEngine(source, 1, small.tokens.shape[1])  # a prompt beyond the top-k, and tokens one by one
    caches = engine.caches(1)
    parts = [small.tokens[:, :80], small.tokens[:, 80:120], *small.tokens[:, 120:].split(1, dim=1)]
    stepped = torch.cat([engine.forward(part, caches, all_logits=True) for part in parts], dim=1)
    assert divergence(small.logits, stepped) < 1e-6


@pytest.mark.parametrize(
    ("name", "key", "value", "says"),
    [
        (V32, "indexer_rope_interleave", True, "indexer_rope_interleave true"),
        (V32, "index_topk", "many", "index_topk 'many' is not a whole number"),
        (V32, "index_head_dim", 16, "narrower than the 32 that turn"),
        (V32, "q_lora_rank", None, "q_lora_rank"),
        (V32, "mlp_layer_types", ["dense", "dense", "sparse"], "mlp_layer_types"),
        (V32, "layer_types", ["sliding_attention"] * 3, "layer_types"),
        (GLM, "indexer_types", ["shared", "full", "full"], "first layer has no indexer"),
        (GLM, "indexer_types", ["full", "shared"], "2 indexer types for 3 layers"),
        (GLM, "indexer_types", "FSS", "not of full and shared"),
        (GLM, "index_topk_pattern", "FFF", "indexer_types and index_topk_pattern do not name the same layers"),
        (GLM, "indexer_rope_interleave", False, "indexer_rope_interleave false"),
    ],
)
def test_unsupported_values_are_named(name, key, value, says):
    with pytest.raises(QuantkitError, match=says):
        family.from_hf(config(name, **{key: value}))


def test_glm_layers_with_an_indexer():
    """GLM-5.2: 0, 1, 2, 6, 10, ..., 74, said by a rule, or by llama.cpp where a file with its context says nothing."""
    bare = {key: value for key, value in config(GLM, num_hidden_layers=78).items() if key != "indexer_types"}
    c = family.from_hf(bare | {"index_topk_freq": 4, "index_skip_topk_offset": 3, "max_position_embeddings": 1 << 20})
    assert c.indexer and [i for i, full in enumerate(c.indexer.full) if full] == [0, 1, *range(2, 78, 4)]
    said = {key: getattr(value, "value", value) for key, value in family.metadata(c, "split", "glm").items()}
    for metadata in (said, {key: value for key, value in said.items() if "types" not in key}):
        assert family.from_gguf(metadata).indexer == c.indexer
    for n_mtp in (-1, 2, 10**9):  # of as many blocks more
        hostile = {"glm-dsa.nextn_predict_layers": n_mtp, "glm-dsa.block_count": 78 + n_mtp}
        with pytest.raises(QuantkitError, match=f"{n_mtp} layers that predict the token after the next, only 0 or 1"):
            family.from_gguf(said | hostile)
    assert family.from_hf(bare).indexer.full == (True,) * 78
    assert family.from_hf(family.to_hf(c)).indexer == c.indexer


@pytest.mark.parametrize("recipe", [name for name in bundle.recipe_names() if not Recipe.load(name).is_open])
def test_recipes_speak_of_every_tensor_of_glm_5(recipe):
    raw = json.loads((Path(__file__).parents[2] / "scripts" / "bench" / "glm-5.2.json").read_text(encoding="utf-8"))
    plan = make_plan(family.specs(family.from_hf(raw)), Recipe.load(recipe), "llama.cpp", model="glm")
    kinds = {t.qtype for t in plan.tensors if t.role in ("indexer.attn_q_b", "indexer.attn_k")}
    assert kinds == {"Q8_0"} and sum(t.role == "indexer.proj" for t in plan.tensors) == 21 + 1  # of the MTP layer
    print(f"{recipe}: {plan.n_bytes / 1e9:.1f} GB")


@pytest.mark.parametrize("name", ["DeepseekV32Config", "GlmMoeDsaConfig"])
def test_every_key_of_transformers_classes_is_known(name):
    written = getattr(pytest.importorskip("transformers"), name)().to_dict()
    written |= {"architectures": [name.replace("Config", "ForCausalLM")]}
    family.from_hf(written)
    assert family.unknown_keys(written) == []


def test_an_mtp_layer_may_be_missing_or_unlike(tmp_path, capsys):
    """transformers saves none; DeepSeek's has copies of embedding and output matrix."""
    folder = Path(shutil.copytree(made(V32, mtp=1).folder, tmp_path / "model"))
    whole, bare = open_weights(folder), open_weights(folder)
    assert family.from_hf(whole.config).n_mtp == 1
    bare.config = family.without_mtp(bare.config)
    check_same_model(CheckpointSource(bare), CheckpointSource(whole))  # as `verify` compares a file of --no-mtp
    second = folder / "model-00002-of-00002.safetensors"
    weights, index = load_file(second), json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.3.shared_head.head.weight"
    index["weight_map"][name] = second.name
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    head = load_file(folder / "model-00001-of-00002.safetensors")["lm_head.weight"]
    for copy, kept in ((head, 1), (head.flip(0), 0)):
        save_file(weights | {name: copy.contiguous()}, second)
        assert family.from_hf(open_weights(folder).config).n_mtp == kept
    assert f"{name} is not lm_head.weight" in capsys.readouterr().err
    second.unlink()
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model-00001-of-00002.safetensors").rename(folder / "model.safetensors")
    assert family.from_hf(open_weights(folder).config).n_mtp == 0
    assert "no tensor of layer 3 is there" in capsys.readouterr().err
    raw = json.loads((folder / "config.json").read_text())
    with pytest.raises(QuantkitError, match="num_nextn_predict_layers 2 is not supported"):
        family.from_hf(raw | {"num_nextn_predict_layers": 2})


@pytest.mark.parametrize("model", ["deepseek-v3.2", "glm-5.2"])
def test_plans_with_and_without_the_mtp_layer(model):
    """It counts in the size, and not in what is expected of the main model's types, which by rules stay the same."""
    with_it, without = (plan_model(model, "unsloth-1.58bit", mtp=mtp) for mtp in (True, False))
    behind = [t for t in with_it.tensors if t.name not in without.by_name]
    assert {t.layer for t in behind} == {len({t.layer for t in without.tensors}) - 1}
    assert all(with_it.by_name[t.name].qtype == t.qtype for t in without.tensors)
    config = open_model(model).config
    assert family.from_hf(family.seen_like(config, with_it.by_name)).n_mtp == 1
    assert family.from_hf(family.seen_like(config, without.by_name)).n_mtp == 0
    assert predict_plan(model, with_it, None) == pytest.approx(predict_plan(model, without, None))


def test_a_missing_tensor_is_named_with_its_file(tmp_path):
    folder = Path(shutil.copytree(made(V32).folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.self_attn.indexer.k_norm.bias"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(QuantkitError, match=r"no tensor 'model\.layers\.1\.self_attn\.indexer\.k_norm\.bias'"):
        CheckpointSource(Checkpoint.open(folder))
