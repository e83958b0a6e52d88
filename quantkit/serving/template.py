"""A file's chat template: from messages to the prompt, in which control tokens are those that the template wrote.

Templates may rely on what Hugging Face's renderer gives them (`serving/sandbox.py`), on `tools` and `documents` that
are none, and on the special tokens that there are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.serving.markers import Markers, Prompt
from quantkit.serving.renderer import MOST, Renderer, shared

OPENINGS = (
    "<think>\n",
    "<think>",
)  # with what a template may have begun the answer: R1's way, and that of V3.1 and others
SWITCHES = "thinking", "enable_thinking"  # as templates call whether the model shall reason (V3.1; Qwen and others)
TOKENS = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk", "seperator": "sep", "mask": "mask"}


class ChatTemplate:
    """The template of a GGUF file with this metadata. renderer: the process that renders it. most: characters that a
    prompt may have."""

    def __init__(self, metadata: Mapping[str, Any], renderer: Renderer | None = None, most: int = MOST):
        self.metadata, self.renderer, self.most = metadata, renderer or shared(), most

    def names(self) -> set[str]:
        """Variables and functions that its code mentions. QuantkitError if there is none, or it is none."""
        return self.renderer.names(self.text(False))

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **given: Any,
    ) -> str:
        """The text for these messages.

        tools: for templates that describe them; one called `tool_use` goes first then. given: `chat_template_kwargs`,
        which the template may name (`thinking`). QuantkitError if there is no template or it fails, with what it says;
        `renderer.TooLong` beyond `most` characters.
        """
        conversation = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        variables = special_tokens(self.metadata) | {"documents": None} | given | conversation
        return self.renderer.render(self.text(tools is not None), variables, self.most)

    def prompt(self, messages: Sequence[Mapping[str, Any]], markers: Markers, /, **given: Any) -> Prompt:
        """`render`, knowing which control tokens the template wrote: those in strings of messages and of `given` are
        text.

        The characters that control tokens begin and end with are hidden from the template in all strings. If that
        changes what it makes (it asks for `<tool_response>`, say), only whole control tokens are hidden.
        """
        text = self.render(messages, **given)
        if not markers.may_hide((messages, given)):
            return Prompt(text)
        hide = markers.hidden((self.text(False), messages, given))
        for whole in (False, True):
            told, others = hide.strings((messages, given), whole)
            hidden = self.render(told, **others)
            if whole or hide.shown(hidden) == text:
                break
        return Prompt(hide.shown(hidden), hidden, hide)

    def text(self, tools: bool) -> str:
        """As the file has it. tools: for requests with some. QuantkitError if there is none."""
        text = self.metadata.get("tokenizer.chat_template.tool_use") if tools else None
        text = text or self.metadata.get("tokenizer.chat_template")
        if not isinstance(text, str):
            raise QuantkitError("this file has no chat template; it can only continue texts")
        return text


def apply_template(metadata: Mapping[str, Any], messages: Sequence[Mapping[str, Any]], /, **given: Any) -> str:
    """`ChatTemplate.render` of a file's template, as it stands."""
    return ChatTemplate(metadata).render(messages, **given)


def reasoning(metadata: Mapping[str, Any], wish: bool) -> dict[str, bool]:
    """The variables by which the file's template is told whether the model shall reason. QuantkitError if it reads
    none."""
    read = ChatTemplate(metadata).names() & set(SWITCHES)
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
