"""Damage models: the smoothing of a measurement, and the prior."""

import math
import random

import pytest
import r1_shapes

from quantkit.codecs import types as qtypes
from quantkit.errors import QuantkitError
from quantkit.job.plan import plan_model
from quantkit.planning.assign import predict
from quantkit.planning.damage import Measured, Prior, interact, unmeasured
from quantkit.planning.prior import ERROR, GAIN

SPECS = {spec.name: spec for spec in r1_shapes.specs(n_layer=6)}
DOWN = [f"blk.{layer}.ffn_down_exps.weight" for layer in (3, 4, 5)]


def measured(entries):
    return Measured(entries, "test.json")


def test_certain_entries_are_kept_and_missing_types_follow_the_model():
    entries = {(name, "Q2_K"): (0.03 * (i + 1), 0.0) for i, name in enumerate(DOWN)}
    damage = measured(entries)
    for i, name in enumerate(DOWN):
        assert damage.of(SPECS[name], "Q2_K") == pytest.approx(0.03 * (i + 1))
        ratio = damage.of(SPECS[name], "IQ1_S") / damage.of(SPECS[name], "Q2_K")
        assert ratio == pytest.approx(ERROR["IQ1_S"] / ERROR["Q2_K"], rel=0.01)


def test_noise_is_smoothed_away():
    """A gain per tensor and an error per type under 60 % noise: the estimate is much closer than the measurement."""
    draw = random.Random(1)
    names = [n for n, s in SPECS.items() if s.role.startswith("attn_") and not s.fixed and s.role != "attn_k_b"]
    truth, entries = {}, {}
    for i, name in enumerate(names):
        for qtype in ("Q3_K", "Q4_K", "Q5_K", "Q6_K"):
            truth[name, qtype] = 0.002 * (1 + i % 7) * ERROR[qtype]
            noisy = truth[name, qtype] * math.exp(draw.gauss(0, 0.6))
            entries[name, qtype] = (noisy, 0.6 * noisy)
    damage = measured(entries)

    def rms(estimate):
        return math.sqrt(sum(math.log(estimate(key) / truth[key]) ** 2 for key in truth) / len(truth))

    assert rms(lambda key: damage.of(SPECS[key[0]], key[1])) < 0.6 * rms(lambda key: entries[key][0])


def test_negative_and_zero_measurements_stay_positive():
    damage = measured({(DOWN[0], "Q8_0"): (-1e-6, 1e-5), (DOWN[0], "Q2_K"): (0.02, 0.001)})
    assert 0 < damage.of(SPECS[DOWN[0]], "Q8_0") < 1e-3


@pytest.mark.parametrize(
    "entry", [(float("nan"), 0.1), (0.1, float("inf")), (10**400, 0.1), (0.1, -1.0), ("0.1", 0.1), (None, 0.1)]
)
def test_nonsense_is_refused(entry):
    with pytest.raises(QuantkitError, match="is not a divergence"):
        measured({(DOWN[0], "Q2_K"): entry})


def test_another_models_measurement_is_refused():
    with pytest.raises(QuantkitError, match=r"no entry for output\.weight"):
        measured({(DOWN[0], "Q2_K"): (0.1, 0.01)}).of(SPECS["output.weight"], "Q4_K")
    with pytest.raises(QuantkitError, match="unknown type"):
        measured({(DOWN[0], "Q9"): (0.1, 0.01)})


def test_prior_knows_every_role_and_type():
    prior = Prior(SPECS.values())
    assert set(ERROR) == {name for name in qtypes.QTYPES if name not in ("F16", "BF16", "F32")}
    assert {spec.role for spec in SPECS.values() if not spec.fixed} <= set(GAIN)
    for spec in SPECS.values():
        if not spec.fixed:
            assert prior.of(spec, "Q8_0") < prior.of(spec, "Q4_K") < prior.of(spec, "Q2_K") < prior.of(spec, "IQ1_S")
        assert prior.of(spec, "F32") == 0


def test_prior_does_not_depend_on_depth():
    shallow, deep = (Prior(r1_shapes.specs(n_layer=n)) for n in (5, 61))
    one = SPECS[DOWN[0]]
    assert 2 * shallow.of(one, "Q2_K") == pytest.approx(58 * deep.of(one, "Q2_K"))


def test_prior_is_near_r1s_published_losses():
    """Log ratio of perplexities, Unsloth's files to Q8_0 (3.3490), is about the KLD: within a third."""
    published = {"1.58bit": 5.5749, "1.73bit": 4.7238, "2.22bit": 4.0964}
    for recipe, perplexity in published.items():
        plan = plan_model("deepseek-r1", f"unsloth-{recipe}", "llama.cpp/combined")
        specs = r1_shapes.specs("combined")
        for damage in (Prior(specs), unmeasured(specs)):
            assert 0.67 < predict(plan, specs, damage) / math.log(perplexity / 3.3490) < 1.5


def test_interaction_keeps_the_order():
    values = [interact(x / 100) for x in range(300)]
    assert values == sorted(values) and interact(0.001) == pytest.approx(0.001, rel=0.01)
