"""What was published of large models: read, recognised by geometry, and never taken for another model's."""

import dataclasses

import pytest
import r1_shapes

from quantkit.errors import QuantkitError
from quantkit.planning.damage import Known, Prior, unmeasured
from quantkit.planning.published import load, recognise
from quantkit.planning.recipe import Recipe

R1 = r1_shapes.specs()
EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")


def test_r1_is_recognised_with_and_without_its_mtp_layer():
    found = recognise(R1)
    assert found and "R1-0528" in found.models and "Thireus" in found.credit
    mtp = dataclasses.replace(R1[-1], name="blk.61.nextn.eh_proj.weight", role="nextn.eh_proj", layer=61)
    assert recognise([*R1, mtp]) == found
    assert isinstance(unmeasured(R1), Known)


@pytest.mark.parametrize("shapes", [{"n_layer": 60}, {"n_layer": 4}])
def test_other_depths_are_not(shapes):
    assert recognise(r1_shapes.specs(**shapes)) is None
    assert isinstance(unmeasured(r1_shapes.specs(**shapes)), Prior)


def test_every_family_knows_r1s_roles():
    roles = {spec.role for spec in R1 if not spec.fixed}
    for known in load():
        assert roles | {"attn_kv_b"} <= set(known.damage), known.name
        for role, row in known.damage.items():
            assert len(row) in (1, len(known.knots)) and min(row) >= 0 and max(row) > 0, (known.name, role)


def test_linear_between_knots_and_flat_outside():
    known = load()[0]
    a, b = known.knots[3:5]
    low, high = known.damage["ffn_down_exps"][3:5]
    assert known.gain("ffn_down_exps", a) == pytest.approx(low)
    assert known.gain("ffn_down_exps", b) == pytest.approx(high)
    assert known.gain("ffn_down_exps", a + 1) == pytest.approx(low + (high - low) / (b - a))
    assert known.gain("ffn_down_exps", known.knots[-1] + 5) == known.damage["ffn_down_exps"][-1]
    assert known.gain("output", None) == known.damage["output"][0] and known.gain("no_such_role", 3) is None


def test_facts_that_the_tables_agree_on():
    """R1 and V3.x: early experts matter less than later ones, the last layer's shared expert more than other layers',
    output most of all. GLM falls with depth."""
    v3, kimi, glm = load()
    early, late = (sum(v3.gain(role, layer) for role in EXPERTS) for layer in (4, 40))
    assert late > 1.2 * early
    for known in (v3, kimi):
        assert known.gain("ffn_down_shexp", 60) > 4 * known.gain("ffn_down_shexp", 40)
    single = [x for role, row in v3.damage.items() if role != "output" for x in row]
    assert v3.gain("output", None) > max(single)
    assert glm.gain("ffn_down_exps", 10) > 1.2 * glm.gain("ffn_down_exps", 70)


def test_a_recipe_can_only_name_a_bundled_one():
    text = 'name = "r"\ndescription = "d"\ntarget = "llama.cpp"\npublished = "none"\n[[rules]]\nmatch = "*"\n'
    with pytest.raises(QuantkitError, match="unknown published"):
        Recipe.parse(text + 'qtype = "Q8_0"\nwhy = "w"\n', "r.toml")
