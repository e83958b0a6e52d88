"""Calls of tools in a model's answer, as their chat templates teach them to write them, to OpenAI's `tool_calls`.

| template | form |
|---|---|
| DeepSeek-V3, R1-0528 | `<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, then arguments in a block of JSON |
| DeepSeek-V3.1 | `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>` |
| Kimi K2 | `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{arguments}<|tool_call_end|>` |
| GLM-4.5 and later | `<tool_call>NAME`, then `<arg_key>k</arg_key><arg_value>v</arg_value>` |
| Hermes, Qwen | `<tool_call>{"name": ..., "arguments": {...}}</tool_call>` |
"""

import json
import re
from collections.abc import Iterator
from typing import Any

OPENINGS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<|tool_calls_section_begin|>", "<tool_call>")
"""With what calls begin; all that follows in an answer is calls."""

_DEEPSEEK = re.compile(r"<｜tool▁call▁begin｜>(.*?)<｜tool▁sep｜>(.*?)(?:<｜tool▁call▁end｜>|\Z)", re.DOTALL)
_KIMI = re.compile(
    r"<\|tool_call_begin\|>(.*?)<\|tool_call_argument_begin\|>(.*?)(?:<\|tool_call_end\|>|\Z)", re.DOTALL
)
_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_PAIR = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)
_BLOCK = re.compile(r"^\s*(\S+)\s*```(?:json)?\s*(.*?)\s*```\s*$", re.DOTALL)

MOST_CALLS = 128


def taught(template: str) -> bool:
    """Whether a template has one of these forms."""
    return any(opening in template for opening in OPENINGS)


def calls(text: str) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call in a text that begins with an opening; None if any of it is not a call
    with an object as its arguments: then the whole is text."""
    found = []
    for name, arguments in _pairs(text):
        try:
            whole = isinstance(json.loads(arguments), dict)
        except (ValueError, RecursionError):
            whole = False
        if not whole or not re.fullmatch(r"[\w.:-]{1,256}", name):
            return None
        found.append((name, arguments))
        if len(found) > MOST_CALLS:
            return None
    return found or None


def _pairs(text: str) -> Iterator[tuple[str, str]]:
    for kind, rest in _DEEPSEEK.findall(text):
        block = _BLOCK.match(rest) if kind.strip() == "function" else None
        yield (block[1], block[2]) if block else (kind.strip(), rest.strip())
    for name, arguments in _KIMI.findall(text):
        yield name.strip().removeprefix("functions.").partition(":")[0], arguments.strip()
    for inside in _TAGGED.findall(text):
        yield _tagged(inside.strip())


def _tagged(inside: str) -> tuple[str, str]:
    if not inside.startswith("{"):
        pairs = {key.strip(): _value(value.strip()) for key, value in _PAIR.findall(inside)}
        return inside.partition("<arg_key>")[0].strip(), json.dumps(pairs, ensure_ascii=False)
    try:
        told = json.loads(inside)
    except (ValueError, RecursionError):
        return "", ""
    given = told.get("arguments", told.get("parameters"))
    return str(told.get("name", "")), given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)


def _value(text: str) -> Any:
    """GLM writes strings as they are, all else as JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
