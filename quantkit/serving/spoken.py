"""What an answer consists of, told apart while it comes: reasoning, content, calls of tools."""

import uuid
from collections.abc import Mapping
from typing import Any

from quantkit.serving.tools import OPENINGS, Arguments, calls

BEGIN, END = "<think>", "</think>"


class Spoken:
    """parted: reasoning goes to `reasoning_content`, without its tags, else it is part of the content. tools: calls
    of these are looked for after the reasoning; None: of none. `add` and `rest` return fields of a message, or of a
    delta of one."""

    def __init__(self, parted: bool = False, tools: Mapping[str, Arguments] | None = None):
        self.parted, self.tools = parted, tools
        self.thinking = self.begun = False  # begun: something other than space has come
        self.calling = self.after = False  # after: a tag of reasoning went before, and only line ends have come since
        self.held, self.n_calls = "", 0

    def add(self, text: str) -> dict[str, Any]:
        """What is certain after more text."""
        if not self.parted and self.tools is None:
            return {"content": text} if text else {}
        self.held += text
        return self._certain(final=False)

    def rest(self, cut: bool = False) -> dict[str, Any]:
        """What is left at the end. Calls are whole now, or turn out to be text; of an answer that its length cut, the
        whole ones are kept and what is left of the last is dropped."""
        fields = self._certain(final=True)
        if self.calling:
            found = calls(self.held, self.tools or {}, cut)
            if found is None:
                fields["content"] = fields.get("content", "") + self.held
            else:
                self.n_calls = len(found)
                fields["tool_calls"] = [_call(i, name, arguments) for i, (name, arguments) in enumerate(found)]
            self.held = ""
        return fields

    def _certain(self, final: bool) -> dict[str, Any]:
        out = {"reasoning_content": "", "content": ""}
        while self.held and not self.calling:
            before = self.held
            if not self.begun:
                self._begin(final)
            if self.after:
                self.held = self.held.lstrip("\n")
                self.after = not self.held
            if self.begun:
                field, text = self._thought(final) if self.thinking else self._content(final)
                out[field] += text
            if self.held == before:
                break
        return {field: text for field, text in out.items() if text}

    def _begin(self, final: bool) -> None:
        """An answer begins with its reasoning's tag, or has none."""
        text = self.held.lstrip()
        if text.startswith(BEGIN):
            self.begun = self.thinking = True
            if self.parted:
                self.held, self.after = text.removeprefix(BEGIN), True
        elif final or not BEGIN.startswith(text):
            self.begun = True

    def _thought(self, final: bool) -> tuple[str, str]:
        field = "reasoning_content" if self.parted else "content"
        head, tag, tail = self.held.partition(END)
        if tag:
            self.thinking = False
            self.held, self.after = tail, self.parted
            return field, head if self.parted else head + tag
        return field, self._all_but(0 if final else _unsure(self.held, (END,)))

    def _content(self, final: bool) -> tuple[str, str]:
        places = [at for mark in OPENINGS if self.tools is not None and (at := self.held.find(mark)) >= 0]
        if places:
            self.calling = True
            return "content", self._all_but(len(self.held) - min(places))
        return "content", self._all_but(0 if final or self.tools is None else _unsure(self.held, OPENINGS))

    def _all_but(self, n: int) -> str:
        text, self.held = self.held[: len(self.held) - n], self.held[len(self.held) - n :]
        return text


def _unsure(text: str, marks: tuple[str, ...]) -> int:
    """How many characters at the end may be the beginning of a mark."""
    longest = max(map(len, marks))
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(m.startswith(text[-n:]) for m in marks)), 0)


def _call(index: int, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {"index": index, "id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}
