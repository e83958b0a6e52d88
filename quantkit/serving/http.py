"""An OpenAI-compatible HTTP server over one file: chat completions, completions, models; streaming by SSE.

The event loop only parses, tokenizes (in a worker thread) and writes; the scheduler's thread computes. Every request
ends its job when it ends itself, so a client that goes away costs one more step at most.
"""

import asyncio
import contextlib
import hmac
import socket
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import model_file_name
from quantkit.progress import say
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.serving.answers import Answer, ChatForm, CompletionForm, Events, reply
from quantkit.serving.chat import tokenize_prompt
from quantkit.serving.pieces import Pieces
from quantkit.serving.requests import Body, ChatBody, CompletionBody, Refused, failure
from quantkit.serving.scheduler import Job, QueueFull, Scheduler
from quantkit.serving.template import apply_template, opening

BODY_SECONDS = 30  # a client that sends its request slower is cut off
SHUTDOWN_SECONDS = 5  # running requests get that long after Ctrl-C
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context

Parsed = TypeVar("Parsed", bound=Body)


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request; queue: requests that may wait for a slot."""

    max_body: int = 4 << 20
    queue: int = 256


class Api:
    """The endpoints over one model. metadata: of its GGUF. key: what clients must send as their API key, if any."""

    def __init__(
        self,
        name: str,
        metadata: Mapping[str, Any],
        tokenizer: Tokenizer,
        engine: Engine,
        limits: Limits,
        key: str | None,
    ):
        self.name, self.metadata, self.tokenizer, self.engine = name, metadata, tokenizer, engine
        self.limits, self.key, self.created = limits, key, int(time.time())
        self.scheduler = Scheduler(engine, limits.queue)

    def app(self) -> Starlette:
        """For an ASGI server; closes the scheduler when that ends."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            await asyncio.to_thread(self.scheduler.close)

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
        ]
        app = Starlette(routes=routes, lifespan=lifespan)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(ClientDisconnect, self._gone)
        app.add_exception_handler(Exception, self._broken)
        return app

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return failure(error.status_code, error.detail, getattr(error, "code", None), error.headers)

    async def _gone(self, *_: object) -> Response:
        return failure(499, "the client closed the connection")

    async def _broken(self, _: Request, error: Exception) -> Response:
        return failure(500, f"internal error: {type(error).__name__}")

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "").removeprefix("Bearer ").strip()
        if self.key and not hmac.compare_digest(given.encode(), self.key.encode()):
            raise Refused(401, "wrong or missing API key", "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name."""
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
        loop, events = asyncio.get_running_loop(), Events()

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
        """/v1/chat/completions: messages through the file's template."""
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
            return tokenize_prompt(self.tokenizer, text, self.engine.config.bos), opening(text)

        try:
            prompt, begun = await asyncio.to_thread(prepare)
        except QuantkitError as error:
            raise Refused(400, f"messages: {error}") from None
        answer = self._start(body, prompt, body.max_completion_tokens or body.max_tokens, begun)
        return await reply(request, body, answer, ChatForm(), self.name)

    async def completion(self, request: Request) -> Response:
        """/v1/completions: text or tokens as they are."""
        body = await self._parse(request, CompletionBody)
        texts = [body.prompt] if isinstance(body.prompt, str) else [t for t in body.prompt if isinstance(t, str)]
        if texts:
            prompt = await asyncio.to_thread(tokenize_prompt, self.tokenizer, texts[0], self.engine.config.bos)
        else:
            prompt = [token for token in body.prompt if isinstance(token, int)]
        answer = self._start(body, prompt, body.max_tokens or COMPLETION_TOKENS)
        return await reply(request, body, answer, CompletionForm(), self.name)


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one). QuantkitError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise QuantkitError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


def server(api: Api) -> uvicorn.Server:
    """To be run on sockets that are bound already."""
    config = uvicorn.Config(
        api.app(), log_level="warning", timeout_graceful_shutdown=SHUTDOWN_SECONDS, lifespan="on", server_header=False
    )
    return uvicorn.Server(config)


def serve(weights: GGUFWeights, engine: Engine, host: str, port: int, limits: Limits, key: str | None) -> None:
    """Serve until SIGINT or SIGTERM; then running requests have SHUTDOWN_SECONDS to end."""
    listener = bind(host, port)
    name = model_file_name(weights.file.path)
    api = Api(name, weights.file.metadata, weights.tokenizer(), engine, limits, key)
    say(
        f"{name}: http://{host}:{listener.getsockname()[1]}/v1 · {engine.n_slots} sequences of {engine.capacity} tokens"
        f"{'' if key else ' · no API key'} · Ctrl-C ends"
    )
    with listener, contextlib.suppress(KeyboardInterrupt):
        server(api).run(sockets=[listener])
