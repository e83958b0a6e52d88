import json

import pytest
import r1_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit.errors import QuantkitError
from quantkit.planning.assign import make_plan
from quantkit.planning.plan import CLASSES, Plan, PlannedTensor, offsets
from quantkit.planning.recipe import Recipe
from quantkit.tensors import split_name


@pytest.fixture(scope="module")
def plan():
    return make_plan(r1_shapes.specs(n_layer=5), Recipe.load("1.58bit"), model="small")


@pytest.fixture
def table(plan):
    return json.loads(plan.to_json())


def read(table):
    return Plan.from_json(json.dumps(table))


def test_json_round_trip(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text.encode()).to_json() == text
    assert len(text.splitlines()) == len(plan.tensors) + 11


def test_digest_is_of_layout_not_of_reasons(plan):
    tensors = tuple(PlannedTensor(**{**vars(t), "why": "another"}) for t in plan.tensors)
    assert Plan("m", "r", plan.target, plan.mla, tensors).digest() == plan.digest()
    assert Plan("m", "r", plan.target, plan.mla, tensors[::-1]).digest() != plan.digest()
    other = make_plan(r1_shapes.specs(n_layer=5), Recipe.load("1.73bit"))
    assert other.digest() != plan.digest()


def test_order_is_the_files_and_offsets_are_aligned(plan):
    assert [t.name for t in plan.tensors] == [s.name for s in r1_shapes.specs(n_layer=5)]
    end = 0
    for tensor in plan.tensors:
        assert tensor.offset % 32 == 0 and 0 <= tensor.offset - end < 32
        end = tensor.offset + tensor.n_bytes
    assert plan.data_bytes >= end > plan.data_bytes - 32
    assert offsets([1, 32, 33, 0, 5]) == [0, 32, 64, 128, 128]


def test_bytes_and_bits(plan):
    assert {tensor.group for tensor in plan.tensors} == set(CLASSES)
    gates = [tensor.n_bytes for tensor in plan.tensors if tensor.group == "experts gate"]
    assert sum(gates) == 2 * 256 * 2048 * 7168 * 50 // 256
    assert sum(tensor.n_bytes for tensor in plan.tensors) == plan.n_bytes
    assert plan.routed_bpw == pytest.approx((4 * 1.5625 + 1.5625 + 2.625) / 6)
    assert plan.by_name["blk.0.attn_k_b.weight"].row_bytes == 136


def test_planning_does_not_depend_on_visiting_order():
    recipe = Recipe.load("2.22bit")
    forward = make_plan(r1_shapes.specs(), recipe)
    backward = make_plan(r1_shapes.specs()[::-1], recipe)
    assert {t.name: t.qtype for t in forward.tensors} == {t.name: t.qtype for t in backward.tensors}


def test_both_layouts_in_one_file_are_refused():
    mixed = r1_shapes.specs("split", n_layer=4)
    mixed += [s for s in r1_shapes.specs("combined", n_layer=4) if s.role == "attn_kv_b"]
    with pytest.raises(QuantkitError, match="keep one MLA layout"):
        make_plan(mixed, Recipe.load("1.58bit"))


def test_a_plan_fits_its_own_model_only(plan):
    specs = r1_shapes.specs(n_layer=5)
    plan.check_model(specs)
    with pytest.raises(QuantkitError, match=r"plan has no tensor blk\.5\.attn_norm\.weight \(\d+ missing\)"):
        plan.check_model(r1_shapes.specs(n_layer=6))
    with pytest.raises(QuantkitError, match=r"output\.weight .* is not in this model"):
        plan.check_model(specs[:-1])


def test_split_name():
    assert split_name("blk.13.exp_probs_b.bias") == ("exp_probs_b", 13)
    assert split_name("token_embd.weight") == ("token_embd", None)
    assert split_name("blk.x.y.weight") == ("blk.x.y", None)


def change(key, value, index=7):
    def edit(table):
        table["tensors"][index][key] = value

    return edit


def set_top(key, value):
    return lambda table: table.update({key: value})


@pytest.mark.parametrize(
    "edit, says",
    [
        (change("qtype", "Q9_Z"), "blk.0.attn_k_b.weight: unknown type 'Q9_Z'"),
        (change("qtype", "Q6_K"), "blk.0.attn_k_b.weight: rows of 128 weights do not divide"),
        (change("qtype", 8), "qtype must be str"),
        (change("n_bytes", 1), "blk.0.attn_k_b.weight: row_bytes and n_bytes must be 136 and"),
        (change("n_bytes", -(1 << 70)), "row_bytes and n_bytes must be"),
        (change("n_bytes", True), "n_bytes must be int"),
        (change("offset", 31), "offset must be"),
        (change("shape", [128, 512, 0]), "shape"),
        (change("shape", [1 << 49, 4, 32]), "more than"),
        (change("shape", [1 << 400]), "positive numbers"),
        (change("shape", [128.0, 512, 128]), "positive numbers"),
        (change("shape", []), "positive numbers"),
        (change("shape", "128"), "shape must be list"),
        (change("name", "blk.0.attn_q_b.weight"), "role and layer must be 'attn_q_b' and 0"),
        (change("name", "x" * 64), "must be 1 to 63 bytes"),
        (change("name", ""), "must be 1 to 63 bytes"),
        (change("name", "a\x1b[2J"), "must be one line of text"),
        (change("layer", 1), "role and layer must be"),
        (change("layer", False), "role and layer must be"),
        (change("role", "attn_q"), "role and layer must be"),
        (change("rule", "1"), "rule must be int"),
        (change("why", None), "why must be str"),
        (change("extra", 1), "unknown key 'extra'"),
        (lambda t: t["tensors"][7].pop("offset"), "offset is missing"),
        (lambda t: t["tensors"][7].pop("layer"), "role and layer must be"),
        (lambda t: t["tensors"].insert(8, t["tensors"][7]), "blk.0.attn_k_b.weight appears twice"),
        (lambda t: t["tensors"].pop(7), "offset must be"),
        (lambda t: t["tensors"].__setitem__(7, 3), "tensor 7 is not an object"),
        (lambda t: t["tensors"].clear(), "0 tensors"),
        (set_top("target", "vllm"), "unknown target"),
        (set_top("model", "../../etc/x"), "model '../../etc/x' must be a plain name"),
        (set_top("recipe", "a\\b"), "must be a plain name"),
        (set_top("mla", "combined"), "the tensors are in the other layout"),
        (set_top("mla", "both"), "unknown mla"),
        (set_top("n_bytes", 5), "the tensors sum to"),
        (set_top("digest", "00"), "changed by hand"),
        (set_top("quantkit_plan", 2), "plan format 2"),
        (set_top("more", 2), "unknown key 'more'"),
        (lambda t: t.pop("tensors"), "tensors is missing"),
    ],
)
def test_hostile_plans_are_refused(table, edit, says):
    edit(table)
    with pytest.raises(QuantkitError) as caught:
        read(table)
    assert says in str(caught.value)
    assert str(caught.value).startswith("plan.json: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", "null", "{", '{"quantkit_plan": NaN}', '{"a": 1, "a": 2}', "[" * 100_000, b"\xff", "9" * 9999],
)
def test_text_that_is_no_plan(text):
    with pytest.raises(QuantkitError, match=r"plan.json: "):
        Plan.from_json(text)


def test_a_type_refused_by_the_target_is_refused_in_a_plan_too():
    good = make_plan(r1_shapes.specs(n_layer=5), Recipe.load("1.58bit"), "llama.cpp")
    text = good.to_json().replace('"target": "llama.cpp"', '"target": "ktransformers"')
    with pytest.raises(QuantkitError, match="IQ2_XXS is refused for ktransformers"):
        Plan.from_json(text)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_harmless(plan, data):
    text = plan.to_json()
    at = data.draw(st.integers(0, len(text) - 1))
    cut = data.draw(st.integers(0, 40))
    damaged = text[:at] + data.draw(st.text(max_size=12)) + text[at + cut :]
    try:
        Plan.from_json(damaged.encode("utf-8", "replace"))
    except QuantkitError as error:
        assert str(error).startswith("plan.json: ")
