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
        ("rope_theta", 10**400, "too large"),
        (
            "rope_scaling",
            r1()["rope_scaling"] | {"original_max_position_embeddings": 10**400},
            "are not finite numbers",
        ),
        ("hidden_size", -1, "positive"),
        ("hidden_size", "wide", "wide"),
        ("rope_scaling", {"type": "linear", "factor": 2}, "linear"),
        ("moe_layer_freq", 2, "moe_layer_freq 2"),
        ("moe_layer_freq", [0, 1, 1], "moe_layer_freq"),
        ("rope_scaling", {"rope_type": "yarn", "type": "default", "factor": 2}, "type and rope_type differ"),
        ("rope_scaling", {"full_attention": {"rope_type": "default"}}, "type None"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4}, "rope_scaling factor 40, but rope_parameters factor 4"),
        ("rope_parameters", {"rope_theta": 5e4}, "rope_theta is 10000 and 50000"),
        ("rope_theta", None, "rope_theta null is not a number"),
        ("rope_interleave", False, "rope_interleave false"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor 0.5"),
        ("hidden_act", "gelu", "hidden_act 'gelu'"),
        ("attention_bias", True, "attention_bias true"),
        ("mlp_bias", True, "mlp_bias true"),
        ("num_key_value_heads", 8, "num_key_value_heads 8"),
        ("n_group", None, "n_group null"),
        ("n_routed_experts", True, "n_routed_experts true"),
        ("norm_topk_prob", 0.5, "norm_topk_prob 0.5"),
        ("topk_method", "greedy", "topk_method 'greedy'"),
        ("scoring_func", "softmax", "scoring_func 'softmax'"),
        ("num_local_experts", 128, "num_local_experts 128 is another name of n_routed_experts, 256"),
        ("sliding_window", 4096, "sliding_window 4096"),
        ("index_topk", 2048, "index_topk 2048"),
        ("final_logit_softcapping", 30.0, "final_logit_softcapping 30.0"),
        ("use_qk_norm", True, "use_qk_norm true"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types"),
        ("eos_token_id", "1", "eos_token_id '1'"),
        ("is_encoder_decoder", True, "is_encoder_decoder true"),
        ("hidden_size", 7168.7, r"hidden_size 7168\.7 is not a whole number"),
        ("num_hidden_layers", True, "num_hidden_layers true is not a whole number"),
        ("moe_layer_freq", True, "moe_layer_freq true"),
        ("attention_bias", 0, "attention_bias 0"),
        ("norm_topk_prob", 1, "norm_topk_prob 1 is not true or false"),
        ("tie_word_embeddings", 0, "tie_word_embeddings 0 is not true or false"),
        ("num_key_value_heads", True, "num_key_value_heads true"),
        ("rms_norm_eps", False, "rms_norm_eps false is not a number"),
        ("rope_scaling", 0, "rope_scaling 0 is not a table"),
        ("rope_scaling", False, "rope_scaling false is not a table"),
        ("bos_token_id", True, "bos_token_id true"),
        ("bos_token_id", 0.5, r"bos_token_id 0\.5"),
        ("per_layer_config", {"3": {"hidden_size": 1}}, "per_layer_config"),
    ],
)
def test_unsupported_values_are_named(key, value, says):
    with pytest.raises(QuantkitError, match=says):
        family.from_hf(r1() | {key: value})


YARN_SAYS = [
    ("attention_factor", 1.2),
    ("truncate", False),
    ("mscale", 0.5),
    ("partial_rotary_factor", 0.5),
    ("low", 1),
    ("beta_fast", 0),
    ("beta_slow", 0),
    ("beta_slow", 64),
    ("beta_fast", -32),
    ("factor", 0),
    ("factor", True),
]


@pytest.mark.parametrize(("key", "value"), YARN_SAYS)
def test_what_yarn_cannot_be_told_is_named(key, value):
    config = r1()
    config["rope_scaling"] |= {key: value}
    with pytest.raises(QuantkitError, match=key):
        family.from_hf(config)


def test_rope_parameters_are_rope_scaling_and_theta():
    """transformers 5 writes what 4 kept in two places as one table."""
    old = r1()
    new = {key: value for key, value in old.items() if key not in ("rope_scaling", "rope_theta")}
    yarn = {key: value for key, value in old["rope_scaling"].items() if key != "type"}
    new["rope_parameters"] = yarn | {"rope_type": "yarn", "type": "yarn", "rope_theta": 10000.0}
    assert family.from_hf(new) == family.from_hf(old)
    assert family.from_hf(new | {"rope_scaling": old["rope_scaling"]}) == family.from_hf(old)
    plain = family.from_hf(new | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}})
    assert plain.yarn is None and plain.rope_base == 5e4
    for nothing in (None, {}, {"type": "default"}, {"rope_type": "default"}):
        assert family.from_hf(old | {"rope_scaling": nothing}).yarn is None


def test_context_that_yarn_stretches():
    """Absent it is the whole context; beside the table it counts too; factor null is what the two contexts say."""
    scaling = r1()["rope_scaling"]
    bare = {key: value for key, value in scaling.items() if key != "original_max_position_embeddings"}
    yarn = family.from_hf(r1() | {"rope_scaling": bare}).yarn
    assert yarn and yarn.original_context == 163840
    yarn = family.from_hf(r1() | {"rope_scaling": bare, "original_max_position_embeddings": 8192}).yarn
    assert yarn and yarn.original_context == 8192
    yarn = family.from_hf(r1() | {"rope_scaling": scaling | {"factor": None, "beta_fast": None}}).yarn
    assert yarn and yarn.factor == 40 and yarn.beta_fast == 32


def test_absent_keys_are_the_class_s_defaults():
    bare = {k: v for k, v in r1().items() if k not in ("n_group", "topk_group", "routed_scaling_factor", "topk_method")}
    assert family.from_hf(bare) == family.from_hf(r1())
    v2 = bare | {"architectures": ["DeepseekV2ForCausalLM"], "norm_topk_prob": False, "scoring_func": "softmax"}
    found = family.from_hf(v2 | {"topk_method": "greedy"})
    assert (found.n_group, found.weights_scale, found.group_score) == (1, 1.0, "max")
    with pytest.raises(QuantkitError, match="norm_topk_prob true"):  # two codes of it, two meanings
        family.from_hf(v2 | {"topk_method": "greedy", "norm_topk_prob": True})


@pytest.mark.parametrize("name", ["DeepseekV2Config", "DeepseekV3Config"])
def test_every_key_of_transformers_classes_is_known(name):
    """Nothing that its configuration class writes is passed over, refused or unknown."""
    written = getattr(pytest.importorskip("transformers"), name)(num_experts_per_tok=6).to_dict()
    written |= {"architectures": [name.replace("Config", "ForCausalLM")]}
    family.from_hf(written | ({"n_group": 1, "topk_group": 1}))
    assert family.unknown_keys(written) == []


def test_unknown_keys_are_told():
    assert family.unknown_keys(r1()) == []
    assert family.unknown_keys(r1() | {"brand": "new", "use_new": False, "vision": {}}) == ["brand 'new'"]


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
        "norm_topk_prob": False,
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
