"""What OpenAI's clients send, validated, and how they are refused."""

import secrets
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from quantkit.runtime.generate import Sampling


class StreamOptions(BaseModel):
    """include_usage: the stream's last chunk counts tokens."""

    include_usage: bool = False


class Body(BaseModel):
    """What both endpoints take. Fields that would change the output but are not supported must have no effect."""

    model: str = ""
    stream: bool = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict, Field(max_length=0)] | None = None
    repeat_penalty: Literal[1] | None = None  # this and the next four: not OpenAI's, but chat front ends offer them
    repetition_penalty: Literal[1] | None = None
    mirostat: Literal[0] | None = None
    tfs_z: Literal[1] | None = None
    format: None = None

    def sampling(self) -> Sampling:
        """What is not given is as by default; a seed is drawn."""
        given: dict[str, Any] = self.model_dump(include={"temperature", "top_p", "top_k", "min_p"}, exclude_none=True)
        return Sampling(seed=self.seed if self.seed is not None else secrets.randbits(63), **given)

    def stops(self) -> list[str]:
        """Strings that end the answer."""
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


class Part(BaseModel):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Roles that R1's template knows; `developer` is what OpenAI's newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
    """Plain text is all there is."""

    type: Literal["text"]


class ChatBody(Body):
    """Front ends send `tools` with every chat. R1's template has no place for them, so the model answers as without;
    `chat` refuses them where a template has one."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: Literal[False] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    functions: Annotated[list, Field(max_length=0)] | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Literal["medium"] | None = None
    think: Literal[True] | None = None
    continue_final_message: Literal[False] | None = None
    add_generation_prompt: Literal[True] | None = None


class CompletionBody(Body):
    """prompt: text, or the ids of its tokens."""

    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


def failure(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """An error as OpenAI's clients expect it."""
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    error = {"message": message, "type": kind, "param": None, "code": code}
    return JSONResponse({"error": error}, status_code=status, headers=headers)


class Refused(HTTPException):
    """An HTTP error with OpenAI's `code`."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None):
        super().__init__(status, message, headers)
        self.code = code
