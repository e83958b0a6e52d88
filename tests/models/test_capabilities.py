"""What is said of families: each has an entry, and what is not supported gets one line with what is nearest."""

import pytest

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.job.families import describe
from quantkit.models import family
from quantkit.models.capabilities import CAPABILITIES, UNSUPPORTED


def test_every_family_says_what_it_can():
    assert set(family.BY_ARCHITECTURE) <= set(CAPABILITIES)
    assert {nearest for _, _, nearest in UNSUPPORTED.values()} <= set(CAPABILITIES)


@pytest.mark.parametrize("name", sorted(set(UNSUPPORTED) - set(family.BY_HF_ARCHITECTURE)))
def test_what_is_not_supported_is_one_line_with_the_nearest(name):
    with pytest.raises(QuantkitError, match=rf"{name} \(.*\) is not supported: .*; nearest is .+ \(.+\)$") as caught:
        family.from_hf({"architectures": [name]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM"], "DeepseekV4ForCausalLM", [7]])
def test_what_nobody_has_heard_of_hears_what_there_is(names):
    with pytest.raises(QuantkitError, match=r"is not one of .*DeepseekV3ForCausalLM"):
        family.from_hf({"architectures": names})


def test_bundled_models_of_known_families_are_whole():
    """Their lists have every tensor that the family asks for, in its shape."""
    from quantkit.models.open import open_model

    for name in bundle.model_names():
        source = open_model(name)
        source.validate(family.source_shapes(family.from_hf(source.config)))


def test_the_page_fits_a_terminal():
    page = describe()
    assert max(map(len, page.splitlines())) <= 80 and all(name in page for name in bundle.model_names())
