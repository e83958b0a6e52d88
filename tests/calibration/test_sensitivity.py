"""Forked streams against brute force: quantize one tensor, write the whole file, run everything."""

import pytest
import torch

from quantkit.calibration import sensitivity
from quantkit.calibration.collect import collect
from quantkit.calibration.corpus import chunk, default
from quantkit.codecs.types import row_bytes
from quantkit.encoding.jobs import GgmlEncoder, Output, quantize
from quantkit.errors import QuantkitError
from quantkit.evaluation.divergence import HeadLogits, diverge, scored, scored_targets
from quantkit.formats.sensitivity import Sensitivity
from quantkit.models import family
from quantkit.planning.assign import make_plan
from quantkit.planning.recipe import Recipe
from quantkit.runtime.sources.checkpoint import CheckpointSource
from quantkit.runtime.sources.gguf import open_source
from quantkit.runtime.stream import final_hidden

RULES = """
name = "one"
description = "one tensor"
target = "llama.cpp"
{rule}
[[rules]]
match = "*"
qtype = "F32"
why = "everything else stays as it is"
"""
ONE = """[[rules]]
match = "{name}"
qtype = "{qtype}"
why = "the tensor under test"
"""
TYPES = sensitivity.Candidates(("IQ2_XXS", "Q2_K", "Q3_K"), ("Q4_K", "Q8_0"))  # of those that are tried by default
CASES = [
    ("blk.1.ffn_gate_exps.weight", "Q3_K"),
    ("blk.2.ffn_up_exps.weight", "IQ2_XXS"),
    ("blk.3.ffn_down_exps.weight", "Q2_K"),
    ("blk.0.ffn_down.weight", "Q4_K"),
    ("blk.2.ffn_up_shexp.weight", "Q4_K"),
    ("blk.1.attn_kv_a_mqa.weight", "Q4_K"),
    ("blk.2.attn_k_b.weight", "Q8_0"),
    ("blk.3.attn_v_b.weight", "Q4_K"),
    ("blk.1.attn_q_b.weight", "Q4_K"),
    ("blk.2.attn_output.weight", "Q4_K"),
    ("token_embd.weight", "Q4_K"),
    ("output.weight", "Q4_K"),
]


@pytest.fixture(scope="module")
def source(tiny):
    return CheckpointSource(tiny)


@pytest.fixture(scope="module")
def chunks(source):
    return chunk(default("evaluation"), source.tokenizer(), 0, 128, 512)


@pytest.fixture(scope="module")
def imatrix(source, chunks):
    with torch.inference_mode():
        return collect(source, chunks.tokens)


@pytest.fixture(scope="module")
def full(source, imatrix, chunks):
    return sensitivity.measure(source, imatrix, chunks.tokens, TYPES, tier="full")


def brute_force(source, imatrix, chunks, name, qtype, folder) -> float:
    """Independent of the forks: a GGUF file with one quantized tensor, read back and compared at the output."""
    rule = ONE.format(name=name, qtype=qtype)
    specs = family.specs(source.config)
    plan = make_plan(specs, Recipe.parse(RULES.format(rule=rule), "test"), model="tiny-r1")
    path = folder / "one.gguf"
    only = {k: v for k, v in imatrix.items() if k == name}
    quantize(source.checkpoint, plan, only, Output(path), GgmlEncoder())
    file = open_source(path)
    with torch.inference_mode():
        logits = [HeadLogits(model, scored(final_hidden(model, chunks.tokens))) for model in (source, file)]
        return diverge(*logits, scored_targets(chunks.targets), source.config.n_vocab).summary()["kld_mean"]


@pytest.mark.parametrize(("name", "qtype"), CASES)
def test_full_tier_equals_brute_force(source, imatrix, chunks, full, name, qtype, tmp_path):
    entry = next(e for e in full.entries if (e.tensor, e.qtype) == (name, qtype))
    expected = brute_force(source, imatrix, chunks, name, qtype, tmp_path)
    assert entry.kld == pytest.approx(expected, rel=0.02, abs=1e-7)


def test_every_candidate_has_an_entry(source, full):
    names = {(e.tensor, e.qtype) for e in full.entries}
    for spec in family.specs(source.config):
        for qtype in TYPES.of(spec):
            assert (spec.name, qtype) in names
            entry = next(e for e in full.entries if (e.tensor, e.qtype) == (spec.name, qtype))
            assert entry.n_bytes == spec.n_rows * row_bytes(qtype, spec.n_in)
    assert len(names) == len(full.entries)


def test_cheap_tier_ranks_like_the_full_one(source, imatrix, chunks, full):
    from scipy.stats import spearmanr

    cheap = sensitivity.measure(source, imatrix, chunks.tokens, TYPES, tier="cheap")
    theirs = {(e.tensor, e.qtype): e.kld for e in full.entries}
    pairs = [(e.kld, theirs[e.tensor, e.qtype]) for e in cheap.entries]
    assert spearmanr(*zip(*pairs, strict=True)).statistic > 0.9


def test_more_bits_cost_less(full):
    def total(qtype: str) -> float:
        return sum(e.kld for e in full.entries if e.qtype == qtype and e.role.endswith("_exps"))

    assert total("IQ2_XXS") > total("Q2_K") > total("Q3_K") > 0


def test_round_trip_and_heat_map(full, tmp_path):
    (tmp_path / "s.json").write_text(full.to_json())
    assert Sensitivity.load(tmp_path / "s.json") == full
    sensitivity.heat_map(full, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "bad.json").write_text('{"entries": 3}')
    with pytest.raises(QuantkitError, match=r"bad\.json: not a sensitivity file"):
        Sensitivity.load(tmp_path / "bad.json")


def test_budget_chooses_the_tier(source, chunks):
    def tier(budget: int):
        types = sensitivity.Candidates(("IQ1_S",), ("Q4_K",))
        return sensitivity.choose_tier(source, chunks.tokens, types, budget)

    assert tier(1 << 21) == ("full", len(chunks.tokens))
    assert tier(2000)[0] == "cheap"
