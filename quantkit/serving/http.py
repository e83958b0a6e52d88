"""An OpenAI-compatible HTTP server over one file: chat completions, completions, models; streaming by SSE.

The event loop only parses and writes; lanes beside it render and tokenize, the scheduler's thread computes. Every
request ends its job when it ends itself, so a client that goes away costs one more step at most.
"""

import asyncio
import contextlib
import gc
import socket
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from tokenizers import Tokenizer

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import model_file_name
from quantkit.models.tokenizer import tokenize
from quantkit.progress import say
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.serving.answers import Answer, ChatForm, CompletionForm, Events, reply
from quantkit.serving.chat import tokenize_prompt
from quantkit.serving.connections import BACKLOG, guarded, log_seldom, most_connections
from quantkit.serving.gate import Gate
from quantkit.serving.lanes import SHORT, Lanes
from quantkit.serving.logits import TokenRules
from quantkit.serving.markers import Markers, Prompt
from quantkit.serving.pieces import Pieces
from quantkit.serving.prompts import chat_prompt
from quantkit.serving.refusals import Refused, failure
from quantkit.serving.renderer import Renderer, TooLong
from quantkit.serving.requests import MAX_CHOICES, Body, ChatBody, CompletionBody, Parsed, parse
from quantkit.serving.scheduler import Job, QueueFull, Scheduler
from quantkit.serving.template import ChatTemplate

BODY_SECONDS = 30  # a client that sends its request slower is cut off
SHUTDOWN_SECONDS = 5  # running requests get that long after Ctrl-C
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context


@dataclass(frozen=True)
class Limits:
    """max_body: bytes of a request; queue: requests that may wait for a slot; connections: open at once, default half
    of the files that the process may open."""

    max_body: int = 4 << 20
    queue: int = 256
    connections: int | None = None


class Api:
    """The endpoints over one model. metadata: of its GGUF. gate: whom it lets in."""

    def __init__(
        self,
        name: str,
        metadata: Mapping[str, Any],
        tokenizer: Tokenizer,
        engine: Engine,
        limits: Limits,
        gate: Gate,
    ):
        self.name, self.metadata, self.tokenizer, self.engine = name, metadata, tokenizer, engine
        self.limits, self.gate, self.created = limits, gate, int(time.time())
        self.markers = Markers(metadata, tokenizer)
        self.scheduler, self.lanes = Scheduler(engine, limits.queue), Lanes(limits.queue)
        self.long_body = asyncio.Lock()

    def app(self) -> Starlette:
        """For an ASGI server; closes the scheduler when that ends."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self.lanes.close()
            await asyncio.to_thread(self.scheduler.close)

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
        ]
        app = Starlette(routes=routes, lifespan=lifespan, middleware=[Middleware(self.gate.before)])
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(ClientDisconnect, self._gone)
        app.add_exception_handler(Exception, self._broken)
        return app

    async def _refused(self, _: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        return failure(error.status_code, error.detail, code, error.headers, param)

    async def _gone(self, *_: object) -> Response:
        return failure(499, "the client closed the connection")

    async def _broken(self, _: Request, error: Exception) -> Response:
        return failure(500, f"internal error: {type(error).__name__}")

    async def models(self, request: Request) -> Response:
        """The one model, in a list or by its name."""
        self.gate.check_key(request)
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

    async def _parse(self, request: Request, kind: type[Parsed]) -> tuple[Parsed, int]:
        """The body and its size in bytes."""
        self.gate.check_key(request)
        data = await self._read(request)
        if len(data) <= SHORT:
            body = parse(data, kind, self.engine.capacity)
        else:
            async with self.long_body:
                self.lanes.check_open()
                begin = time.monotonic()
                try:
                    body = parse(data, kind, self.engine.capacity)
                finally:
                    await asyncio.sleep(time.monotonic() - begin)  # as long again, others have their turn
        self._check_name(body.model)
        return body, len(data)

    def _rules(self, body: Body) -> TokenRules:
        """What the body asks of tokens. A bad word is banned as it stands and after a space, as vLLM does."""
        words = {spelled for word in body.bad_words if word for spelled in (word, f" {word.lstrip()}")}
        banned = {tuple(tokenize(self.tokenizer, word)) for word in words}
        rules = TokenRules(
            frozenset(body.stop_token_ids),
            body.ignore_eos,
            body.min_tokens,
            body.biases(),
            tuple(sorted(ids for ids in banned if ids)),
            body.n_logprobs(),
        )
        for field, ids in (("stop_token_ids", rules.stop), ("logit_bias", rules.bias)):
            self._check_ids(field, ids)
        return rules

    def _check_ids(self, field: str, ids: Iterable[int]) -> None:
        n_vocab = self.engine.config.n_vocab
        if not all(0 <= token < n_vocab for token in ids):
            raise Refused(400, f"{field}: token ids must be 0 to {n_vocab - 1}", param=field)

    def _ids(self, prompt: Prompt) -> list[int]:
        try:
            return tokenize_prompt(self.markers, prompt, self.engine.config.bos, self.engine.capacity)
        except TooLong as error:
            raise Refused(400, str(error), "context_length_exceeded") from None

    def _check_length(self, prompt: list[int], n_tokens: int | None, n_least: int) -> None:
        capacity = self.engine.capacity
        if len(prompt) + (n_tokens or n_least or 1) > capacity:
            asked = f" and {n_tokens or n_least} new ones" if n_tokens or n_least else " leave no room for new ones and"
            raise Refused(
                400,
                f"{len(prompt)} prompt tokens{asked} do not fit the context of {capacity}",
                "context_length_exceeded",
            )

    def _start(self, body: Body, made: "Ready", n_tokens: int | None) -> list[Answer]:
        """Jobs of a request, `n` for each prompt; all or none."""
        if len(made.prompts) * body.n > MAX_CHOICES:
            raise Refused(
                400, f"n: {len(made.prompts)} prompts x {body.n} are more than {MAX_CHOICES} answers", param="n"
            )
        for prompt in made.prompts:
            self._check_length(prompt, n_tokens, body.min_tokens)
            self._check_ids("prompt", prompt)
        answers = list[Answer]()
        try:
            for prompt, opening in zip(made.prompts, made.openings, strict=True):
                for _ in range(body.n):
                    length = n_tokens or self.engine.capacity - len(prompt)
                    answers.append(self._submit(body, prompt, length, made.rules, len(answers)))
                    answers[-1].opening = opening
        except QuantkitError as error:
            for answer in answers:
                answer.close()
            if isinstance(error, QueueFull):
                raise Refused(429, str(error), "queue_full", {"Retry-After": "1"}) from None
            raise Refused(503, str(error)) from None
        return answers

    def _submit(self, body: Body, prompt: list[int], n_tokens: int, rules: TokenRules, index: int) -> Answer:
        loop, events = asyncio.get_running_loop(), Events()

        def emit(token: int | None, why: str | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
                loop.call_soon_threadsafe(events.put_nowait, (token, why))

        job = Job(prompt, n_tokens, body.sampling(index), emit, rules)
        self.scheduler.submit(job)
        pieces = Pieces(self.tokenizer, body.stops(), body.min_tokens, body.skip_special_tokens)
        return Answer(self.scheduler, job, events, pieces, index=index)

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions: messages through the file's template."""
        body, size = await self._parse(request, ChatBody)

        def prepare(renderer: Renderer) -> Ready:
            most = self.engine.capacity * self.markers.longest
            try:
                prompt, begun = chat_prompt(ChatTemplate(self.metadata, renderer, most), self.markers, body)
            except TooLong as error:
                what = f"messages: {error}, and do not fit the context of {self.engine.capacity} tokens"
                raise Refused(400, what, "context_length_exceeded", param="messages") from None
            return Ready([self._ids(prompt)], [begun], self._rules(body))

        answers = self._start(body, await self.lanes.render(size, prepare), body.n_tokens())
        return await reply(request, body, answers, ChatForm(), self.name)

    async def completion(self, request: Request) -> Response:
        """/v1/completions: texts or tokens as they are; control tokens in texts are control tokens."""
        body, size = await self._parse(request, CompletionBody)
        prompts = body.prompts()

        def prepare() -> Ready:
            ids = [self._ids(Prompt(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]
            return Ready(ids, [self._echo(prompt) if body.echo else "" for prompt in prompts], self._rules(body))

        made, asked = await self.lanes.tokenize(size, prepare), body.max_tokens_given()
        answers = self._start(body, made, body.n_tokens() if asked else COMPLETION_TOKENS)
        return await reply(request, body, answers, CompletionForm(), self.name)

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        self._check_ids("prompt", prompt)
        return self.tokenizer.decode(prompt, skip_special_tokens=False)


@dataclass(frozen=True)
class Ready:
    """A request in tokens. openings: with what the answers to each prompt begin."""

    prompts: list[list[int]]
    openings: list[str]
    rules: TokenRules


def bind(host: str, port: int) -> socket.socket:
    """A listening socket (port 0: any free one). QuantkitError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        raise QuantkitError(f"--host {host} --port {port}: {error.strerror}; choose another") from None


class Server(uvicorn.Server):
    """uvicorn's, which at its end waits for nothing that is only made ready."""

    lanes: Lanes

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self.lanes.close()
        await super().shutdown(sockets)


def server(api: Api) -> Server:
    """To be run on sockets that are bound already."""
    config = uvicorn.Config(
        api.app(),
        http=guarded(api.limits.connections or most_connections()),
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="on",
        server_header=False,
    )
    log_seldom("uvicorn.error", "asyncio")
    made = Server(config)
    made.lanes = api.lanes
    return made


def serve(weights: GGUFWeights, engine: Engine, host: str, port: int, limits: Limits, gate: Gate) -> None:
    """Serve until SIGINT or SIGTERM; then running requests have SHUTDOWN_SECONDS to end."""
    listener = bind(host, port)
    name = model_file_name(weights.file.path)
    api = Api(name, weights.file.metadata, weights.tokenizer(), engine, limits, gate)
    try:
        ChatTemplate(api.metadata, api.lanes.renderers[0]).render([{"role": "user", "content": "?"}])
    except QuantkitError as error:
        say(f"{name}: {error}; chats will be refused")
    say(
        f"{name}: http://{host}:{listener.getsockname()[1]}/v1 · {engine.n_slots} sequences of {engine.capacity} tokens"
        f"{'' if gate.key else ' · no API key'} · Ctrl-C ends"
    )
    gc.collect()
    gc.freeze()  # what is there stays: no collection need walk through it
    with listener, contextlib.suppress(KeyboardInterrupt):
        server(api).run(sockets=[listener])
