"""config.json as Hugging Face writes it: each key is read, changes nothing, must have one value, or is named.

A key that is passed over is the worst reading of all: nothing notices that the model is another one. What transformers
4 and 5 write is listed here by hand; a key that neither they nor the family know is refused where its name speaks of
the network, and said in a line where it does not.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from quantkit.errors import QuantkitError

WHERE = "config.json"
ROPE_THETA = 10000.0  # transformers' default for every class
SHOWN = 60  # characters of a value

# What PretrainedConfig writes and no forward pass reads: names, training, the loss, generation (generation_config.json
# of old), outputs besides logits.
NEUTRAL = frozenset(
    """architectures model_type auto_map transformers_version _name_or_path name_or_path _commit_hash tokenizer_class
    torch_dtype dtype use_bfloat16 torchscript tf_legacy_loss return_dict output_hidden_states output_attentions
    output_router_logits use_cache attn_implementation _attn_implementation _attn_implementation_autoset
    experts_implementation _experts_implementation gradient_checkpointing chunk_size_feed_forward initializer_range
    attention_dropout hidden_dropout classifier_dropout pretraining_tp finetuning_task id2label label2id num_labels
    problem_type task_specific_params prefix is_decoder tie_encoder_decoder tie_last_hidden_states
    cross_attention_hidden_size bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    quantization_config unsloth_version unsloth_fixed""".split()
)
# What PretrainedConfig may say of the network, and the only values that ours has.
FIXED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False, None),
    "add_cross_attention": (False, None),
    "pruned_heads": ({}, None),
    "per_layer_config": (None, {}),
    "partial_rotary_factor": (1, None),
    "compression_config": (None,),
    "use_sliding_window": (False, None),
}
NETWORK = re.compile(
    r"rope|rotary|norm|bias|scal|softcap|window|mult|clamp|limit|gat(e|ing)|rout|expert|moe|head|rank|dim|hidden|layer"
    r"|att(n|ention)|mlp|ffn|act|resid|embed|position|index|compress|sink|temperature|(^|_)(hc|n|num|use)_|size|freq"
)
YARN = frozenset(
    "type rope_type rope_theta factor original_max_position_embeddings beta_fast beta_slow mscale mscale_all_dim "
    "attention_factor truncate partial_rotary_factor".split()
)


@dataclass(frozen=True)
class ConfigClass:
    """What one of transformers' configuration classes knows besides PretrainedConfig.

    defaults: of keys that may be absent. read: other keys that the family takes numbers from. neutral: change nothing.
    fixed: key -> the values that the family's mathematics has. aliases: other names of keys.
    """

    defaults: Mapping[str, Any]
    read: frozenset[str]
    neutral: frozenset[str] = frozenset()
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)

    def settled(self, raw: Mapping[str, Any]) -> "Keys":
        """config.json with the class's defaults. QuantkitError, naming the key and its value, for what is refused."""
        values = dict(raw)
        for alias, key in self.aliases.items():
            if alias in values:
                given = values.pop(alias)
                if values.setdefault(key, given) != given:
                    raise QuantkitError(f"{WHERE}: {alias} {_shown(given)} is another name of {key}, {values[key]}")
        for key, allowed in {**FIXED, **self.fixed}.items():
            if key in values and key not in self.read and not any(_same(values[key], one) for one in allowed):
                raise QuantkitError(f"{WHERE}: {key} {_shown(values[key])} is not supported, only {_shown(allowed[0])}")
        for key, value in self._unknown(values):
            if NETWORK.search(key) and not _is_nothing(value) and not _is_plain(key, value):
                raise QuantkitError(
                    f"{WHERE}: {key} {_shown(value)} is not supported: no {raw.get('model_type', 'such')} model is "
                    "known to have it. If it changes nothing, delete it there"
                )
        return Keys({**self.defaults, **values})

    def unknown(self, raw: Mapping[str, Any]) -> list[str]:
        """`key value` of everything that is passed over without anybody knowing what it means."""
        return [
            f"{key} {_shown(value)}"
            for key, value in self._unknown(raw)
            if key not in self.aliases and not NETWORK.search(key) and not _is_nothing(value)
        ]

    def _unknown(self, raw: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        known = self.read | self.neutral | NEUTRAL | self.defaults.keys() | self.fixed.keys() | FIXED.keys()
        return ((key, value) for key, value in raw.items() if key not in known)


class Keys:
    """Values by key, each of the kind that is asked for; KeyError where there is none, QuantkitError for another."""

    def __init__(self, values: Mapping[str, Any], where: str = WHERE) -> None:
        self.values, self.where = values, where

    def whole(self, key: str) -> int:
        """A whole number."""
        value = self.values[key]
        if type(value) is int:
            return value
        if isinstance(value, float) and value.is_integer():
            return int(value)
        raise self._wrong(key, "a whole number")

    def optional(self, key: str) -> int | None:
        """A whole number or null."""
        return None if self.values[key] is None else self.whole(key)

    def real(self, key: str) -> float:
        """A number."""
        if type(self.values[key]) not in (int, float):
            raise self._wrong(key, "a number")
        return float(self.values[key])

    def flag(self, key: str) -> bool:
        """true or false; null is false, as it is to Python."""
        if not (self.values[key] is None or isinstance(self.values[key], bool)):
            raise self._wrong(key, "true or false")
        return bool(self.values[key])

    def word(self, key: str) -> str:
        """Text."""
        if not isinstance(self.values[key], str):
            raise self._wrong(key, "a word")
        return self.values[key]

    def _wrong(self, key: str, wanted: str) -> QuantkitError:
        return QuantkitError(f"{self.where}: {key} {_shown(self.values[key])} is not {wanted}")


def rope(raw: Mapping[str, Any], n_context: int) -> tuple[float, dict[str, Any] | None]:
    """θ and the numbers of YaRN (fields of `config.Yarn`), from `rope_theta` and `rope_scaling` (transformers 4), or
    `rope_parameters` (5), or both if they agree. n_context: what an absent `original_max_position_embeddings` means."""
    old, new = (_table(raw, key) for key in ("rope_scaling", "rope_parameters"))
    for key in old.keys() & new.keys():
        if old[key] != new[key]:
            raise QuantkitError(f"{WHERE}: rope_scaling {key} {old[key]!r}, but rope_parameters {key} {new[key]!r}")
    name = "rope_parameters" if new else "rope_scaling"
    given = Keys({**old, **new}, f"{WHERE}: {name}")
    thetas = [table["rope_theta"] for table in (raw, old, new) if "rope_theta" in table]
    if any(theta != thetas[0] for theta in thetas):
        raise QuantkitError(f"{WHERE}: rope_theta is {' and '.join(map(str, thetas))}; one of them must go")
    theta = Keys({"rope_theta": thetas[0] if thetas else ROPE_THETA}).real("rope_theta")
    kinds = {given.values[key] for key in ("type", "rope_type") if isinstance(given.values.get(key), str)}
    if len(kinds) > 1:
        raise QuantkitError(f"{given.where}: type and rope_type differ: {' '.join(sorted(kinds))}")
    kind = kinds.pop() if kinds else "default" if given.values.keys() <= {"rope_theta"} else None
    if not any(_same(given.values.get("partial_rotary_factor"), one) for one in (1, None)):
        raise given._wrong("partial_rotary_factor", "1, and nothing else is supported")
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise QuantkitError(f"{given.where}: type {kind!r} is not supported, only yarn and default")
    if strange := sorted(given.values.keys() - YARN):
        raise QuantkitError(f"{given.where}: {strange[0]} {_shown(given.values[strange[0]])} is not supported in yarn")
    return theta, _yarn(given, raw, n_context)


def _yarn(given: Keys, raw: Mapping[str, Any], n_context: int) -> dict[str, Any]:
    """As transformers and DeepSeek's own code read it. Refused where llama.cpp cannot compute it."""
    original = raw.get("original_max_position_embeddings")
    context = {"original_max_position_embeddings": n_context if original is None else original}
    stated = {key: value for key, value in given.values.items() if value is not None}  # null is absent here
    if original is not None and stated.get("original_max_position_embeddings", original) != original:
        raise QuantkitError(f"{WHERE}: original_max_position_embeddings {original} is another in {given.where}")
    keys = Keys({"beta_fast": 32, "beta_slow": 1, "mscale": 1, "mscale_all_dim": 0} | context | stated, given.where)
    mscale, mscale_all = keys.real("mscale"), keys.real("mscale_all_dim")
    if "factor" not in stated and "factor" in given.values:  # null: what the contexts say
        keys.values = {**keys.values, "factor": n_context / keys.whole("original_max_position_embeddings")}
    if mscale != mscale_all or (mscale == 0 and keys.real("factor") > 1):
        # llama.cpp assumes the two cancel in cos and sin; a file of any other model would compute wrongly there.
        raise QuantkitError(f"{given.where}: mscale {mscale} and mscale_all_dim {mscale_all} are not the same number")
    for key in ("factor", "beta_fast", "beta_slow"):
        if keys.real(key) <= 0:
            raise keys._wrong(key, "above 0")
    for key, only in (("attention_factor", 1), ("truncate", True)):
        if not _same(stated.get(key, only), only):
            raise QuantkitError(f"{given.where}: {key} {_shown(stated[key])} is not supported, only {_shown(only)}")
    return {
        "factor": keys.real("factor"),
        "original_context": keys.whole("original_max_position_embeddings"),
        "beta_fast": keys.real("beta_fast"),
        "beta_slow": keys.real("beta_slow"),
        "mscale_all_dim": mscale_all,
    }


def _table(raw: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise QuantkitError(f"{WHERE}: {key} {_shown(value)} is not a table")
    return value or {}


def _same(a: Any, b: Any) -> bool:
    """As JSON means it: true is not 1."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _is_nothing(value: Any) -> bool:
    return value is None or value is False or value in ("", [], {})


def _is_plain(key: str, value: Any) -> bool:
    """Later transformers may say of every layer that it attends to all tokens, as all of ours do."""
    return key == "layer_types" and isinstance(value, list) and all(kind == "full_attention" for kind in value)


def _shown(value: Any) -> str:
    text = {True: "true", False: "false"}[value] if isinstance(value, bool) else repr(value)
    return "null" if value is None else text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
