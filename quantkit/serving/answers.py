"""Answers in OpenAI's format: whole, or as a stream of server-sent events while they are made."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from quantkit.serving.pieces import Pieces
from quantkit.serving.requests import Body, Refused
from quantkit.serving.scheduler import Job, Scheduler

Events = asyncio.Queue[tuple[int | None, str | None]]
"""What the scheduler emits: see `scheduler.Emit`."""


@dataclass
class Answer:
    """A job under way and its text."""

    scheduler: Scheduler
    job: Job
    events: Events
    pieces: Pieces
    opening: str = ""  # what the template already began for the model: `<think>`
    finish: str = field(default="", init=False)

    async def text(self) -> AsyncGenerator[str, None]:
        """Pieces of the answer; sets `finish`. Leaving early ends the job."""
        try:
            if self.opening:
                yield self.opening
            while not self.finish:
                token, why = await self.events.get()
                if token is None:
                    self.finish = why or "error"
                    if piece := self.pieces.rest():
                        yield piece
                elif piece := self.pieces.add(token):
                    yield piece
                if self.pieces.stopped:
                    self.finish = "stop"
        finally:
            self.close()

    def close(self) -> None:
        """End the job, if it has not ended."""
        self.scheduler.cancel(self.job)

    def usage(self) -> dict[str, int]:
        """Tokens of the prompt, of the answer so far, and both."""
        new = self.job.n_made
        return {
            "prompt_tokens": len(self.job.prompt),
            "completion_tokens": new,
            "total_tokens": len(self.job.prompt) + new,
        }


class ChatForm:
    """A choice of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, text: str) -> dict[str, Any]:
        """Of the whole answer."""
        return {"message": {"role": "assistant", "content": text}, "logprobs": None}

    def first(self) -> dict[str, Any] | None:
        """Of the chunk before all pieces."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, text: str | None) -> dict[str, Any]:
        """Of a piece; None: of the chunk that says why the answer ended."""
        return {"delta": {} if text is None else {"content": text}, "logprobs": None}


class CompletionForm:
    """A choice of /v1/completions; methods as `ChatForm`."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, text: str) -> dict[str, Any]:
        """As `ChatForm`."""
        return {"text": text, "logprobs": None}

    def first(self) -> dict[str, Any] | None:
        """As `ChatForm`: there is none."""
        return None

    def piece(self, text: str | None) -> dict[str, Any]:
        """As `ChatForm`."""
        return {"text": text or "", "logprobs": None}


Form = ChatForm | CompletionForm


class Stream(StreamingResponse):
    """Server-sent events; the job ends with the response, however that ends."""

    def __init__(self, answer: Answer, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


async def reply(request: Request, body: Body, answer: Answer, form: Form, model: str) -> Response:
    """The answer as the request's body wants it. Refused if generation fails, ClientDisconnect if nobody waits."""
    kind = form.chunk_kind if body.stream else form.whole_kind
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return Stream(answer, events(answer, form, head, usage))
    text = await whole(request, answer)
    choices = [{"index": 0, **form.whole(text), "finish_reason": answer.finish}]
    return JSONResponse({**head, "choices": choices, "usage": answer.usage()})


async def events(answer: Answer, form: Form, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Chunks of the answer. head: what all of them begin with. usage: the last one counts tokens."""
    if usage:
        head = {**head, "usage": None}

    def event(choice: dict[str, Any], finish: str | None = None) -> str:
        choices = [{"index": 0, **choice, "finish_reason": finish}]
        return f"data: {json.dumps({**head, 'choices': choices}, ensure_ascii=False)}\n\n"

    if (first := form.first()) is not None:
        yield event(first)
    async with contextlib.aclosing(answer.text()) as pieces:
        async for piece in pieces:
            yield event(form.piece(piece))
    if answer.finish in ("error", "cancelled"):
        error = {"message": f"generation ended: {answer.finish}", "type": "server_error", "code": None}
        yield f"data: {json.dumps({'error': error})}\n\n"
        return
    yield event(form.piece(None), answer.finish)
    if usage:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage()})}\n\n"
    yield "data: [DONE]\n\n"


async def whole(request: Request, answer: Answer) -> str:
    """All of the text; a client that hangs up meanwhile ends the job."""

    async def collect() -> str:
        return "".join([piece async for piece in answer.text()])

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    text, gone = asyncio.create_task(collect()), asyncio.create_task(hang_up())
    try:
        done, _ = await asyncio.wait([text, gone], return_when=asyncio.FIRST_COMPLETED)
    finally:
        text.cancel()
        gone.cancel()
        answer.close()
    if text not in done:
        raise ClientDisconnect
    if answer.finish in ("error", "cancelled"):
        raise Refused(500 if answer.finish == "error" else 503, f"generation ended: {answer.finish}")
    return text.result()
