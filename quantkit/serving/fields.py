"""Which fields of a request's body are known, besides those that work: harmless ones, and values that mean nothing.

A field that a server ignores changes what its client believes it gets, so there is an allow-list: each key works (the
models of `serving/requests.py`), cannot change the answer (HARMLESS), stands at the value that means "off" (NEUTRAL),
or is refused by name. null means "not given" for every key. Names are those of OpenAI's API, llama-server, vLLM,
ollama, SGLang and DeepSeek's API.
"""

import json
from collections.abc import Mapping
from typing import Any

from quantkit.serving.refusals import Refused

HARMLESS = frozenset(
    {
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "request_id"),
        *("prompt_cache_retention", "prediction", "id_slot", "slot_id", "timings_per_token"),
        *("keep_alive", "ttl", "n_keep", "n_discard", "n_cache_reuse", "min_keep"),
        *("spaces_between_special_tokens",),
        # what only says how, of things that are off or refused
        *("dry_base", "dry_allowed_length", "dry_penalty_last_n", "dry_sequence_breakers", "xtc_threshold"),
        *("dynatemp_exponent", "mirostat_tau", "mirostat_eta", "smoothing_curve"),
        *("guided_decoding_backend", "guided_whitespace_pattern", "grammar_lazy", "grammar_triggers"),
        *("preserved_tokens", "generation_prompt"),
    }
)

SAMPLERS = "penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("mirostat", "mirostat_mode", "top_a"), (0,)),
    **dict.fromkeys(("tfs_z", "length_penalty"), (1,)),
    **dict.fromkeys(("xtc_probability", "dry_multiplier", "dynatemp_range", "smoothing_factor"), (0,)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "n_probs", "n_indent", "priority"), (0,)),
    **dict.fromkeys(("t_max_predict_ms", "t_max_prompt_ms"), (0, -1)),
    "top_n_sigma": (0, -1),
    "thinking_budget_tokens": (-1,),
    "samplers": (list(SAMPLERS), ";".join(SAMPLERS), "edskypmxt", "edkypmxt", "edskypmx", "dkypmxt", "dskypmxt"),
    **dict.fromkeys(
        (
            "use_beam_search",
            "early_stopping",
            "include_stop_str_in_output",
            "post_sampling_probs",
        ),
        (False,),
    ),
    **dict.fromkeys(("return_tokens_as_token_ids", "raw", "thinking_forced_open", "no_stop_trim"), (False,)),
    **dict.fromkeys(("return_progress", "return_tokens", "return_token_ids", "prompt_logprobs"), (False,)),
    **dict.fromkeys(("detokenize", "include_reasoning", "stream_reasoning"), (True,)),
    **dict.fromkeys(("grammar", "format", "guided_json", "guided_grammar"), ("", {})),
    **dict.fromkeys(("guided_regex", "regex", "ebnf", "structural_tag", "template", "system", "suffix"), ("",)),
    **dict.fromkeys(("guided_choice", "allowed_token_ids", "images", "image_data", "lora", "response_fields"), ([],)),
    **dict.fromkeys(
        ("structured_outputs", "options", "mm_processor_kwargs", "vllm_xargs", "kv_transfer_params"), ({},)
    ),
    **dict.fromkeys(("logits_processors", "documents", "context", "stop_regex"), ([], "")),
}
"""Values with which a field changes nothing; with others it would, and is refused."""

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = NEUTRAL | {
    "functions": ([],),
    "function_call": ("auto", "none"),
    "parse_tool_calls": (True,),
    "modalities": (["text"], []),
    "verbosity": ("medium",),
    "continue_final_message": (False,),
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "echo": (False,),
    "chat_template": ("",),
    "audio": ({},),
    "web_search_options": (),
}

COMPLETION_NEUTRAL: dict[str, tuple[Any, ...]] = NEUTRAL | {
    "add_special_tokens": (True,),
    "best_of": (1,),
    "reasoning_format": ("none", "auto"),
    "separate_reasoning": (False,),
    "tools": ([],),
    **dict.fromkeys(("parse_tool_calls", "parallel_tool_calls"), (True,)),
}

SHOWN = 60  # characters of a refused value


def screen(
    given: Mapping[str, Any], works: Mapping[str, Any], neutral: Mapping[str, tuple[Any, ...]]
) -> dict[str, Any]:
    """The fields of a body that do something. Refused for one that would have to be ignored.

    works: by name, those that the endpoint's model has; neutral: as NEUTRAL."""
    kept = {}
    for key, value in given.items():
        if value is None or key in HARMLESS or key.startswith("speculative."):
            continue
        if key in works:
            kept[key] = value
        elif key not in neutral:
            raise Refused(
                400,
                f"{key}: {shown(value)}: this server knows no such field, and does not ignore what it does not know; "
                "leave it out",
                "unknown_parameter",
                param=key,
            )
        elif value not in neutral[key]:
            other = "".join(f" or send {json.dumps(each, ensure_ascii=False)}" for each in neutral[key][:1])
            raise Refused(
                400, f"{key}: {shown(value)} is not supported; leave it out{other}", "unsupported_parameter", param=key
            )
    return kept


def shown(value: Any) -> str:
    """A value of a body for a message, shortened."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
