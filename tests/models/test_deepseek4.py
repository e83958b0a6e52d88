"""DeepSeek-V4: our reference against transformers' own class, and what is said of models that are not whole."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from v4_models import config, made

from quantkit import bundle
from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.evaluation import configuration
from quantkit.evaluation.configuration import divergence
from quantkit.evaluation.oracles import hf
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.tensor_entry import TensorEntry
from quantkit.job.make import order_of
from quantkit.job.options import MakeOptions
from quantkit.job.plan import as_stored, plan_model
from quantkit.models import family
from quantkit.models.open import open_model, open_weights
from quantkit.planning import published
from quantkit.planning.assign import make_plan
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.recipe import Recipe
from quantkit.planning.targets import check_model
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.stream import final_hidden, head_logits

pytestmark = pytest.mark.skipif(not hf.available(), reason="needs transformers")


def streamed(source, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return head_logits(source, source.head(), final_hidden(source, tokens))


@pytest.mark.parametrize(("ratios", "top_k"), [((0, 4, 128), 512), ((4,), 16)])
def test_reference_is_transformers_model(ratios, top_k):
    small = made(ratios, top_k)
    source = CheckpointSource(Checkpoint.open(small.folder))
    found = divergence(small.logits, streamed(source, small.tokens))
    print(f"ratios {ratios}, top {top_k}: KLD of our reference from transformers {found:.1e}")
    assert found < 1e-6


def test_texts_shorter_than_an_entry():
    """What comes later changes nothing: a text that ends before its first entry of 128 tokens, or of 4."""
    small = made()
    source = CheckpointSource(Checkpoint.open(small.folder))
    for n in (100, 3):
        assert divergence(small.logits[:, :n], streamed(source, small.tokens[:, :n])) < 1e-6


@pytest.mark.parametrize("what", ["--moments", "--gradients"])
def test_what_is_not_kept_is_refused_before_a_forecast(what, tmp_path):
    out = ["-o", str(tmp_path / "imatrix.gguf"), "--device", "cpu"]
    done = CliRunner().invoke(main, ["calibrate", str(made().folder), what, str(tmp_path / "kept"), *out])
    assert done.exit_code == 1 and done.stderr.startswith(f"quantkit: {what}: not ") and "reads " not in done.stderr
    assert not list(tmp_path.iterdir())


def test_published_names_and_bits_are_read():
    small = made()
    checkpoint = Checkpoint.open(small.folder)
    kinds = {entry.dtype for name, entry in checkpoint.tensors.items() if name.endswith((".weight", "tid2eid"))}
    assert kinds == {"FP4", "F8_E4M3", "F32", "I64"}
    for name, weight in small.weights.items():
        if name.endswith("tid2eid"):
            assert torch.equal(checkpoint.read_ids(name, 0, len(weight), 8), weight.int())
        else:
            assert torch.equal(checkpoint.read(name), weight)


def test_a_stack_is_a_copy_only_if_all_of_it_is_fp4():
    checkpoint = Checkpoint.open(made().folder)
    specs = family.specs(family.from_hf(checkpoint.config))
    stack = next(spec for spec in specs if spec.role == "ffn_up_exps")
    assert as_stored([stack], checkpoint)[0].exact == "MXFP4"
    last = checkpoint.entry(stack.sources[-1])
    other = TensorEntry("BF16", last.shape, last.file, last.begin, last.end)
    checkpoint.tensors = {**checkpoint.tensors, stack.sources[-1]: other}
    assert as_stored([stack], checkpoint)[0].exact is None


def test_transformers_reads_config_json_as_we_do():
    found = configuration.check(config())
    assert found.status == "pass", found.detail


def test_every_key_of_transformers_class_is_known():
    written = pytest.importorskip("transformers").DeepseekV4Config().to_dict()
    c = family.from_hf(written | {"architectures": ["DeepseekV4ForCausalLM"]})
    assert family.unknown_keys(written | {"architectures": ["DeepseekV4ForCausalLM"]}) == []
    assert (c.qk_rope, c.n_hash, c.compression.rope_base, c.rope_base) == (64, 3, 160000, 10000)
    assert c.compression.ratios[:5] == (128, 128, 128, 4, 128)
    assert family.from_hf(family.to_hf(c)) == c


def test_numbers_survive_a_file():
    c = family.from_hf(config())
    said = {key: getattr(value, "value", value) for key, value in family.metadata(c, "split", "v4").items()}
    again = family.from_gguf(said | {"tokenizer.ggml.tokens": [""] * 768})
    assert again == c
    with pytest.raises(QuantkitError, match=r"deepseek4\.hyper_connection\.count is missing"):
        family.from_gguf({key: value for key, value in said.items() if "hyper_connection.count" not in key})
    for key, value in (("count", 1 << 31), ("count", 0), ("count", "4"), ("sinkhorn_iterations", 1 << 31)):
        with pytest.raises(QuantkitError, match=r"residual streams, .* iterations: no such numbers"):
            family.from_gguf(said | {f"deepseek4.hyper_connection.{key}": value, "tokenizer.ggml.tokens": [""] * 768})


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("compress_ratios", [0, 4], "compress_ratios is of 2 layers, num_hidden_layers is 3"),
        ("compress_ratios", [0, 4, 8], "compress_ratios of layer 2 is 8, which is none of 0 4 128"),
        ("compress_ratios", 4, "compress_ratios 4 is not a list"),
        ("layer_types", ["sliding_attention"] * 3, "compress_ratios and layer_types do not say the same"),
        ("mlp_layer_types", ["moe", "hash_moe", "moe"], "mlp_layer_types is not of 3 layers, first hash_moe, then moe"),
        ("hc_mult", 2, "hc_mult 2 is not supported, only 4"),
        ("hc_sinkhorn_iters", 10**9, "4 residual streams, 1000000000 iterations: no such numbers"),
        ("num_key_value_heads", 8, "num_key_value_heads 8 is not supported, only 1"),
        ("scoring_func", "sigmoid", "scoring_func 'sigmoid' is not supported, only 'sqrtsoftplus'"),
        ("o_groups", 3, "8 heads do not fall into 3 equal groups"),
        ("engram_tables", 2, None),
        ("engram_n_layers", 2, "engram_n_layers 2 is not supported"),
    ],
)
def test_unsupported_values_are_named(key, value, says):
    raw = config(**{key: value})
    if says is None:  # a name that says nothing of the network
        assert family.unknown_keys(raw) == [f"{key} {value}"]
        return
    with pytest.raises(QuantkitError, match=says):
        family.from_hf(raw)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("layers.0.ffn.gate.tid2eid", r"the model has no tensor 'layers\.0\.ffn\.gate\.tid2eid'"),
        (
            "layers.1.attn.wq_a.scale",
            r"tensor 'layers\.1\.attn\.wq_a\.weight' is F8_E4M3 but its scale '.*wq_a\.scale'",
        ),
        (
            "layers.2.ffn.experts.7.w2.scale",
            r"tensor '.*7\.w2\.weight' is packed FP4 but its scale '.*7\.w2\.scale' is",
        ),
        ("hc_head_fn", r"the model has no tensor 'hc_head_fn'"),
    ],
)
def test_a_missing_tensor_is_named_with_its_file(name, says, tmp_path):
    folder = Path(shutil.copytree(made().folder, tmp_path / "model"))
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(QuantkitError, match=says):
        open_weights(folder)


def test_what_is_only_computed_forward_says_so():
    folder = made().folder
    for options, says in (
        (MakeOptions(effort="best"), "--effort best: not"),
        (MakeOptions(recover=True), "--recover: not"),
    ):
        with pytest.raises(QuantkitError, match=says):
            order_of(folder, None, options)


def test_models_that_llama_cpp_ends_with_are_refused():
    for raw, fine in ((config(), True), (config((0, 128, 0)), False), (config(index_head_dim=64), False)):
        if fine:
            check_model("llama.cpp", family.from_hf(raw))
            continue
        with pytest.raises(QuantkitError, match="does not load a deepseek4 model without"):
            check_model("llama.cpp", family.from_hf(raw))


def test_a_budget_copies_fp4_rather_than_encode_it_larger():
    plan = plan_model("deepseek-v4-flash", budget=BudgetOptions(size=165 * 10**9))
    assert {t.qtype for t in plan.tensors if t.is_routed} == {"MXFP4"} and plan.outlook and plan.outlook.kld < 0.002


def test_pro_is_not_taken_for_kimi_k2():
    """Which has as many layers and experts of the same width, and published damage."""
    assert published.recognise(family.specs(family.from_hf(open_model("deepseek-v4-pro").config))) is None


@pytest.mark.parametrize("recipe", [name for name in bundle.recipe_names() if not Recipe.load(name).is_open])
def test_recipes_speak_of_every_tensor(recipe):
    source = open_model("deepseek-v4-flash")
    specs = family.specs(family.from_hf(source.config))
    assert sum(spec.n_weights for spec in specs) == 284_334_567_511
    plan = make_plan(specs, Recipe.load(recipe), "llama.cpp", model="v4")
    fine = {t.qtype for t in plan.tensors if "compressor_kv" in t.role or "compressor_gate" in t.role}
    assert fine == {"Q8_0"} and {t.qtype for t in plan.tensors if t.role == "ffn_gate_tid2eid"} == {"I32"}
    print(f"{recipe}: {plan.n_bytes / 1e9:.1f} GB")


def test_small_config_is_json():
    assert json.loads(json.dumps(family.to_hf(family.from_hf(config()))))["compress_ratios"] == [0, 4, 128]
