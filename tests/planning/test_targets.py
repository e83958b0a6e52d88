import pytest
import r1_shapes

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.planning import targets
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe

HEAD = 'name = "r"\ndescription = "d"\ntarget = "ktransformers"\n'


def plan(role, qtype, target="ktransformers", specs=None):
    rules = "".join(
        f'[[rules]]\nmatch = "{match}"\nqtype = "{q}"\nwhy = "w"\n' for match, q in ((role, qtype), ("*", "Q8_0"))
    )
    return make_plan(specs or r1_shapes.specs(n_layer=5), Recipe.parse(HEAD + rules, "r.toml"), target)


@pytest.mark.parametrize(
    "role, qtype, why",
    [
        ("ffn_gate_exps", "IQ2_XXS", "silently wrong in its AVX512 and AMX variants"),
        ("ffn_down_exps", "IQ1_M", "aborts when it is the gate's type and silently returns zeros"),
        ("ffn_up_exps", "IQ3_S", "silently returns zeros"),
        ("ffn_up_exps", "F32", "not among the types measured"),
        ("attn_output", "IQ1_S", "no dequantizer"),
        ("ffn_down_shexp", "IQ2_XXS", "no dequantizer"),
        ("attn_k_b", "IQ4_NL", "short-block types"),
    ],
)
def test_ktransformers_refuses_with_reason_and_way_out(role, qtype, why):
    with pytest.raises(QuantkitError) as caught:
        plan(role, qtype)
    message = str(caught.value)
    assert f"{role}.weight: {qtype} is refused for ktransformers" in message
    assert why in message
    assert "; use " in message and "Q8_0" in message.split("; use ")[1]
    plan(role, qtype, "llama.cpp")


@pytest.mark.parametrize("qtype", targets.KTRANSFORMERS.allowed[targets.EXPERTS].types)
def test_ktransformers_experts(qtype):
    plan("ffn_*_exps", qtype)


def test_sizes_that_kt_kernel_cannot_tile():
    specs = [s for s in r1_shapes.specs(n_layer=4) if s.role != "ffn_up_exps"]
    odd = next(s for s in r1_shapes.specs(n_layer=4) if s.role == "ffn_up_exps")
    specs.append(type(odd)(odd.name, (256, 2080, 7168), odd.role, odd.layer, ()))
    with pytest.raises(QuantkitError, match=r"multiples of 256, not 2080 × 7168"):
        plan("ffn_up_exps", "Q4_K", specs=specs)
    plan("ffn_up_exps", "Q4_K", "llama.cpp", specs=specs)


def test_every_type_is_allowed_or_refused_with_a_reason():
    for target in targets.TARGETS.values():
        for allowed in target.allowed.values():
            assert allowed.source
            assert not set(allowed.types) & set(allowed.refused)
            assert set(allowed.types) | set(allowed.refused) <= {*qtypes.QTYPES, qtypes.TABLE.name}
            assert all(allowed.why_not(q) for q in qtypes.QTYPES if q not in allowed.types)


def test_unknown_target():
    with pytest.raises(QuantkitError, match=r"unknown target 'vllm'; known: ktransformers llama\.cpp ollama"):
        plan("output", "Q8_0", "vllm")


def test_a_target_may_name_the_layout():
    assert targets.parse("llama.cpp") == targets.TargetChoice("llama.cpp", None)
    assert targets.parse("llama.cpp/combined") == targets.TargetChoice("llama.cpp", "combined")
    recipe = Recipe.load("1.58bit")
    assert recipe.aimed(None) == recipe
    assert (recipe.aimed("ollama").target, recipe.aimed("ollama").mla) == ("ollama", "split")
    assert recipe.aimed("ollama/combined").mla == "combined"
    for text, says in (
        ("llama.cpp/both", "split or combined"),
        ("llama.cpp/", "split or combined"),
        ("x/split", "'x'"),
    ):
        with pytest.raises(QuantkitError, match=says):
            targets.parse(text)


def test_suggestions_fit_the_rows():
    assert targets.suggest("ktransformers", "attn_k_b", 128) == ("Q8_0", "F16", "BF16", "F32")
    short = "MXFP4", "IQ4_NL", "Q4_0", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32"
    assert targets.suggest("llama.cpp", "attn_k_b", 128) == short


@pytest.mark.parametrize(
    ("types", "says"),
    [
        ({"blk.0.attn_k_b.weight": "Q8_0", "blk.1.attn_v_b.weight": "Q6_K"}, "attn_k_b is Q8_0, attn_v_b is Q6_K, and"),
        ({"blk.0.attn_k_b.weight": "BF16", "blk.1.attn_v_b.weight": "Q5_1", "output.weight": "Q6_K"}, ""),
        ({"blk.0.attn_kv_b.weight": "Q8_0", "blk.1.ffn_gate_exps.weight": "Q4_K"}, ""),
        ({"blk.0.attn_output_a.weight": "Q4_K"}, "attn_output_a is Q4_K"),
    ],
)
def test_what_amx_takes_and_cannot_multiply_is_named(types, says):
    """Measured: docs/results/amx.md."""
    found = targets.aborts_on_amx(types.items())
    assert says in found and bool(found) == bool(says)
