"""config.json is read as transformers reads it; a misread one is seen by code that is not ours."""

import json
from dataclasses import replace

import pytest

from quantkit import bundle
from quantkit.evaluation import configuration
from quantkit.evaluation.oracles import child, hf
from quantkit.runtime.sources.checkpoint import CheckpointSource


def config_of(name: str) -> dict:
    return json.loads((bundle.models_dir() / name / "config.json").read_text())


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(hf, "run_module", child.run_module)
    configuration._check.cache_clear()
    yield
    configuration._check.cache_clear()


def test_r1_s_configuration():
    pytest.importorskip("transformers")
    found = configuration.check(config_of("deepseek-r1"))
    assert found.status == "pass" and found.detail.startswith("transformers ")


def test_a_misread_configuration_is_seen(monkeypatch):
    """As `rope_parameters` once was: theta from another key."""
    pytest.importorskip("transformers")
    logits = configuration._logits

    def misread(source: CheckpointSource, tokens):
        source.config = replace(source.config, rope_base=5e4)
        return logits(source, tokens)

    monkeypatch.setattr(configuration, "_logits", misread)
    found = configuration.check(config_of("tiny-r1"))
    assert found.status == "fail" and "computes another model of this config.json" in found.detail


def test_without_transformers_it_is_said(monkeypatch):
    monkeypatch.setattr(hf, "available", lambda: False)
    found = configuration.check(config_of("tiny-r1"))
    assert found.status == "warn" and found.detail.startswith("unchecked")


def test_too_little_memory_is_no_fault_of_the_configuration(monkeypatch):
    def lacking(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(hf, "available", lambda: True)
    monkeypatch.setattr(hf, "random_model", lacking)
    found = configuration.check(config_of("tiny-r1"))
    assert (found.status, found.detail) == ("warn", "unchecked: only quantkit has read it: too little memory")


def test_what_decides_the_arithmetic_stays():
    raw = config_of("deepseek-r1")
    small = configuration.small(raw)
    changed = {key for key in raw if small.get(key) != raw[key]}
    assert changed == set(configuration.SMALL) | {
        "quantization_config",
        "auto_map",
        "torch_dtype",
        "num_hidden_layers",
        "first_k_dense_replace",
        "eos_token_id",
    }
