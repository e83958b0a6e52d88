"""From a chat's body to the text that the model continues: by the file's template, with what the client gives it."""

from dataclasses import dataclass
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.serving.fields import shown
from quantkit.serving.forced import Wanted, wanted
from quantkit.serving.markers import Markers, Prompt
from quantkit.serving.refusals import Refused
from quantkit.serving.renderer import TooLong
from quantkit.serving.requests import ChatBody
from quantkit.serving.template import SWITCHES, ChatTemplate, opening
from quantkit.serving.tools import taught


@dataclass(frozen=True)
class Asking:
    """A chat as the model gets it. begun: what of the prompt already is the answer's beginning: `<think>`. tools: the
    model was told of some. call: what it has to call."""

    prompt: Prompt
    begun: str
    tools: bool
    call: Wanted | None = None


def chat_prompt(template: ChatTemplate, markers: Markers, body: ChatBody) -> Asking:
    """Refused if a message or a field would have no effect, or one that is not supported; TooLong if it cannot fit the
    context."""
    messages = [message.plain() for message in body.messages]
    try:
        names = template.names()
        wish, given = _given(body, names)
        prompt = template.prompt(messages, markers, **given)
        _check_tool_messages(template, messages, prompt.text, given)
        told = body.tool_choice != "none" and _told_of_tools(template, body, messages, prompt.text, given)
        if told:
            prompt = template.prompt(messages, markers, tools=body.tools, **given)
        call = _required(template, body, told)
    except TooLong:
        raise
    except QuantkitError as error:
        raise Refused(400, f"messages: {error}", param="messages") from None
    begun = opening(prompt.own)
    if wish is not None and not names & set(SWITCHES) and wish != bool(begun):
        state = "always" if begun else "never"
        raise Refused(
            400,
            f"thinking: {shown(wish)}: this file's chat template has no such switch: its model {state} reasons; "
            "leave it out",
            "unsupported_parameter",
            param="thinking",
        )
    return Asking(prompt, begun, told, call)


def _required(template: ChatTemplate, body: ChatBody, told: bool) -> Wanted | None:
    """What has to be called. Refused if the model does not know how."""
    if not body.requires_call():
        return None
    if not told:
        raise Refused(
            400,
            f"tool_choice: {body.tool_required() or 'required'}: this file's chat template tells the model of no "
            "tools, so it cannot know how to call one; leave it out",
            "unsupported_parameter",
            param="tool_choice",
        )
    name = body.tool_required()
    return wanted(body.tools, name, body.parallel_tool_calls and name is None, template.text(True))


def _given(body: ChatBody, names: set[str]) -> tuple[bool | None, dict[str, Any]]:
    """Whether the client wants reasoning, and variables for the template."""
    given, wish = dict(body.chat_template_kwargs), body.thinks()
    if (effort := body.reasoning_effort) is not None:
        if "reasoning_effort" in names:
            given.setdefault("reasoning_effort", effort)
        elif effort == "none" and wish is None:
            wish = False
        elif effort != "medium":
            raise Refused(
                400,
                f"reasoning_effort: {shown(effort)}: this file's chat template has no such switch; leave it out",
                "unsupported_parameter",
                param="reasoning_effort",
            )
    for key in list(given):
        if key in SWITCHES and isinstance(given[key], bool):
            if wish is not None and wish != given[key]:
                raise Refused(400, f"chat_template_kwargs.{key} contradicts the body", param="chat_template_kwargs")
            wish = given.pop(key)
        elif given[key] is None or (key == "add_generation_prompt" and given[key] is True):
            del given[key]
        elif key not in names or key in ("messages", "tools", "add_generation_prompt", "bos_token", "eos_token"):
            raise Refused(
                400,
                f"chat_template_kwargs.{key}: {shown(given[key])}: this file's chat template takes no such variable; "
                "leave it out",
                "unsupported_parameter",
                param="chat_template_kwargs",
            )
    if wish is not None:
        given |= {name: wish for name in SWITCHES if name in names}
    return wish, given


def _told_of_tools(
    template: ChatTemplate, body: ChatBody, messages: list[dict[str, Any]], text: str, given: dict[str, Any]
) -> bool:
    """Whether the template describes the tools to the model. Refused if their calls could not be told."""
    if not body.tools or template.render(messages, tools=body.tools, **given) == text:
        return False
    if not taught(template.text(True)):
        raise Refused(
            400,
            "tools: this file's chat template describes them to the model, but calls in its form are not known; "
            "leave them out",
            "unsupported_parameter",
            param="tools",
        )
    if not body.parallel_tool_calls and not body.requires_call():  # then the grammar has one
        raise Refused(400, "parallel_tool_calls: false is not supported; leave it out", param="parallel_tool_calls")
    return True


def _check_tool_messages(
    template: ChatTemplate, messages: list[dict[str, Any]], text: str, given: dict[str, Any]
) -> None:
    """Refused if the model would not be told tools' answers."""
    told = [message | {"content": "?"} if message["role"] == "tool" else message for message in messages]
    if told != messages and template.render(told, **given) == text:
        raise Refused(
            400,
            "messages: this file's chat template leaves those of role tool out",
            "unsupported_value",
            param="messages",
        )
