"""What bodies of requests consist of: messages, and objects that are a field's value."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

Word: TypeAlias = Annotated[str, Field(max_length=4096)]


class Known(BaseModel):
    """An object whose keys are all known; null means "not given"."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        return {key: each for key, each in value.items() if each is not None} if isinstance(value, dict) else value


class Part(Known):
    """A piece of a message; only text is understood. cache_control: Anthropic's, which clients leave in."""

    type: Literal["text"]
    text: str
    cache_control: Any = None


class Message(Known):
    """`developer` is what OpenAI's newer clients call `system`. Answers come back with fields that are empty."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: Literal[""] | None = None
    annotations: Annotated[list, Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: a message of role {self.role} needs one")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it; parts are joined by newlines, as llama-server and vLLM do."""
        parts = self.content
        text = "\n".join(part.text for part in parts) if isinstance(parts, list) else parts
        rest = self.model_dump(
            include={"name", "tool_calls", "tool_call_id", "reasoning_content", "reasoning"}, exclude_none=True
        )
        if text is None and not self.tool_calls:
            text = ""
        return {"role": "system" if self.role == "developer" else self.role, "content": text, **rest}


class Thinking(Known):
    """DeepSeek's and Anthropic's form of the switch."""

    type: Literal["enabled", "disabled", "auto"]


class FunctionName(Known):
    """By which a tool is called."""

    name: Word


class ToolChoice(Known):
    """The one tool that has to be called."""

    type: Literal["function"]
    function: FunctionName
