"""A file's chat template, rendered as Hugging Face's renderer does, in jinja2's sandbox: templates come from strangers.

What templates may rely on, with and without transformers: blocks are trimmed; `break`, `continue`, `{% generation %}`;
`raise_exception`, `strftime_now`; a `tojson` that escapes nothing and keeps the order of keys; `tools` and `documents`
that are none; the special tokens that there are.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from quantkit.errors import QuantkitError

OPENINGS = (
    "<think>\n",
    "<think>",
)  # with what a template may have begun the answer: R1's way, and that of V3.1 and others
SWITCHES = "thinking", "enable_thinking"  # as templates call whether the model shall reason (V3.1; Qwen and others)
TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk", "seperator": "sep", "mask": "mask"}
FAILURES = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


def apply_template(
    metadata: Mapping[str, Any],
    messages: Sequence[Mapping[str, Any]],
    /,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
    **given: Any,
) -> str:
    """The prompt for these messages, by the template of a GGUF file with this metadata.

    tools: for templates that describe them; one called `tool_use` goes first then. given: `chat_template_kwargs`, which
    the template may name (`thinking`). QuantkitError if there is no template or it fails, with what it says.
    """
    text = None if tools is None else metadata.get("tokenizer.chat_template.tool_use")
    text = text or metadata.get("tokenizer.chat_template")
    if not isinstance(text, str):
        raise QuantkitError("this file has no chat template; run without --chat")
    conversation = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
    names = special_tokens(metadata) | {"documents": None} | given | conversation
    try:
        return _compiled(text).render(names)
    except FAILURES as error:
        raise QuantkitError(f"the file's chat template fails: {error}") from None


def template_names(template: str) -> set[str]:
    """Names that a template's code mentions, but for attributes."""
    found, after_dot = set(), False
    try:
        for _, kind, value in jinja2.Environment().lex(template):
            if kind == "name" and not after_dot:
                found.add(value)
            after_dot = kind == "operator" and value == "."
    except jinja2.TemplateError:  # rendering will say what is wrong
        return set()
    return found


def reasoning(metadata: Mapping[str, Any], wish: bool) -> dict[str, bool]:
    """The variables by which the file's template is told whether the model shall reason. QuantkitError if it reads
    none."""
    read = template_names(metadata.get("tokenizer.chat_template", "")) & set(SWITCHES)
    if not read:
        option = "--thinking" if wish else "--no-thinking"
        raise QuantkitError(
            f"{option}: this file's chat template reads neither {' nor '.join(SWITCHES)}; its model reasons, or does "
            "not, whatever it is told; leave it out"
        )
    return dict.fromkeys(sorted(read), wish)


def opening(prompt: str) -> str:
    """With what the template has begun the answer already: `<think>` with or without a line end, or nothing."""
    return next((text for text in OPENINGS if prompt.endswith(text)), "")


def special_tokens(metadata: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its like, those that the file has."""
    tokens, found = metadata["tokenizer.ggml.tokens"], {}
    for key, name in TOKENS.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if type(token) is int and 0 <= token < len(tokens):
            found[f"{name}_token"] = tokens[token]
    return found


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; to a prompt it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(16)
def _compiled(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)
