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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

OPENINGS = ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<|tool_calls_section_begin|>", "<tool_call>")
"""With what calls begin; all that follows in an answer is calls."""

NAME = re.compile(r"[\w.:-]{1,256}")  # of what can be called

MOST_CALLS = 128


def taught(template: str) -> bool:
    """Whether a template has one of these forms."""
    return any(opening in template for opening in OPENINGS)


Arguments = Mapping[str, Mapping[str, Any]]
"""Of a tool: name of an argument -> its JSON schema."""


def arguments(tools: Sequence[Mapping[str, Any]]) -> dict[str, Arguments]:
    """By the names of tools, as a body has them; what is in no form of a tool is left out."""
    found: dict[str, Arguments] = {}
    for tool in tools:
        function = tool.get("function")
        schema = function.get("parameters") if isinstance(function, Mapping) else None
        properties = schema.get("properties") if isinstance(schema, Mapping) else None
        if isinstance(function, Mapping) and isinstance(properties, Mapping):
            found[str(function.get("name"))] = {k: v for k, v in properties.items() if isinstance(v, Mapping)}
    return found


def is_text(schema: Mapping[str, Any]) -> bool:
    """Whether an argument by this schema stands as it is where others stand as JSON, in GLM's form."""
    return schema.get("type") == "string" and "enum" not in schema


def calls(text: str, known: Mapping[str, Arguments] = {}, cut: bool = False) -> list[tuple[str, str]] | None:
    """(name, arguments as JSON) of each call in a text that begins with an opening; None if any of it is not a call
    with an object as its arguments: then the whole is text. In time that grows as the text does, whatever it is.

    known: what is known of the tools' arguments, by their names. cut: the text ends where its length was limited; the
    calls before one that is not whole are then what is left.
    """
    found, pairs = list[tuple[str, str]](), _pairs(text, known)
    for name, given, ended in pairs:
        try:
            whole = isinstance(_loads(given), dict) and bool(given.encode())  # no half of a surrogate pair
        except (ValueError, RecursionError):
            whole = False
        if not whole or not NAME.fullmatch(name):
            return found or None if cut and not ended and next(pairs, None) is None else None
        found.append((name, given))
        if len(found) > MOST_CALLS:
            return None
    return found or None


def _pairs(text: str, known: Mapping[str, Arguments]) -> Iterator[tuple[str, str, bool]]:
    """What may be a name and arguments; and whether they end with their mark."""
    for kind, rest, ended in _parts(text, "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"):
        yield (*(_block(rest) if kind.strip() == "function" else (kind.strip(), rest.strip())), ended)
    marks = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
    for name, given, ended in _parts(text, *marks):
        yield name.strip().removeprefix("functions.").partition(":")[0], given.strip(), ended
    for _, inside, ended in _parts(text, "<tool_call>", "", "</tool_call>"):
        yield (*_tagged(inside.strip(), ended, known), ended)


def _parts(text: str, begin: str, middle: str, end: str) -> Iterator[tuple[str, str, bool]]:
    """What stands before and after `middle`, from each `begin` to the `end` that follows, or that of the text; and
    whether there was one."""
    at = 0
    while (at := text.find(begin, at)) >= 0 and (split := text.find(middle, at + len(begin))) >= 0:
        stop = text.find(end, split + len(middle))
        ended, stop = stop >= 0, stop if stop >= 0 else len(text)
        yield text[at + len(begin) : split], text[split + len(middle) : stop], ended
        at = stop + len(end) * ended


def _block(text: str) -> tuple[str, str]:
    """A name, then JSON in a block of Markdown."""
    name, _, rest = text.partition("```")
    inside, fence, after = rest.removeprefix("json").rpartition("```")
    return (name.strip(), inside.strip()) if fence and not after.strip() else ("", "")


def _tagged(inside: str, ended: bool, known: Mapping[str, Arguments]) -> tuple[str, str]:
    """ended: by its tag. As GLM writes it, a call that was cut short looks like one with fewer arguments."""
    if not inside.startswith("{"):
        name, begin, rest = inside.partition("<arg_key>")
        pairs, rest, schemas = {}, begin + rest, known.get(name.strip(), {})
        for key, value, whole in _parts(rest, "<arg_key>", "</arg_key>", "</arg_value>"):
            opened, tag, told = value.partition("<arg_value>")
            if not whole or not tag or opened.strip():
                return "", ""
            pairs[key.strip()] = _value(told.strip(), schemas.get(key.strip(), {}))
        return (name.strip(), json.dumps(pairs, ensure_ascii=False)) if ended else ("", "")
    try:
        told = _loads(inside)
        given = told.get("arguments", told.get("parameters"))
        return str(told.get("name", "")), given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)
    except (ValueError, RecursionError):
        return "", ""


def _value(text: str, schema: Mapping[str, Any]) -> Any:
    """GLM writes strings as they are, all else as JSON. Without a schema what may be JSON is JSON."""
    if is_text(schema):
        return text
    try:
        told = _loads(text)
    except (ValueError, RecursionError):
        return text
    kinds = _kinds(schema)
    return told if "string" not in kinds or isinstance(told, str) or kinds & _kinds_of(told) else text


def _kinds(schema: Mapping[str, Any]) -> set[str]:
    """JSON's types that a schema allows, as far as it says so."""
    kind = schema.get("type")
    found = {kind} if isinstance(kind, str) else {each for each in _list(kind) if isinstance(each, str)}
    for choice in (*_list(schema.get("anyOf")), *_list(schema.get("oneOf"))):
        found |= {str(choice["type"])} if isinstance(choice, Mapping) and isinstance(choice.get("type"), str) else set()
    return found


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _kinds_of(told: Any) -> set[str]:
    """A value's own."""
    if isinstance(told, bool) or told is None:
        return {"null" if told is None else "boolean"}
    if isinstance(told, int | float):
        return {"number", "integer"} if isinstance(told, int) or told.is_integer() else {"number"}
    return {"array" if isinstance(told, list) else "object"}


def _loads(text: str) -> Any:
    """JSON without Python's NaN and Infinity, which other programs cannot read. ValueError for what is none."""
    return json.loads(text, parse_constant=_no_number)


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)
