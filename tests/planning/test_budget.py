"""Budgets on R1's real shapes and on small ones: never above, nearly all of it used, rules obeyed."""

import numpy as np
import patience
import pytest
import r1_shapes

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_spec import pad
from quantkit.job.plan import file_bytes, plan_file_bytes, plan_model
from quantkit.models.open import open_model
from quantkit.planning.assign import plan_within, predict
from quantkit.planning.budget import BudgetOptions
from quantkit.planning.damage import Prior, unmeasured
from quantkit.planning.plan import Plan
from quantkit.planning.recipe import Budget, Candidates, Recipe
from quantkit.sizes import both_units, parse_size

HEAD = 'name = "r"\ndescription = "d"\ntarget = "llama.cpp"\n'
REST = '[[rules]]\nmatch = "*"\nallocate = {}\nwhy = "w"\n'


def rule(match, allocate):
    return f'[[rules]]\nmatch = "{match}"\nallocate = {allocate}\nwhy = "w"\n'


def within(rules, n_bytes=None, gpu=None, n_layer=6, bpw=None):
    specs = r1_shapes.specs(n_layer=n_layer)
    recipe = Recipe.parse(HEAD + rules, "r.toml")
    budget = Budget(n_bytes, bpw, gpu)
    return plan_within(specs, recipe, "m", budget, Prior(specs), lambda plan: plan.data_bytes + 1000)


@pytest.mark.parametrize(
    ("size", "target"),
    [
        *(("131GiB", target) for target in ("ktransformers", "llama.cpp", "ollama")),
        ("140231438464", "llama.cpp"),
        ("158GiB", "ktransformers"),
        ("182.69GiB", "ollama"),
        ("212GiB", "ktransformers"),
        ("400GiB", "llama.cpp"),
    ],
)
def test_r1_fills_its_budget_and_never_more(size, target):
    budget = BudgetOptions(size=parse_size(size, "--size"))
    with patience.within(5):
        plan = plan_model("deepseek-r1", None, target, budget)
        used = plan_file_bytes("deepseek-r1", plan)
    assert len(plan.tensors) == 1086
    assert 0.999 * budget.size < used <= budget.size
    assert plan.outlook.gap < 0.003


def test_splits_count_too():
    size = 200 * 10**9
    plan = plan_model("deepseek-r1", budget=BudgetOptions(size=size), split_max_bytes=5 * 10**9)
    source = open_model("deepseek-r1")
    assert 0.999 * size < file_bytes(source, plan, 5 * 10**9) <= size


@pytest.mark.parametrize("limits", [{"size": 0}, {"ram": 0}, {"ram": 1, "size": 1}, {"vram": 1 << 34}])
def test_contradictory_options(limits):
    with pytest.raises(QuantkitError):
        plan_model("deepseek-r1", budget=BudgetOptions(**limits))


def test_all_on_the_gpu():
    plan = plan_model("deepseek-r1", budget=BudgetOptions(ram=0, vram=160 << 30))
    assert plan.n_bytes < 160 << 30


def test_bits_per_weight():
    plan = plan_model("deepseek-r1", budget=BudgetOptions(bpw=2.0))
    assert 1.998 < plan.bpw <= 2.0


def test_more_bytes_are_never_worse():
    specs = r1_shapes.specs()
    sizes = [n * 10**9 for n in (140, 150, 170, 200, 250, 350)]
    klds = [plan_model("deepseek-r1", budget=BudgetOptions(size=n)).outlook.kld for n in sizes]
    assert klds == sorted(klds, reverse=True)
    hand = plan_model("deepseek-r1", "unsloth-1.58bit")
    auto = plan_model(
        "deepseek-r1", target="llama.cpp", budget=BudgetOptions(size=plan_file_bytes("deepseek-r1", hand))
    )
    damage = unmeasured(specs)
    assert predict(auto, specs, damage) < predict(hand, specs, damage)


def test_rules_pin_and_bound_what_is_allocated():
    pinned = '[[rules]]\nmatch = "ffn_down_exps"\nqtype = "Q3_K"\nwhy = "w"\n'
    bounded = rule("ffn_{gate,up}_exps", '{ types = ["IQ1_S", "IQ2_XXS", "Q2_K"] }')
    bounded += rule("attn_*", '{ floor = "Q4_K", ceiling = "Q6_K" }').replace("attn_*", "attn_{q_a,q_b,output}")
    plan = within(pinned + bounded + REST, 25 * 10**9)
    for tensor in plan.tensors:
        if tensor.role == "ffn_down_exps":
            assert tensor.qtype == "Q3_K" and tensor.rule == 1
        elif tensor.is_routed:
            assert tensor.qtype in ("IQ1_S", "IQ2_XXS", "Q2_K") and tensor.rule == 2
        elif tensor.role in ("attn_q_a", "attn_q_b", "attn_output"):
            assert qtypes.get("Q4_K").bpw <= qtypes.get(tensor.qtype).bpw <= qtypes.get("Q6_K").bpw
        assert tensor.role != "token_embd" or not qtypes.needs_importance(tensor.qtype)


def test_what_stays_on_the_gpu_has_its_own_limit():
    free, limited = within(REST, 25 * 10**9), within(REST, 25 * 10**9, gpu=3 * 10**9)

    def resident(plan):
        return sum(t.n_bytes for t in plan.tensors if not t.is_routed)

    assert resident(limited) <= 3 * 10**9 < resident(free)
    assert limited.data_bytes > 0.99 * 25 * 10**9 and limited.outlook.kld > free.outlook.kld


def least_damage(plan, limit, specs):
    """The optimum over all choices of types: for every number of bytes the best way there, one tensor after another."""
    damage, best = Prior(specs), np.zeros((1, 2))  # rows: bytes, damage; less damage the more bytes
    for spec in specs:
        names = [plan.by_name[spec.name].qtype] if spec.fixed else Candidates().of(spec, plan.target)
        options = [(pad(spec.n_rows * qtypes.row_bytes(n, spec.n_in)), damage.of(spec, n)) for n in names]
        every = (best[:, None] + np.array(options)[None]).reshape(-1, 2)
        every = every[every[:, 0] <= limit]
        every = every[np.lexsort((every[:, 1], every[:, 0]))]
        lowest = np.minimum.accumulate(every[:, 1])
        best = every[np.append(True, lowest[1:] < lowest[:-1])]
    return damage.total(best[-1, 1])


@pytest.mark.parametrize(("n_layer", "size"), [(4, 20 * 10**9), (5, 12 * 10**9)])
def test_near_the_optimum(n_layer, size):
    best = least_damage(within(REST, size, n_layer=n_layer), size - 1000, r1_shapes.specs(n_layer=n_layer))
    assert best * (1 - 1e-9) <= within(REST, size, n_layer=n_layer).outlook.kld <= best * 1.01


def test_budget_in_the_recipe():
    plan = plan_model("tiny-r1", "auto", budget=BudgetOptions(bpw=3.0))
    assert plan.bpw <= 3.0
    recipe = Recipe.parse(HEAD + REST + '[budget]\nsize = "20GiB"\ngpu = "3000MiB"\n', "r.toml")
    assert recipe.budget == Budget(20 << 30, None, 3000 << 20)


def test_plan_json_keeps_the_outlook():
    plan = within(REST, 20 * 10**9)
    assert Plan.from_json(plan.to_json()) == plan and plan.outlook.damage == "prior"


@pytest.mark.parametrize(
    "rules, limits, says",
    [
        (REST, {"n_bytes": 10**9}, "the smallest feasible size is "),
        (REST, {"bpw": 1.0}, "the smallest feasible is 1."),
        (REST, {"n_bytes": 25 * 10**9, "gpu": 10**9}, "tensors that stay on the GPU"),
        (rule("*", '{ types = ["IQ2_XS"] }'), {"n_bytes": 10**11}, "leaves no type for token_embd.weight"),
        (rule("*", '{ floor = "Q6_K", ceiling = "Q4_K" }'), {"n_bytes": 10**11}, "floor Q6_K has more bits than"),
        (rule("*", '{ types = ["Q9_K"] }'), {"n_bytes": 10**11}, "unknown type 'Q9_K'"),
        (rule("*", "{ per_expert = true }"), {"n_bytes": 10**11}, "in one tensor of one type"),
        (rule("*", '"all"'), {"n_bytes": 10**11}, "allocate must be a table"),
        (REST.replace("allocate = {}", 'allocate = {}\nqtype = "Q4_K"'), {"n_bytes": 10**11}, "either qtype"),
        (REST + '[budget]\nsize = "1G"\nbpw = 2\n', {"n_bytes": 10**11}, "give size or bpw"),
        (REST + "[budget]\nbpw = 99\n", {"n_bytes": 10**11}, "bpw must be a number of bits"),
        (REST.replace("allocate = {}", 'qtype = "Q4_K"'), {"n_bytes": 10**11}, "its rules fix every type"),
    ],
)
def test_impossible_budgets_are_one_clear_line(rules, limits, says):
    with pytest.raises(QuantkitError) as caught:
        within(rules, **limits)
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_smallest_feasible_size_is_feasible():
    with pytest.raises(QuantkitError) as caught:
        within(REST, 10**9)
    smallest = int(str(caught.value).split("size is ")[1].split(" bytes")[0].replace(",", ""))
    assert within(REST, smallest).data_bytes + 1000 == smallest
    with pytest.raises(QuantkitError, match="is too small"):
        within(REST, smallest - 1)


@pytest.mark.parametrize(
    "text, n", [("50G", 50e9), ("1.5 GiB", 1.5 * 2**30), ("123", 123), ("4096MB", 4096e6), ("1.31e11", 1.31e11)]
)
def test_sizes(text, n):
    assert parse_size(text, "--x") == n


def test_sizes_are_shown_in_both_units():
    assert both_units(140_188_446_432) == "140.2 GB, 130.6 GiB"
    assert both_units(4_066_208) == "4.1 MB, 3.9 MiB"


@pytest.mark.parametrize("text", ["", "G", "-1G", "1X", "1iB", "nan", "1e99T"])
def test_bad_sizes(text):
    with pytest.raises(QuantkitError, match="--x"):
        parse_size(text, "--x")
