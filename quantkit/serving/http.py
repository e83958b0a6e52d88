"""An OpenAI-compatible HTTP server over one file: chat completions, completions, models; streaming by SSE.

The event loop only parses, tokenizes (in a worker thread) and writes; the scheduler's thread computes. Every request
ends its job when it ends itself, so a client that goes away costs one more step at most.
"""

import asyncio
import contextlib
import hmac
import json
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar

import uvicorn
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.progress import say
from quantkit.runtime.engines.open import Engine
from quantkit.runtime.generate import Sampling
from quantkit.runtime.sources import GGUFSource
from quantkit.serving.chat import Pieces, apply_template, encode_prompt
from quantkit.serving.scheduler import Job, QueueFull, Scheduler

BODY_SECONDS = 30  # a client that sends its request slower is cut off
SHUTDOWN_SECONDS = 5  # running requests get that long after Ctrl-C
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request; queue: requests that may wait for a slot."""

    max_body: int = 4 << 20
    queue: int = 256


class StreamOptions(BaseModel):
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
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k, "min_p": self.min_p}
        seed = self.seed if self.seed is not None else secrets.randbits(63)
        return Sampling(seed=seed, **{key: value for key, value in given.items() if value is not None})

    def stops(self) -> list[str]:
        return [text for text in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if text]


Parsed = TypeVar("Parsed", bound=Body)


class Part(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Roles that R1's template knows; `developer` is what OpenAI's newer clients call `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(BaseModel):
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
    prompt: str | Annotated[list[int], Field(min_length=1)] | Annotated[list[str], Field(min_length=1, max_length=1)]
    echo: Literal[False] | None = None
    suffix: Literal[""] | None = None
    best_of: Literal[1] | None = None
    logprobs: None = None


def failure(status: int, message: str, code: str | None = None, headers: dict[str, str] | None = None) -> JSONResponse:
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


@dataclass
class Answer:
    """A job under way and its text."""

    scheduler: Scheduler
    job: Job
    events: asyncio.Queue
    pieces: Pieces
    opening: str = ""  # what the template already began for the model: `<think>`
    finish: str = field(default="", init=False)

    async def text(self) -> AsyncIterator[str]:
        """Pieces of the answer; sets `finish`. Leaving early ends the job."""
        try:
            if self.opening:
                yield self.opening
            while not self.finish:
                token, why = await self.events.get()
                if token is None:
                    self.finish = why
                    if piece := self.pieces.rest():
                        yield piece
                elif piece := self.pieces.add(token):
                    yield piece
                if self.pieces.stopped:
                    self.finish = "stop"
        finally:
            self.close()

    def close(self) -> None:
        self.scheduler.cancel(self.job)

    def usage(self) -> dict[str, int]:
        new = self.job.n_made
        return {
            "prompt_tokens": len(self.job.prompt),
            "completion_tokens": new,
            "total_tokens": len(self.job.prompt) + new,
        }


class Stream(StreamingResponse):
    """Server-sent events; the job ends with the response, however that ends."""

    def __init__(self, answer: Answer, content: AsyncIterator[str]):
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.answer = answer

    async def __call__(self, scope, receive, send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answer.close()


class Api:
    """The endpoints over one model."""

    def __init__(self, name: str, metadata, tokenizer: Tokenizer, engine: Engine, limits: Limits, key: str | None):
        self.name, self.metadata, self.tokenizer, self.engine = name, metadata, tokenizer, engine
        self.limits, self.key, self.created = limits, key, int(time.time())
        self.scheduler = Scheduler(engine, limits.queue)

    def app(self) -> Starlette:
        @contextlib.asynccontextmanager
        async def lifespan(_):
            yield
            await asyncio.to_thread(self.scheduler.close)

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
        ]
        handlers = {HTTPException: self._refused, ClientDisconnect: self._gone, Exception: self._broken}
        return Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)

    async def _refused(self, _: Request, error: HTTPException) -> Response:
        return failure(error.status_code, error.detail, getattr(error, "code", None), error.headers)

    async def _gone(self, *_) -> Response:
        return failure(499, "the client closed the connection")

    async def _broken(self, _: Request, error: Exception) -> Response:
        return failure(500, f"internal error: {type(error).__name__}")

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "wrong or missing API key", "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def models(self, request: Request) -> Response:
        self._authorize(request)
        model = {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "quantkit",
            "context_length": self.engine.capacity,
        }
        if wanted := request.path_params.get("name"):
            self._check_name(wanted)
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

    def _check_name(self, wanted: str) -> None:
        if wanted not in ("", self.name):
            raise Refused(404, f"model {wanted!r} does not exist; this server has {self.name!r}", "model_not_found")

    async def _read(self, request: Request) -> bytes:
        """The body. Only JSON is read: a form in some web page must not be able to start work here."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        limit, body = self.limits.max_body, bytearray()
        too_long = Refused(413, f"the request is longer than {limit} bytes")
        length = request.headers.get("content-length", "0")
        if length.isdecimal() and int(length) > limit:
            raise too_long
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for part in request.stream():
                    body += part
                    if len(body) > limit:
                        raise too_long
        except TimeoutError:
            raise Refused(408, f"the request took longer than {BODY_SECONDS} s to arrive") from None
        return bytes(body)

    async def _parse(self, request: Request, kind: type[Parsed]) -> Parsed:
        self._authorize(request)
        try:
            body = kind.model_validate_json(await self._read(request))
        except ValidationError as error:
            errors = error.errors(include_url=False, include_input=False)
            worst = max(errors, key=lambda each: len(each["loc"]))  # of a union: the kind that came closest
            where = ".".join(map(str, worst["loc"]))
            raise Refused(400, f"{where}: {worst['msg']}" if where else worst["msg"]) from None
        self._check_name(body.model)
        return body

    def _start(self, body: Body, prompt: list[int], n_tokens: int | None, opening: str = "") -> Answer:
        capacity = self.engine.capacity
        if len(prompt) + (n_tokens or 1) > capacity:
            asked = f" and {n_tokens} new ones" if n_tokens else " leave no room for new ones and"
            raise Refused(
                400,
                f"{len(prompt)} prompt tokens{asked} do not fit the context of {capacity}",
                "context_length_exceeded",
            )
        if not all(0 <= token < self.engine.config.n_vocab for token in prompt):
            raise Refused(400, f"prompt: token ids must be 0 to {self.engine.config.n_vocab - 1}")
        loop, events = asyncio.get_running_loop(), asyncio.Queue()

        def emit(token: int | None, why: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (token, why))

        job = Job(prompt, n_tokens or capacity - len(prompt), body.sampling(), emit)
        try:
            self.scheduler.submit(job)
        except QueueFull as error:
            raise Refused(429, str(error), "queue_full", {"Retry-After": "1"}) from None
        except QuantkitError as error:
            raise Refused(503, str(error)) from None
        return Answer(self.scheduler, job, events, Pieces(self.tokenizer, body.stops()), opening)

    async def chat(self, request: Request) -> Response:
        body = await self._parse(request, ChatBody)

        def prepare() -> tuple[list[int], str]:
            messages = [message.plain() for message in body.messages]
            text = apply_template(self.metadata, messages)
            if body.tools and apply_template(self.metadata, messages, tools=body.tools) != text:
                raise Refused(
                    400,
                    "tools: this file's chat template describes them to the model, but calls of tools "
                    "are not supported; leave them out",
                )
            opening = "<think>\n" if text.endswith("<think>\n") else ""
            return encode_prompt(self.tokenizer, text, self.engine.config.bos), opening

        try:
            prompt, opening = await asyncio.to_thread(prepare)
        except QuantkitError as error:
            raise Refused(400, f"messages: {error}") from None
        answer = self._start(body, prompt, body.max_completion_tokens or body.max_tokens, opening)

        def choice(text: str | None, finish: str | None, first: bool) -> dict[str, Any]:
            if not body.stream:
                return {"message": {"role": "assistant", "content": text}, "logprobs": None}
            delta = {} if text is None else {"content": text}
            return {"delta": {"role": "assistant", **delta} if first else delta, "logprobs": None}

        return await self._reply(request, body, answer, "chatcmpl", "chat.completion", choice)

    async def completion(self, request: Request) -> Response:
        body = await self._parse(request, CompletionBody)
        text = body.prompt
        if isinstance(text, list) and isinstance(text[0], str):
            text = text[0]
        if isinstance(text, str):
            prompt = await asyncio.to_thread(encode_prompt, self.tokenizer, text, self.engine.config.bos)
        else:
            prompt = list(text)
        answer = self._start(body, prompt, body.max_tokens or COMPLETION_TOKENS)
        return await self._reply(
            request,
            body,
            answer,
            "cmpl",
            "text_completion",
            lambda text, finish, first: {"text": text or "", "logprobs": None},
        )

    async def _reply(self, request: Request, body: Body, answer: Answer, prefix: str, kind: str, choice) -> Response:
        """The whole answer as JSON, or a stream of chunks in OpenAI's format."""
        head = {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": self.name}
        if not body.stream:
            text = await self._whole(request, answer)
            choices = [{"index": 0, **choice(text, answer.finish, True), "finish_reason": answer.finish}]
            return JSONResponse({**head, "choices": choices, "usage": answer.usage()})
        if kind == "chat.completion":
            head["object"] = "chat.completion.chunk"
        want_usage = body.stream_options is not None and body.stream_options.include_usage
        if want_usage:
            head["usage"] = None

        def event(text: str | None, finish: str | None, first: bool = False) -> str:
            choices = [{"index": 0, **choice(text, finish, first), "finish_reason": finish}]
            return f"data: {json.dumps({**head, 'choices': choices}, ensure_ascii=False)}\n\n"

        async def events() -> AsyncIterator[str]:
            if kind == "chat.completion":
                yield event("", None, first=True)
            async with contextlib.aclosing(answer.text()) as pieces:
                async for piece in pieces:
                    yield event(piece, None)
            if answer.finish in ("error", "cancelled"):
                error = {"message": f"generation ended: {answer.finish}", "type": "server_error", "code": None}
                yield f"data: {json.dumps({'error': error})}\n\n"
                return
            yield event(None, answer.finish)
            if want_usage:
                yield f"data: {json.dumps({**head, 'choices': [], 'usage': answer.usage()})}\n\n"
            yield "data: [DONE]\n\n"

        return Stream(answer, events())

    async def _whole(self, request: Request, answer: Answer) -> str:
        """All of the text; a client that hangs up meanwhile ends the job."""

        async def collect() -> str:
            return "".join([piece async for piece in answer.text()])

        async def hang_up() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        tasks = [asyncio.create_task(collect()), asyncio.create_task(hang_up())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            answer.close()
        if tasks[0] not in done:
            raise ClientDisconnect
        text = tasks[0].result()
        if answer.finish in ("error", "cancelled"):
            raise Refused(500 if answer.finish == "error" else 503, f"generation ended: {answer.finish}")
        return text


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one). QuantkitError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise QuantkitError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


def server(api: Api) -> uvicorn.Server:
    config = uvicorn.Config(
        api.app(), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS, lifespan="on", server_header=False
    )
    return uvicorn.Server(config)


def serve(source: GGUFSource, engine: Engine, host: str, port: int, limits: Limits, key: str | None) -> None:
    """Serve until SIGINT or SIGTERM; then running requests have SHUTDOWN_SECONDS to end."""
    listener = bind(host, port)
    name = source.name.removesuffix(".gguf")
    api = Api(name, source.file.metadata, source.tokenizer(), engine, limits, key)
    say(
        f"{name}: http://{host}:{listener.getsockname()[1]}/v1 · {engine.n_slots} sequences of {engine.capacity} tokens"
        f"{'' if key else ' · no API key'} · Ctrl-C ends"
    )
    with listener, contextlib.suppress(KeyboardInterrupt):
        server(api).run(sockets=[listener])
