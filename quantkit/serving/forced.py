"""Grammars of answers that have to be calls of tools (`tool_choice`), in the form that a chat template teaches.

A grammar is text in llguidance's Lark: markers that are single tokens stand there by their ids, arguments as JSON
schemas. `serving/tools.py` has the forms, and reads such answers.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from quantkit.serving.refusals import Refused
from quantkit.serving.tools import NAME, is_text

MOST = 32  # tools of which a call may be required at once
BETWEEN = r"/[ \n]{0,4}/"  # what may stand between calls, and before the first
DEEPSEEK = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
KIMI = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


@dataclass(frozen=True)
class Wanted:
    """What an answer has to call: one of these tools (name -> JSON schema of its arguments). several: one call after
    the other may come. template: the chat template, as it is with tools."""

    tools: Mapping[str, Mapping[str, Any]]
    several: bool
    template: str


def wanted(tools: Sequence[Mapping[str, Any]], name: str | None, several: bool, template: str) -> Wanted:
    """tools: as a body has them. name: of the one that has to be called; None: any. Refused for a name or a tool that
    is none."""
    found = {}
    for tool in tools:
        function = tool.get("function")
        called = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(called, str) or not NAME.fullmatch(called):
            what = "function.name, of letters, digits, dots and dashes,"
            raise Refused(400, f"tools: each needs a {what} where a call is required", param="tools")
        schema = function.get("parameters") or {"type": "object"}
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object" or not _arguments(schema):
            raise Refused(400, f"tools: the parameters of {called} are no schema of an object", param="tools")
        found[called] = schema
    if name is not None:
        if name not in found:
            raise Refused(400, f"tool_choice: no tool is called {name!r}", param="tool_choice")
        found = {name: found[name]}
    if len(found) > MOST:
        raise Refused(
            400, f"tool_choice: a call of {len(found)} tools is required, {MOST} are the most", param="tool_choice"
        )
    return Wanted(found, several, template)


def _arguments(schema: Mapping[str, Any]) -> bool:
    """Whether what it says of arguments is in the form of a schema: one of each, and names of those needed."""
    told, needed = schema.get("properties", {}), schema.get("required", [])
    return (
        isinstance(told, Mapping)
        and all(isinstance(each, Mapping | bool) for each in told.values())
        and isinstance(needed, list)
        and all(isinstance(name, str) for name in needed)
    )


@dataclass(frozen=True)
class Writer:
    """What the forms are written with. token: the id of a marker that is one token, else None. space: a regular
    expression, what may stand between the parts of JSON."""

    token: Callable[[str], int | None]
    space: str

    def mark(self, text: str) -> str:
        """A marker."""
        number = self.token(text)
        return json.dumps(text, ensure_ascii=False) if number is None else f"<[{number}]>"

    def json(self, schema: Mapping[str, Any]) -> str:
        """JSON by a schema."""
        return f"%json {json.dumps({**schema, 'x-guidance': {'whitespace_pattern': self.space}})}"

    def deepseek_v3(self, i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """As DeepSeek-V3 and R1-0528."""
        begin, sep, end = map(self.mark, ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"))
        opening = json.dumps(f"{name}\n```json\n", ensure_ascii=False)
        return [f'call{i}: {begin} "function" {sep} {opening} json{i} "\\n```" {end}', f"json{i}: {self.json(schema)}"]

    def deepseek_v31(self, i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """As DeepSeek-V3.1 and later."""
        begin, sep, end = map(self.mark, ("<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"))
        return [f"call{i}: {begin} {text(name)} {sep} json{i} {end}", f"json{i}: {self.json(schema)}"]

    def kimi(self, i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """As Kimi-K2."""
        marks = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
        begin, sep, end = map(self.mark, marks)
        head = f"{text(f'functions.{name}:')} /[0-9]{{1,3}}/"
        return [f"call{i}: {begin} {head} {sep} json{i} {end}", f"json{i}: {self.json(schema)}"]

    def hermes(self, i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """As Hermes and Qwen."""
        begin, end = map(self.mark, ("<tool_call>", "</tool_call>"))
        head = text(f'\n{{"name": {json.dumps(name)}, "arguments": ')
        return [f'call{i}: {begin} {head} json{i} "}}\\n" {end}', f"json{i}: {self.json(schema)}"]

    def glm(self, i: int, name: str, schema: Mapping[str, Any]) -> list[str]:
        """As GLM-4.5 and later: an argument of type string stands as it is, all others as JSON."""
        begin, end = map(self.mark, ("<tool_call>", "</tool_call>"))
        tags = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
        key, key_end, value, value_end = map(self.mark, tags)
        needed, whole, lines = schema.get("required", []), f"call{i}: {begin} {text(name)}", []
        for j, (called, given) in enumerate(schema.get("properties", {}).items()):
            told = given if isinstance(given, Mapping) else {}  # true: any JSON
            if given is False:  # none
                continue
            one = f'"\\n" {key} {text(called)} {key_end} "\\n" {value} value{i}_{j} {value_end}'
            whole += f" {one}" if called in needed else f" ({one})?"
            more = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
            lines.append(f"value{i}_{j}: " + ("/[^<]*/" if is_text(told) else self.json({**told, **more})))
        return [f'{whole} "\\n"? {end}', *lines]


def text(of: str) -> str:
    """A string in a grammar."""
    return json.dumps(of, ensure_ascii=False)


def lark(asked: Wanted, writer: Writer) -> str:
    """The grammar."""
    template, around = asked.template, ("", "")
    if "<｜tool▁call" in template:
        form, around = writer.deepseek_v3 if "```json" in template else writer.deepseek_v31, DEEPSEEK
    elif KIMI[0] in template:
        form, around = writer.kimi, KIMI
    else:
        form = writer.glm if "<arg_key>" in template else writer.hermes
    lines = [line for i, (name, schema) in enumerate(asked.tools.items()) for line in form(i, name, schema)]
    several = "call (BETWEEN call)*" if asked.several else "call"
    begin, end = (writer.mark(mark) if mark else "" for mark in around)
    any_call = " | ".join(f"call{i}" for i in range(len(asked.tools)))
    return "\n".join([f"start: BETWEEN {begin} {several} {end}", f"call: {any_call}", f"BETWEEN: {BETWEEN}", *lines])
