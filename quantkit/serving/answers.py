"""Answers in OpenAI's format: whole, or as a stream of server-sent events while they are made."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from quantkit.serving import logprobs
from quantkit.serving.logits import Chance
from quantkit.serving.pieces import Pieces
from quantkit.serving.refusals import Refused
from quantkit.serving.requests import Body
from quantkit.serving.scheduler import Job, Scheduler

Events = asyncio.Queue[tuple[int | None, str | None]]
"""What the scheduler emits: see `scheduler.Emit`."""


@dataclass(frozen=True)
class Part:
    """Some of an answer's text, and the tokens that are told with it. finish: with the last part, why it ended."""

    text: str
    chances: Sequence[Chance] = ()
    starts: Sequence[int] = ()
    finish: str = ""


@dataclass
class Answer:
    """A job under way and its text. index: its number among the request's choices."""

    scheduler: Scheduler
    job: Job
    events: Events
    pieces: Pieces
    opening: str = ""  # what the template already began for the model: `<think>`; or the prompt, if wanted
    index: int = 0
    finish: str = field(default="", init=False)
    n_told: int = field(default=0, init=False)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The answer piece by piece; sets `finish`. Leaving early ends the job."""
        try:
            if self.opening:
                yield Part(self.opening)
            while not self.finish:
                token, why = await self.events.get()
                piece = self.pieces.rest() if token is None else self.pieces.add(token)
                if token is None:
                    self.finish = why or "error"
                if self.pieces.stopped:
                    self.finish = "stop"
                if piece or self.finish:
                    yield self._part(piece)
        finally:
            self.close()

    def _part(self, text: str) -> Part:
        whole = self.finish and not self.pieces.stopped  # tokens without text too
        begin, self.n_told = self.n_told, len(self.pieces.starts) if whole else self.pieces.tokens_shown()
        chances = self.job.chances[begin : self.n_told]
        return Part(text, chances, self.pieces.starts[begin : self.n_told], self.finish)

    def close(self) -> None:
        """End the job, if it has not ended."""
        self.scheduler.cancel(self.job)


def usage(answers: Sequence[Answer]) -> dict[str, int]:
    """Tokens of the prompts (each counted once, however many answers it got), of the answers so far, and both."""
    prompts = {id(answer.job.prompt): len(answer.job.prompt) for answer in answers}
    old, new = sum(prompts.values()), sum(answer.job.n_made for answer in answers)
    return {"prompt_tokens": old, "completion_tokens": new, "total_tokens": old + new}


class ChatForm:
    """A choice of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """Of the whole answer."""
        all_of_it = Part(text, answer.job.chances[: answer.n_told])
        return {"message": {"role": "assistant", "content": text}, "logprobs": self._logprobs(answer, all_of_it)}

    def first(self) -> dict[str, Any] | None:
        """Of the chunk before all pieces."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, answer: Answer, part: Part) -> dict[str, Any]:
        """Of a piece."""
        return {"delta": {"content": part.text} if part.text else {}, "logprobs": self._logprobs(answer, part)}

    def _logprobs(self, answer: Answer, part: Part) -> dict[str, Any] | None:
        return logprobs.of_chat(answer.pieces.tokenizer, part.chances) if part.chances else None


class CompletionForm:
    """A choice of /v1/completions; methods as `ChatForm`."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """As `ChatForm`."""
        return self.piece(answer, Part(text, answer.job.chances[: answer.n_told], answer.pieces.starts))

    def first(self) -> dict[str, Any] | None:
        """As `ChatForm`: there is none."""
        return None

    def piece(self, answer: Answer, part: Part) -> dict[str, Any]:
        """As `ChatForm`."""
        chances, starts = part.chances, part.starts[: len(part.chances)]
        told = logprobs.of_completion(answer.pieces.tokenizer, chances, starts) if chances else None
        return {"text": part.text, "logprobs": told}


Form = ChatForm | CompletionForm


class Stream(StreamingResponse):
    """Server-sent events; the jobs end with the response, however that ends."""

    def __init__(self, answers: Sequence[Answer], content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answers = answers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            for answer in self.answers:
                answer.close()


async def reply(request: Request, body: Body, answers: Sequence[Answer], form: Form, model: str) -> Response:
    """The answers as the request's body wants them. Refused if generation fails, ClientDisconnect if nobody waits."""
    kind = form.chunk_kind if body.stream else form.whole_kind
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}
    if body.stream:
        count = body.stream_options is not None and body.stream_options.include_usage
        return Stream(answers, events(answers, form, head, count))
    texts = await whole(request, answers)
    choices = [
        {"index": answer.index, **form.whole(answer, text), "finish_reason": answer.finish}
        for answer, text in zip(answers, texts, strict=True)
    ]
    return JSONResponse({**head, "choices": choices, "usage": usage(answers)})


async def events(answers: Sequence[Answer], form: Form, head: dict[str, Any], count: bool) -> AsyncIterator[str]:
    """Chunks of the answers. head: what all of them begin with. count: the last one counts tokens."""
    if count:
        head = {**head, "usage": None}

    def event(answer: Answer, choice: dict[str, Any], finish: str | None = None) -> str:
        choices = [{"index": answer.index, **choice, "finish_reason": finish}]
        return f"data: {json.dumps({**head, 'choices': choices}, ensure_ascii=False)}\n\n"

    if (first := form.first()) is not None:
        for answer in answers:
            yield event(answer, first)
    async with contextlib.aclosing(together(answers)) as parts:
        async for answer, part in parts:
            if part.finish in ("error", "cancelled"):
                error = {"message": f"generation ended: {part.finish}", "type": "server_error", "code": None}
                yield f"data: {json.dumps({'error': error})}\n\n"
                return
            if part.text or part.chances:
                yield event(answer, form.piece(answer, part))
            if part.finish:
                yield event(answer, form.piece(answer, Part("")), part.finish)
    if count:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(answers)})}\n\n"
    yield "data: [DONE]\n\n"


async def together(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, Part], None]:
    """Parts of all answers as they come. Leaving early ends all."""
    parts: asyncio.Queue[tuple[Answer, Part | None]] = asyncio.Queue(len(answers))  # bounded: no text piles up

    async def follow(answer: Answer) -> None:
        async with contextlib.aclosing(answer.parts()) as own:
            async for part in own:
                await parts.put((answer, part))
        await parts.put((answer, None))

    tasks = [asyncio.create_task(follow(answer)) for answer in answers]
    try:
        left = len(tasks)
        while left:
            answer, part = await parts.get()
            left -= part is None
            if part is not None:
                yield answer, part
    finally:
        for task in tasks:
            task.cancel()


async def whole(request: Request, answers: Sequence[Answer]) -> list[str]:
    """All of the texts; a client that hangs up meanwhile ends the jobs."""

    async def collect(answer: Answer) -> str:
        return "".join([part.text async for part in answer.parts()])

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    async def collect_all() -> list[str]:
        return await asyncio.gather(*(collect(answer) for answer in answers))

    texts = asyncio.create_task(collect_all())
    gone = asyncio.create_task(hang_up())
    try:
        done, _ = await asyncio.wait((texts, gone), return_when=asyncio.FIRST_COMPLETED)
    finally:
        texts.cancel()
        gone.cancel()
        for answer in answers:
            answer.close()
    if texts not in done:
        raise ClientDisconnect
    for answer in answers:
        if answer.finish in ("error", "cancelled"):
            raise Refused(500 if answer.finish == "error" else 503, f"generation ended: {answer.finish}")
    return texts.result()
