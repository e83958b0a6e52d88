import pytest
import r1_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe, Share

HEAD = 'name = "r"\ndescription = "d"\ntarget = "llama.cpp"\n'
ALL = '[[rules]]\nmatch = "*"\nqtype = "Q8_0"\nwhy = "w"\n'


def rule(match="*", qtype="Q8_0", **more):
    extra = "".join(f"{key} = {value}\n" for key, value in more.items())
    return f'[[rules]]\nmatch = "{match}"\nqtype = "{qtype}"\nwhy = "w"\n{extra}'


def plan(rules, target=None, **shape):
    return make_plan(r1_shapes.specs(**shape), Recipe.parse(HEAD + rules, "r.toml"), target)


def layers_of(planned, role, qtype):
    return [t.layer for t in planned.tensors if t.role == role and t.qtype == qtype]


def refused(text, call, *args):
    with pytest.raises(QuantkitError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    assert text in str(caught.value)


def parse(text):
    return Recipe.parse(text, "r.toml")


def test_first_match_wins():
    planned = plan(rule("ffn_down_exps", "Q2_K", layers='"3-4,7"') + rule("ffn_*_exps", "Q3_K") + ALL)
    assert layers_of(planned, "ffn_down_exps", "Q2_K") == [3, 4, 7]
    assert len(layers_of(planned, "ffn_down_exps", "Q3_K")) == 55
    assert planned.by_name["blk.3.ffn_down_exps.weight"].rule == 1
    assert planned.by_name["output.weight"].rule == 3
    assert planned.by_name["output_norm.weight"].rule is None


def test_match_takes_braces_lists_and_names():
    planned = plan(
        rule("ffn_{gate,up}_{exps,shexp}", "Q4_K")
        + '[[rules]]\nmatch = ["blk.60.ffn_down_exps.*", "output.weight"]\nqtype = "Q6_K"\nwhy = "w"\n'
        + ALL
    )
    sixes = [tensor.name for tensor in planned.tensors if tensor.qtype == "Q6_K"]
    assert sixes == ["blk.60.ffn_down_exps.weight", "output.weight"]
    assert sum(tensor.qtype == "Q4_K" for tensor in planned.tensors) == 4 * 58


@pytest.mark.parametrize(
    "share, n_moe, count",
    [("6/58", 58, 6), ("6/58", 4, 1), ("6/58", 29, 3), ("27/58", 58, 27), ("1/2", 3, 2), ("1/1", 7, 7), ("1/58", 1, 1)],
)
def test_share_of_the_moe_layers(share, n_moe, count):
    part, whole = map(int, share.split("/"))
    layers = range(3, 3 + n_moe)
    assert Share("first", part, whole).of(layers) == tuple(layers[:count])
    assert Share("last", part, whole).of(layers) == tuple(layers[-count:])


def test_share_may_be_all_of_a_shallow_model():
    rules = rule("ffn_down_exps", "Q2_K", moe_layers='"first 6/58"') + rule("ffn_*_exps", "Q3_K")
    rules += rule("ffn_down_exps", "Q4_K") + ALL  # its layers are never left over, even in R1
    refused("rule 3 (ffn_down_exps -> Q4_K) never applies: its tensors are taken by earlier rules", plan, rules)
    rules = rule("ffn_down_exps", "Q2_K", moe_layers='"first 6/58"') + rule("ffn_down_exps", "Q3_K") + ALL
    assert layers_of(plan(rules, n_layer=4), "ffn_down_exps", "Q2_K") == [3]
    assert layers_of(plan(rules), "ffn_down_exps", "Q2_K") == [3, 4, 5, 6, 7, 8]


def test_rules_of_another_target_do_not_exist():
    rules = rule("output", "Q6_K", target='"ktransformers"') + rule("output", "Q4_K", target='["ollama"]') + ALL
    assert plan(rules).by_name["output.weight"].qtype == "Q8_0"
    assert plan(rules, "ollama").by_name["output.weight"].qtype == "Q4_K"


def test_missing_rule_names_the_tensor():
    refused("r.toml: no rule for token_embd.weight (role token_embd", plan, rule("ffn_*") + rule("attn_*"))


@pytest.mark.parametrize("match", ["ffn_gat_exps", "blk.61.*", "mtp*"])
def test_useless_rule_is_named(match):
    refused(f"r.toml: rule 1 ({match} -> Q8_0) matches no tensor", plan, rule(match) + ALL)
    plan(rule(match, optional="true") + ALL)


def test_useless_rules_of_other_kinds():
    refused("rule 1 (ffn_down -> Q8_0) matches no tensor", plan, rule("ffn_down", layers='"3-60"') + ALL)
    refused("rule 2 (output -> Q8_0) never applies: its tensors are taken", plan, ALL + rule("output"))
    refused("its types are fixed by the format", plan, rule("ffn_gate_inp") + ALL)


def test_rows_that_do_not_divide_fall_back():
    """As llama-quantize does: to blocks of 32 with as many bits, said in the plan."""
    made = {t.role: t for t in plan(rule(qtype="Q6_K")).tensors}
    assert made["attn_k_b"].qtype == "Q8_0" and made["attn_q_a"].qtype == "Q6_K"
    assert made["attn_k_b"].why == "Q6_K by rule, but its blocks do not divide rows of 128"


def test_embeddings_have_no_importance():
    refused("token_embd.weight: IQ1_S needs importance", plan, rule("token_embd", "IQ1_S") + ALL)


@pytest.mark.parametrize(
    "text, says",
    [
        ("name = ", "r.toml: not TOML"),
        (HEAD + 'name = "twice"\n' + ALL, "r.toml: not TOML"),
        (HEAD, "rules is missing"),
        (HEAD + "rules = []", "one or more [[rules]]"),
        (HEAD + "rules = [3]", "one or more [[rules]]"),
        (HEAD.replace('"d"', '""') + ALL, "description must be one line"),
        (HEAD.replace('"r"', '"../r"') + ALL, "name '../r' must be"),
        (HEAD.replace("llama.cpp", "vllm") + ALL, "unknown target 'vllm'; known: ktransformers llama.cpp ollama"),
        (HEAD.replace("description", "discription") + ALL, "unknown key 'discription'"),
        (HEAD + 'mla = "both"\n' + ALL, "unknown mla 'both'; known: split combined"),
        (HEAD + "colour = 3\n" + ALL, "unknown key 'colour'"),
        (HEAD + ALL + ALL.replace("why", "because"), "rule 2: unknown key 'because'"),
        (
            HEAD + ALL.replace("qtype", "type") + ALL.replace("Q8_0", "Q8"),
            "why; rule 1: needs either qtype, the type, or allocate, what the budget may choose from; rule 2: unknown",
        ),
        (HEAD + ALL.replace('"w"', '"  "'), "rule 1: why must be one line of text"),
        (HEAD + ALL.replace('"w"', '"a\\nb"'), "rule 1: why must be one line of text"),
        (HEAD + ALL.replace('"*"', "[]"), "rule 1: match is an empty list"),
        (HEAD + ALL.replace('"*"', "7"), "rule 1: match must be one line of text (1000 characters at most), not 7"),
        (HEAD + ALL.replace('"*"', '"{a,{b}}"'), "braces must pair"),
        (HEAD + ALL.replace('"*"', '"a}"'), "braces must pair"),
        (HEAD + ALL.replace("Q8_0", "Q9_Z"), "rule 1: unknown qtype 'Q9_Z'; known: IQ1_S"),
        (HEAD + rule(optional='"yes"'), "optional must be true or false"),
        (HEAD + rule(layers="3"), "layers must be one line of text (1000 characters at most), not 3"),
        (HEAD + rule(layers='"8-3"'), "8-3 runs backwards"),
        (HEAD + rule(layers='"3-"'), "must be block numbers"),
        (HEAD + rule(layers='"3"', moe_layers='"first 1/2"'), "both layers and moe_layers"),
        (HEAD + rule(moe_layers='"first 0/58"'), "must be a share"),
        (HEAD + rule(moe_layers='"first 3/2"'), "must be a share"),
        (HEAD + rule(moe_layers='"some 1/2"'), "must be a share"),
        (HEAD + rule(target='"llamacpp"'), "rule 1: unknown target 'llamacpp'"),
        (b"\xff\xfe\x00", "r.toml: not TOML"),
        ("a = " + "[" * 100_000, "r.toml: not usable TOML"),
    ],
)
def test_bad_recipes_are_one_clear_line(text, says):
    refused(says, parse, text)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text(max_size=60)), st.integers(0, 400))
def test_any_bytes_parse_or_are_refused(noise, at):
    good = (HEAD + ALL).encode()
    at %= len(good)
    data = good[:at] + (noise if isinstance(noise, bytes) else noise.encode("utf-8", "replace")) + good[at:]
    try:
        Recipe.parse(data, "r.toml")
    except QuantkitError as error:
        assert "r.toml" in str(error)


def test_load(tmp_path):
    assert {"1.58bit", "1.73bit", "2.22bit", "2.51bit"} <= set(bundle.recipe_names())
    assert Recipe.load("1.58bit").name == "1.58bit"
    (tmp_path / "mine.toml").write_text(HEAD + ALL)
    assert Recipe.load(tmp_path / "mine.toml").name == "r"
    refused("no recipe '1.59bit': not a file, and the bundled ones are 1.58bit", Recipe.load, "1.59bit")
    refused("no recipe", Recipe.load, str(tmp_path))
    refused("no recipe", Recipe.load, "../recipes/1.58bit")
    (tmp_path / "big.toml").write_text("#" * (1 << 21))
    refused("not a recipe", Recipe.load, tmp_path / "big.toml")


@pytest.mark.parametrize("name", bundle.recipe_names())
def test_bundled_recipes_say_why(name):
    recipe = Recipe.load(name)
    assert recipe.name == name
    assert recipe.target == ("llama.cpp" if name.startswith("unsloth-") else "ktransformers")
    assert all(len(rule.why) > 15 for rule in recipe.rules)


def test_all_errors_of_a_file_are_said_at_once():
    wrong = (
        'name = "a b"\ntarget = "foo"\ncolour = 1\n'
        '[[rules]]\nmatch = "a{b"\nqtype = "Q9"\nlayers = "5-2"\nmoe_layers = "first 1/3"\n'
        '[[rules]]\nmatch = "*"\nallocate = { floor = "X" }\nfallback = "Q8_0"\noptional = 3\n'
        "[budget]\nbpw = 99\n"
    )
    with pytest.raises(QuantkitError) as caught:
        parse(wrong)
    said = str(caught.value)
    for part in (
        "unknown key 'colour'",
        "name 'a b'",
        "unknown target 'foo'",
        "rule 1: has both layers and moe_layers",
    ):
        assert part in said
    for part in (
        "rule 1: match 'a{b'",
        "rule 1: unknown qtype 'Q9'",
        "rule 1: layers '5-2'",
        "rule 2: optional must be",
    ):
        assert part in said
    for part in ("fallback stands in for a qtype", "rule 2: allocate: unknown floor 'X'", "budget: bpw must be"):
        assert part in said
    assert said.count("r.toml") == 1


def test_a_rule_says_what_short_rows_get():
    """R1's k_b has rows of 128."""
    by_default, asked = plan(rule(qtype="Q4_K")), plan(rule(qtype="Q4_K", fallback='"Q8_0"'))
    name = "blk.0.attn_k_b.weight"
    assert (by_default.by_name[name].qtype, asked.by_name[name].qtype) == ("Q5_0", "Q8_0")
    assert asked.by_name["blk.0.attn_q_a.weight"].qtype == "Q4_K" and "by rule, but" in asked.by_name[name].why
    assert plan(rule(qtype="Q4_K", fallback='"Q2_K"')).by_name[name].qtype == "Q5_0"  # which does not fit either
