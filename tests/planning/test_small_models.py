"""Sizes of V2-Lite and Moonlight, which blocks of 256 do not divide, and what their programs get wrong."""

import json
from dataclasses import replace

import pytest

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.job.hardware import hardware_report
from quantkit.job.plan import plan_model
from quantkit.models import family
from quantkit.models.config import Yarn
from quantkit.planning import targets
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.hardware import Machine
from quantkit.planning.recipe import Candidates

V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "num_experts_per_tok": 6,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "bos_token_id": 100000,
    "eos_token_id": 100001,
}
ROUTING = "scores a group by its best two experts"


@pytest.fixture
def lite(tmp_path):
    """A description of V2-Lite, four layers deep."""
    folder = tmp_path / "lite"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(V2_LITE))
    shapes = family.source_shapes(family.from_hf(V2_LITE))
    (folder / "tensors.json").write_text(
        json.dumps({name: {"shape": list(shape), "dtype": "BF16"} for name, shape in shapes.items()})
    )
    return folder


@pytest.mark.parametrize("recipe", [name for name in bundle.recipe_names() if name not in ("auto", "published")])
def test_every_recipe_plans_it(recipe, lite, capsys):
    plan = plan_model(lite, recipe)
    assert plan.target == "llama.cpp"  # KTransformers' kernels take multiples of 256 only
    down, dense = plan.by_name["blk.1.ffn_down_exps.weight"], plan.by_name["blk.0.ffn_down.weight"]
    assert (down.qtype, down.row_bytes) == ("IQ4_NL", 1408 // 32 * 18)
    assert dense.qtype == "Q8_0" and dense.why == "Q6_K by rule, but its blocks do not divide rows of 10,944"
    assert plan.by_name["blk.1.ffn_gate_exps.weight"].qtype != "IQ4_NL"  # rows of 2048 divide
    said = capsys.readouterr().err
    assert "kv_b" not in said and "fall back as in llama-quantize: blk.0.ffn_down.weight Q8_0 and " in said


@pytest.mark.parametrize(
    ("asked", "given"),
    [
        *(
            (name, "IQ4_NL")
            for name in ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "Q3_K", "IQ4_XS")
        ),
        ("Q4_K", "Q5_0"),
        ("Q5_K", "Q5_1"),
        ("Q6_K", "Q8_0"),
        ("Q8_0", "Q8_0"),
    ],
)
def test_types_fall_back_as_in_llama_quantize(asked, given):
    """As `llama-quantize --tensor-type ffn_down=TYPE` writes rows of 1,408; where no block divides, F16."""
    assert targets.fitting("llama.cpp", "ffn_down", 1408, asked) == given
    assert targets.fitting("llama.cpp", "ffn_down", 1400, asked) == "F16"
    assert targets.fitting("ktransformers", "ffn_down", 1408, asked) == "Q8_0"  # it has no others with short blocks
    assert targets.fitting("llama.cpp", "ffn_down", 2048, asked) == asked


def test_a_budget_takes_stand_ins_only_where_a_recipe_names_them(lite):
    spec = next(s for s in family.specs(family.from_hf(V2_LITE)) if s.name == "blk.1.ffn_down_exps.weight")
    assert not {"Q5_0", "Q5_1"} & set(Candidates().of(spec, "llama.cpp"))
    assert Candidates(("Q5_0", "Q8_0")).of(spec, "llama.cpp") == ("Q5_0", "Q8_0")


def test_budgets_and_machines(lite):
    assert plan_model(lite, None, None, BudgetOptions(bpw=4.0)).bpw <= 4.0
    assert "llama.cpp" in hardware_report(lite, [], None, Machine(ram=64 << 30, vram=0), 4096)


def test_a_target_that_is_asked_for_is_not_swapped(lite):
    with pytest.raises(QuantkitError, match="multiples of 256"):
        plan_model(lite, None, "ktransformers")


def test_what_llama_cpp_computes_wrongly_is_said(lite, capsys):
    config = json.loads((lite / "config.json").read_text())
    config |= {"topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}
    (lite / "config.json").write_text(json.dumps(config))
    for target, said in (("llama.cpp", True), ("ollama", True), ("ktransformers", False)):
        assert any(ROUTING in line for line in targets.caveats(target, family.from_hf(config))) == said
    plan_model(lite, None, "ollama")
    assert f"warning: ollama chooses experts wrongly in this model: it {ROUTING}" in capsys.readouterr().err
    greedy = family.from_hf(V2_LITE)
    assert targets.caveats("llama.cpp", greedy) == []
    kimi = replace(greedy, yarn=Yarn(32, 4096, beta_fast=1.0, mscale_all_dim=1.0))
    assert "--yarn-beta-fast 1 " in targets.caveats("llama.cpp", kimi)[0]
    set_by = "LLAMA_ARG_YARN_BETA_FAST=1 LLAMA_ARG_YARN_BETA_SLOW=1 ollama serve"
    assert set_by in targets.caveats("ollama", kimi)[0]


def test_what_llama_cpp_cannot_load_is_refused_before_work(lite):
    config = V2_LITE | {"num_hidden_layers": 27, "q_lora_rank": 1536}
    targets.check_model("ktransformers", family.from_hf(config))
    with pytest.raises(QuantkitError, match="takes any model of 27 layers for one without q_lora_rank"):
        targets.check_model("llama.cpp", family.from_hf(config))
