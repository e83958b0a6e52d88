"""Presets by llama-quantize's names, against what the program itself said (`scripts/research/mixtures.py`)."""

import hashlib
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quantkit.__main__ import main
from quantkit.job.plan import plan_model
from quantkit.models import family
from quantkit.models.open import open_model
from quantkit.planning import mixtures
from quantkit.planning.assign import make_plan

SAID = json.loads((Path(__file__).parent / "snapshots" / "llama-quantize.json").read_text())


@pytest.mark.parametrize("model", SAID)
def test_types_are_those_of_llama_quantize(model):
    """b11434's --dry-run on the model's shapes, tensor by tensor: R1's 61 layers, V2-Lite's short rows, V3.2's MTP
    layer, which counts where types go by eighths of the layers."""
    name, mla = model.split()
    config = family.from_hf(open_model(name).config)
    specs = family.specs(config, mla)
    assert SAID[model].keys() == mixtures.BASE.keys()
    for preset, digest in SAID[model].items():
        plan = make_plan(specs, mixtures.recipe(preset, config, specs, mla))
        lines = sorted(f"{t.name} {t.qtype}\n" for t in plan.tensors if t.rule)
        assert hashlib.sha256("".join(lines).encode()).hexdigest()[:16] == digest, preset


def test_a_preset_is_a_recipe_that_can_be_written_out_and_changed(tmp_path):
    plan = plan_model("deepseek-r1", "q4_k_m")
    assert (plan.recipe, plan.target, plan.mla) == ("Q4_K_M", "llama.cpp", "split")
    written = CliRunner().invoke(main, ["recipes", "Q4_K", "deepseek-r1"])
    assert written.exit_code == 0 and 'layers = "3-6,9,12,' in written.stdout and 'fallback = "Q5_0"' in written.stdout
    (tmp_path / "mine.toml").write_text(written.stdout)
    assert plan_model("deepseek-r1", tmp_path / "mine.toml").digest() == plan.digest()
    assert plan_model("deepseek-r1", "Q2_K", "llama.cpp/combined").mla == "combined"
    assert "attn_k_b.weight" in next(name for name, t in plan.by_name.items() if t.qtype == "Q5_0")


def test_the_list_fits_a_terminal():
    listed = CliRunner().invoke(main, ["recipes"]).stdout
    assert all(len(line) <= 80 for line in listed.splitlines())
    assert "IQ2_XXS" in listed and "Q4_K; down Q6_K in some layers, output Q6_K." in listed and "docs/plan.md" in listed
