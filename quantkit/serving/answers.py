"""Answers in OpenAI's format: whole, or as a stream of server-sent events while they are made."""

import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from quantkit.serving import logprobs
from quantkit.serving.jobs import Job
from quantkit.serving.logits import Chance
from quantkit.serving.metrics import usage
from quantkit.serving.pieces import Pieces
from quantkit.serving.refusals import Refused
from quantkit.serving.requests import Body
from quantkit.serving.scheduler import Scheduler
from quantkit.serving.spoken import Spoken

JSON = json.JSONEncoder(ensure_ascii=False)
MANY = 2000  # tokens whose log probabilities are written beside the event loop
Events = asyncio.Queue[tuple[int | None, str | None]]
"""What the scheduler emits: see `jobs.Emit`."""


Made = TypeVar("Made")
LENGTH = "length"  # an end: at as many tokens as it may have
FAILED = {"error": 500, "cancelled": 503, "refused": 400}
"""Ends that are no answer -> status."""


@dataclass(frozen=True)
class Part:
    """Some of an answer's text, and the tokens that are told with it. finish: with the last part, why it ended."""

    text: str
    chances: Sequence[Chance] = ()
    starts: Sequence[int] = ()
    finish: str = ""


@dataclass(frozen=True)
class Opening:
    """With what an answer begins, before any token is made: what the template already began for the model (`<think>`),
    or the prompt, if it is wanted. starts: where each of the prompt's tokens begins in the text, the first `unshown`
    (a BOS that the server added) left out; empty if they are not told."""

    text: str = ""
    starts: Sequence[int] = ()
    unshown: int = 0

    def chances(self, job: Job) -> list[Chance]:
        """Of those tokens. The first of all has none."""
        if not self.starts:
            return []
        return [Chance(job.prompt[0], None, ()), *job.heard][self.unshown :]


@dataclass
class Answer:
    """A job under way and its text. index: its number among the request's choices. first: when its first token came, in
    time.monotonic's seconds."""

    scheduler: Scheduler
    job: Job
    events: Events
    pieces: Pieces
    opening: Opening = Opening()
    spoken: Spoken = field(default_factory=Spoken)
    index: int = 0
    first: float | None = field(default=None, init=False)
    finish: str = field(default="", init=False)
    n_told: int = field(default=0, init=False)

    async def parts(self) -> AsyncGenerator[Part, None]:
        """The answer piece by piece; sets `finish`. Leaving early ends the job."""
        try:
            opening = self.opening
            if opening.text and not opening.starts:
                yield Part(opening.text)
            while not self.finish:
                token, why = await self.events.get()
                self.first = self.first or time.monotonic()
                if opening.starts and not self.n_told and len(self.job.heard) == len(self.job.prompt) - 1:
                    yield Part(opening.text, opening.chances(self.job), opening.starts)
                    opening = Opening()
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
        chances, starts = self.told(begin)
        return Part(text, chances, starts, self.finish)

    def told(self, begin: int = 0) -> tuple[list[Chance], list[int]]:
        """The answer's tokens that were told, from that one on, and where they begin in the text; EOS last, if it
        counts."""
        shift = len(self.opening.text) if self.opening.starts else 0
        ended = self.job.ended if self.finish and not self.pieces.stopped else []
        starts = self.pieces.starts[begin : self.n_told] + [self.pieces.n_shown] * len(ended)
        return self.job.chances[begin : self.n_told] + ended, [shift + at for at in starts]

    def close(self) -> None:
        """End the job, if it has not ended."""
        self.scheduler.cancel(self.job)


def ended(answer: Answer, why: str) -> str:
    """What a client is told of an answer that failed."""
    return f"generation ended: {answer.job.refusal or why}"


def unnumbered(call: dict[str, Any]) -> dict[str, Any]:
    """A call of a whole message, which has no `index`."""
    return {key: value for key, value in call.items() if key != "index"}


class ChatForm:
    """A choice of /v1/chat/completions."""

    prefix, whole_kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """Of the whole answer."""
        told, spoken = Part(text, answer.told()[0]), answer.spoken
        parts, more = spoken.add(text), spoken.rest(answer.finish == LENGTH)
        reasoning = parts.get("reasoning_content", "") + more.get("reasoning_content", "")
        content: str | None = parts.get("content", "") + more.get("content", "")
        message = {"role": "assistant", "content": content} | ({"reasoning_content": reasoning} if reasoning else {})
        if calls := more.get("tool_calls"):
            message |= {"content": content or None, "tool_calls": [unnumbered(call) for call in calls]}
        return {"message": message, "logprobs": self._logprobs(answer, told)}

    def first(self) -> dict[str, Any] | None:
        """Of the chunk before all pieces."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}

    def piece(self, answer: Answer, part: Part) -> dict[str, Any]:
        """Of a piece."""
        return {"delta": answer.spoken.add(part.text), "logprobs": self._logprobs(answer, part)}

    def rest(self, answer: Answer) -> dict[str, Any] | None:
        """Of what only the end made certain."""
        delta = answer.spoken.rest(answer.finish == LENGTH)
        return {"delta": delta, "logprobs": None} if delta else None

    def last(self) -> dict[str, Any]:
        """Of the chunk that says why it ended."""
        return {"delta": {}, "logprobs": None}

    def finish(self, answer: Answer) -> str:
        """Why it ended."""
        return "tool_calls" if answer.spoken.n_calls and answer.finish != LENGTH else answer.finish

    def _logprobs(self, answer: Answer, part: Part) -> dict[str, Any] | None:
        return logprobs.of_chat(answer.pieces.tokenizer, part.chances) if part.chances else None


class CompletionForm:
    """A choice of /v1/completions; methods as `ChatForm`."""

    prefix, whole_kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def whole(self, answer: Answer, text: str) -> dict[str, Any]:
        """As `ChatForm`."""
        (chances, starts), opening = answer.told(), answer.opening
        return self.piece(answer, Part(text, opening.chances(answer.job) + chances, [*opening.starts, *starts]))

    def first(self) -> dict[str, Any] | None:
        """As `ChatForm`: there is none."""
        return None

    def piece(self, answer: Answer, part: Part) -> dict[str, Any]:
        """As `ChatForm`."""
        tokenizer, chances = answer.pieces.tokenizer, part.chances
        return {
            "text": part.text,
            "logprobs": logprobs.of_completion(tokenizer, chances, part.starts) if chances else None,
        }

    def rest(self, answer: Answer) -> dict[str, Any] | None:
        """As `ChatForm`: there is none."""
        return None

    def last(self) -> dict[str, Any]:
        """As `ChatForm`."""
        return {"text": "", "logprobs": None}

    def finish(self, answer: Answer) -> str:
        """As `ChatForm`."""
        return answer.finish


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

    def written() -> Response:
        choices = [
            {"index": answer.index, **form.whole(answer, text), "finish_reason": form.finish(answer)}
            for answer, text in zip(answers, texts, strict=True)
        ]
        return JSONResponse({**head, "choices": choices, "usage": usage(answers)})

    return await apart(sum(len(answer.job.heard) + len(answer.job.chances) for answer in answers), written)


async def apart(n: int, work: Callable[[], Made]) -> Made:
    """What `work` makes of the log probabilities of n tokens; of many, in a thread, for others wait for the event
    loop."""
    return await asyncio.to_thread(work) if n > MANY else work()


async def events(answers: Sequence[Answer], form: Form, head: dict[str, Any], count: bool) -> AsyncIterator[str]:
    """Chunks of the answers. head: what all of them begin with. count: the last one counts tokens."""
    begin = JSON.encode({**head, "usage": None} if count else head).removesuffix("}")

    def event(answer: Answer, choice: dict[str, Any], finish: str | None = None) -> str:
        told = JSON.encode({"index": answer.index, **choice, "finish_reason": finish})
        return f'data: {begin}, "choices": [{told}]}}\n\n'

    if (first := form.first()) is not None:
        for answer in answers:
            yield event(answer, first)
    async with contextlib.aclosing(together(answers)) as parts:
        async for answer, part in parts:
            if part.finish in FAILED:
                kind = "server_error" if FAILED[part.finish] >= 500 else "invalid_request_error"
                error = {"message": ended(answer, part.finish), "type": kind, "code": None}
                yield f"data: {json.dumps({'error': error})}\n\n"
                return
            if part.text or part.chances:
                choice = await apart(len(part.chances), partial(form.piece, answer, part))
                if part.chances or choice.get("text") or choice.get("delta"):
                    yield event(answer, choice)
            if part.finish:
                if (rest := form.rest(answer)) is not None:
                    yield event(answer, rest)
                yield event(answer, form.last(), form.finish(answer))
    if count:
        yield f"data: {json.dumps({**head, 'choices': [], 'usage': usage(answers)})}\n\n"
    yield "data: [DONE]\n\n"


async def together(answers: Sequence[Answer]) -> AsyncGenerator[tuple[Answer, Part], None]:
    """Parts of all answers as they come. Leaving early ends all."""
    if len(answers) == 1:  # without a task and a queue, which take as long as the text of a token
        async with contextlib.aclosing(answers[0].parts()) as only:
            async for own in only:
                yield answers[0], own
        return
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
        if answer.finish in FAILED:
            raise Refused(FAILED[answer.finish], ended(answer, answer.finish))
    return texts.result()
