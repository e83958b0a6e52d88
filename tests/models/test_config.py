"""config.json and GGUF metadata say the same of a model, and nonsense in either is refused by name."""

import json

import pytest

from quantkit import bundle
from quantkit.errors import QuantkitError
from quantkit.models import family


def r1() -> dict:
    return json.loads((bundle.models_dir() / "deepseek-r1" / "config.json").read_text())


def plain(metadata: dict) -> dict:
    return {key: getattr(value, "value", value) for key, value in metadata.items()}


@pytest.mark.parametrize("mla", ["split", "combined"])
def test_round_trip_through_metadata(mla):
    config = family.from_hf(r1())
    back = family.from_gguf(plain(family.metadata(config, mla, "R1")))
    assert back.softmax_scale == pytest.approx(config.softmax_scale, rel=1e-6)
    for key, value in vars(config).items():
        if key not in ("yarn", "bos", "eos"):
            assert getattr(back, key) == value, key


def test_r1_numbers():
    config = family.from_hf(r1())
    assert (config.n_moe, config.qk_head) == (58, 192)
    # DeepSeek's modelling code: 192^-0.5 * (0.1 ln 40 + 1)^2
    assert config.softmax_scale == pytest.approx(0.1352337788608801)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("architectures", ["LlamaForCausalLM"], "LlamaForCausalLM"),
        ("architectures", [[]], "architecture"),
        ("scoring_func", "tanh", "tanh"),
        ("topk_method", "random", "random"),
        ("num_experts_per_tok", 200, "top-200"),
        ("n_group", 7, "7 equal groups"),
        ("hidden_size", -1, "positive"),
        ("hidden_size", "wide", "wide"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "linear"),
        ("moe_layer_freq", 2, "moe_layer_freq"),
    ],
)
def test_unsupported_values_are_named(key, value, says):
    with pytest.raises(QuantkitError, match=says):
        family.from_hf(r1() | {key: value})


def test_missing_key_is_named():
    config = r1()
    del config["kv_lora_rank"]
    with pytest.raises(QuantkitError, match="kv_lora_rank"):
        family.from_hf(config)


def test_v2_lite_shape():
    """deepseek_v2: no q_lora, softmax gating, no bias; plain top-k ignores n_group."""
    config = r1() | {
        "architectures": ["DeepseekV2ForCausalLM"],
        "q_lora_rank": None,
        "topk_method": "greedy",
        "scoring_func": "softmax",
        "n_group": 1,
        "topk_group": 1,
    }
    parsed = family.from_hf(config)
    roles = {spec.role for spec in family.specs(parsed)}
    assert "attn_q" in roles and "attn_q_a" not in roles and "exp_probs_b" not in roles


def test_config_json_of_a_gguf_is_the_original_one():
    """Keys of training and of the FP8 encoding are not a GGUF's to know."""
    original = r1()
    config = family.from_hf(original)
    back = family.from_gguf(plain(family.metadata(config, "split", "R1")))
    found = family.to_hf(back)
    assert family.from_hf(found) == config
    unknown = {"auto_map", "num_nextn_predict_layers", "quantization_config", "transformers_version"}
    assert {k: v for k, v in original.items() if k not in unknown}.items() <= found.items()
