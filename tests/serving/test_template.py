"""Chat templates give what Hugging Face's renderer gives, and no stranger's template leaves the sandbox."""

import time
import warnings

import pytest

from quantkit.errors import QuantkitError
from quantkit.serving.template import apply_template, opening

META = {
    "tokenizer.ggml.tokens": ["<s>", "</s>", "<pad>"],
    "tokenizer.ggml.bos_token_id": 0,
    "tokenizer.ggml.eos_token_id": 1,
}
MESSAGES = [{"role": "system", "content": "be <brief> & 'kind'"}, {"role": "user", "content": "Grüße"}]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'c' für", "parameters": {}}}]
BODY = "{% for m in messages %}{{ m.role + ': ' + m.content }}\n{% endfor %}"


def render(template: str, **given: object) -> str:
    return apply_template(META | {"tokenizer.chat_template": template}, MESSAGES, **given)


CASES = {  # template -> what is given and what comes out
    "{% if 0 %}{{ raise_exception('no') }}{% endif %}{{ bos_token }}": ({}, "<s>"),
    "{{ strftime_now('%Y') }}": ({}, time.strftime("%Y")),
    "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}": ({}, "be <brief> & 'kind'"),
    "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}": ({}, "user"),
    "a{% generation %}\n  x{{ messages[0].role }}{% endgeneration %}\nb": ({}, "a  xsystemb"),
    "{{ tools | tojson }}": (
        {"tools": TOOLS},
        '[{"type": "function", "function": {"name": "f", "description": "a < b & \'c\' für", "parameters": {}}}]',
    ),
    "{{ tools[0].type | tojson(indent=2, ensure_ascii=True) }}{{ {'b': 'ü', 'a': 1} | tojson(indent=1) }}": (
        {"tools": TOOLS},
        '"function"{\n "b": "ü",\n "a": 1\n}',
    ),
    "{{ {'b': 1, 'a': [2, 3]} | tojson(separators=(',', ':'), sort_keys=True) }}": ({}, '{"a":[2,3],"b":1}'),
    "{% if tools is none and documents is none %}none{% endif %}": ({}, "none"),
    "{% if not tools is defined %}undefined{% endif %}[{{ pad_token }}]": ({}, "[]"),
    "{% if thinking is defined and thinking %}<think>{% else %}</think>{% endif %}": ({"thinking": True}, "<think>"),
    "{{ messages | length }}{{ add_generation_prompt }}": ({"messages": "mine"}, "2True"),
    "{% set ns = namespace(x='') %}{% for m in messages %}{% set ns.x = ns.x + m.role[:1] %}{% endfor %}{{ ns.x }}": (
        {},
        "su",
    ),
    "  {% if 1 %}\n  a\n  {% endif %}\n": ({}, "  a\n"),
}


@pytest.mark.parametrize("template", CASES)
def test_renders(template):
    given, expected = CASES[template]
    assert render(template, **given) == expected


@pytest.mark.parametrize("template", [*CASES, BODY])
def test_as_transformers_does(template):
    """The independent answer, where transformers is installed."""
    transformers = pytest.importorskip("transformers")
    given = {key: value for key, value in CASES.get(template, ({}, ""))[0].items() if key != "messages"}
    from tokenizers import Tokenizer, models

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(models.BPE(vocab={"<s>": 0, "</s>": 1}, merges=[])),
            bos_token="<s>",
            eos_token="</s>",
        )
        theirs = tokenizer.apply_chat_template(
            MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True, **given
        )
    assert render(template, **given) == theirs


def test_what_a_template_refuses_is_said():
    with pytest.raises(QuantkitError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(QuantkitError, match="no chat template"):
        apply_template(META, MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(role='x') }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 // 0 }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% broken",
    ],
)
def test_templates_stay_in_the_sandbox(template):
    with pytest.raises(QuantkitError, match="template fails"):
        render(template)


def test_a_template_of_its_own_for_tools():
    meta = META | {"tokenizer.chat_template": "plain", "tokenizer.chat_template.tool_use": "with tools"}
    assert apply_template(meta, MESSAGES) == "plain"
    assert apply_template(meta, MESSAGES, tools=TOOLS) == "with tools"


def test_openings():
    assert opening("…<think>\n") == "<think>\n" and opening("…<think>") == "<think>" and opening("…</think>") == ""
