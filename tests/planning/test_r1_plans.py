"""R1's whole plan per recipe and target, from its real shapes. The diff of a snapshot is the review of a recipe.

After an intended change: QUANTKIT_SNAPSHOTS=write python -m pytest tests/planning/test_r1_plans.py
"""

import json
import os
from pathlib import Path

import pytest
import r1_shapes

from quantkit import bundle
from quantkit.job.hardware import hardware_report
from quantkit.job.options import owed
from quantkit.job.plan import basis, plan_file_bytes, plan_model, predict_plan
from quantkit.models import family
from quantkit.planning import table
from quantkit.planning.assign import make_plan
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.hardware import Machine
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Recipe
from quantkit.planning.table import layer_ranges, render

SNAPSHOTS = Path(__file__).parent / "snapshots"
RECIPES = ("1.58bit", "1.73bit", "2.22bit", "2.51bit")
VARIANTS = (("ktransformers", "split"), ("llama.cpp", "split"), ("llama.cpp", "combined"))

# Published bytes of Unsloth's files, and how many splits (each with its own small header) they came in.
UNSLOTH = {
    "1.58bit": (140_231_438_464, 3),
    "1.73bit": (168_916_283_648, 4),
    "2.22bit": (196_162_482_432, 4),
    "2.51bit": (226_601_595_040, 5),
}
MOST = {  # of the damage that the rules' types are expected to do; KTransformers has few types between IQ1_S and Q3_K
    ("1.58bit", "ktransformers"): 0.99,
    ("1.73bit", "ktransformers"): 0.99,
    ("2.22bit", "ktransformers"): 0.9,
    ("2.51bit", "ktransformers"): 0.99,
    ("1.58bit", "llama.cpp"): 0.98,
    ("1.73bit", "llama.cpp"): 0.88,
    ("2.22bit", "llama.cpp"): 0.92,
    ("2.51bit", "llama.cpp"): 0.8,
}
TINY = json.loads((bundle.models_dir() / "tiny-r1" / "config.json").read_text())
SMALL = """name = "s"
description = "d"
target = "llama.cpp"
[[rules]]
match = "*"
qtype = "Q8_0"
optional = true
why = "w"
"""
HEADER = 5_302_600  # all but a few hundred bytes of it the vocabulary of 129,280 tokens and 127,741 merges


def r1_plan(recipe: str, target: str, mla: str) -> Plan:
    """By the recipe's own rules, as for a model of which nothing was published."""
    return make_plan(r1_shapes.specs(mla), Recipe.load(recipe), f"{target}/{mla}", model="deepseek-r1")


def snapshot(plan: Plan) -> str:
    roles = []
    for role in dict.fromkeys(tensor.role for tensor in plan.tensors):
        tensors = [tensor for tensor in plan.tensors if tensor.role == role]
        roles.append(f"{role:<16} {sum(t.n_bytes for t in tensors):>15,}  {layer_ranges(tensors)}")
    return "\n".join([render(plan), *roles, "", f"sha256 {plan.digest()}", ""])


@pytest.mark.parametrize("target, mla", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_snapshot(recipe, target, mla):
    text = snapshot(r1_plan(recipe, target, mla))
    check_snapshot(f"{recipe}.{target}.{mla}.txt", text)
    assert max(map(len, text.splitlines())) <= 100


def check_snapshot(name: str, text: str) -> None:
    path = SNAPSHOTS / name
    if os.environ.get("QUANTKIT_SNAPSHOTS") == "write":
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("target, mla", VARIANTS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_r1_spends_the_bytes_of_the_rules_by_published_damage(recipe, target, mla):
    """Never more bytes, nearly all of them, and less damage expected; Unsloth's own recipe keeps its types."""
    rules = r1_plan(recipe, target, mla)
    plan = plan_model("deepseek-r1", recipe, f"{target}/{mla}")
    assert (plan.recipe, plan.target, plan.mla) == (recipe, target, mla)
    assert 0.999 * rules.data_bytes < plan.data_bytes <= rules.data_bytes
    assert plan_file_bytes("deepseek-r1", plan) <= plan_file_bytes("deepseek-r1", rules)
    after, before = (predict_plan("deepseek-r1", one, None) for one in (plan, rules))
    print(f"{recipe} {target} {mla}: predicted {after:.4f}, by the rules {before:.4f}: {after / before:.3f}")
    assert after < MOST[recipe, target] * before
    assert "Thireus" in plan.outlook.damage and plan.outlook.damage == basis("deepseek-r1", plan, None)
    assert "Thireus" in owed(plan)[0] and not owed(rules)  # whom a model card names
    check_snapshot(f"published-{recipe}.{target}.{mla}.txt", snapshot(plan))
    if target == "llama.cpp":
        assert plan_model("deepseek-r1", f"unsloth-{recipe}", f"{target}/{mla}").digest() == rules.digest()


@pytest.mark.parametrize("recipe", RECIPES)
def test_models_of_which_nothing_was_published_keep_the_rules(recipe):
    rules = make_plan(family.specs(family.from_hf(TINY)), Recipe.load(recipe), model="tiny-r1")
    assert plan_model("tiny-r1", recipe) == rules


@pytest.mark.parametrize("target", ["ktransformers", "llama.cpp"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_allocated_snapshot(recipe, target):
    """What the prior makes of the bytes of Unsloth's files."""
    size, _ = UNSLOTH[recipe]
    plan = plan_model("deepseek-r1", None, target, BudgetOptions(size=size))
    tail = table.outlook(plan, plan_file_bytes("deepseek-r1", plan), plan.outlook.kld, plan.outlook.damage)
    check_snapshot(f"auto-{recipe}.{target}.split.txt", f"{snapshot(plan)}\n{tail}\n")


def test_machine_snapshot():
    budget = BudgetOptions(ram=128 << 30, vram=24 << 30)
    plan = plan_model("deepseek-r1", target="llama.cpp", budget=budget)
    check_snapshot("auto-128GiB-24GiB.llama.cpp.split.txt", f"{snapshot(plan)}\n{plan.outlook.limit}\n")


@pytest.mark.parametrize("target", ["ktransformers", "llama.cpp", "ollama"])
def test_hardware_snapshot(target):
    """The 60 GiB + 14 GiB machine with DDR4 and one NVMe drive."""
    machine = Machine(60 << 30, 14 << 30, 80e9, 900e9, 3e9)
    text = hardware_report("deepseek-r1", (), target, machine, 4096, 32)
    check_snapshot(f"hardware.{target}.txt", text + "\n")


@pytest.mark.parametrize("recipe", RECIPES)
def test_unsloths_sizes(recipe):
    published, splits = UNSLOTH[recipe]
    header = published - r1_plan(recipe, "llama.cpp", "combined").data_bytes
    assert HEADER < header < HEADER + 128 * splits


@pytest.mark.parametrize("recipe", RECIPES)
def test_ktransformers_variant_weighs_the_same_and_never_more(recipe):
    published, _ = UNSLOTH[recipe]
    left = published - HEADER - r1_plan(recipe, "ktransformers", "split").data_bytes
    assert 0 < left < published / 1000


@pytest.mark.parametrize("recipe", RECIPES)
def test_ollama_gets_llama_cpps_types(recipe):
    assert r1_plan(recipe, "ollama", "split").digest() == r1_plan(recipe, "llama.cpp", "split").digest()
    ollama, llama = (plan_model("deepseek-r1", recipe, target) for target in ("ollama", "llama.cpp"))
    assert ollama.digest() == llama.digest()


@pytest.mark.parametrize("mla, count", [("split", 1086), ("combined", 1025)])
def test_bundled_r1_has_these_shapes(mla, count):
    config = json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text())
    ours = [(s.name, s.shape, s.role, s.layer, s.fixed) for s in family.specs(family.from_hf(config), mla)]
    assert ours == [(s.name, s.shape, s.role, s.layer, s.fixed) for s in r1_shapes.specs(mla)]
    assert len(ours) == count


def test_small_models_are_shown_in_mib():
    plan = make_plan(r1_shapes.specs(n_layer=0)[1:2], Recipe.parse(SMALL, "small.toml"))
    assert "MiB" in render(plan) and "GiB" not in render(plan)
