"""An OpenAI-compatible HTTP server over one file: chat completions, completions, models; streaming by SSE.

The event loop only parses and writes; lanes beside it render and tokenize, the scheduler's thread computes. Every
request ends its job when it ends itself, so a client that goes away costs one more step at most.
"""

import asyncio
import contextlib
import gc
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import model_file_name
from quantkit.models.tokenizer import tokenize
from quantkit.progress import say
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.serving.answers import Answer, ChatForm, CompletionForm, Events, Opening, reply
from quantkit.serving.connections import BACKLOG, guarded, most_connections, seldom
from quantkit.serving.desk import Desk, Settings
from quantkit.serving.extras import Extras
from quantkit.serving.fields import shown
from quantkit.serving.forced import Wanted
from quantkit.serving.gate import Gate
from quantkit.serving.jobs import Job
from quantkit.serving.lanes import SHORT, Lanes
from quantkit.serving.logits import TokenRules
from quantkit.serving.markers import Prompt
from quantkit.serving.metrics import ANSWERS
from quantkit.serving.pieces import Pieces
from quantkit.serving.prompts import chat_prompt
from quantkit.serving.refusals import Refused, failure
from quantkit.serving.renderer import Renderer, TooLong
from quantkit.serving.requests import MAX_CHOICES, MAX_TOLD, MAX_TOLD_NEW, Body, ChatBody, CompletionBody
from quantkit.serving.scheduler import QueueFull
from quantkit.serving.spoken import Spoken
from quantkit.serving.template import ChatTemplate
from quantkit.serving.tools import Arguments, arguments

SHUTDOWN_SECONDS = 5  # running requests get that long after Ctrl-C
COMPLETION_TOKENS = 16  # OpenAI's default of /v1/completions; a chat may fill the context


class Api(Desk):
    """The endpoints over one model."""

    def app(self) -> Starlette:
        """For an ASGI server; closes the scheduler when that ends."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            yield
            self.lanes.close()
            self.journal.close()
            await asyncio.to_thread(self.scheduler.close)

        routes = [
            Route("/v1/models", self.models),
            Route("/v1/models/{name:path}", self.models),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/v1/completions", self.completion, methods=["POST"]),
            Route("/health", lambda _: JSONResponse({"status": "ok"})),
            *Extras(self).routes(),
        ]
        guards = [Middleware(self.journal.around), *self.gate.cors(), Middleware(self.gate.before)]
        app = Starlette(routes=routes, lifespan=lifespan, middleware=guards)
        app.add_exception_handler(HTTPException, self._refused)
        app.add_exception_handler(ClientDisconnect, self._gone)
        app.add_exception_handler(Exception, self._broken)
        return app

    async def _refused(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        code, param = getattr(error, "code", None), getattr(error, "param", None)
        detail = error.detail if isinstance(error, Refused) else unknown(request, error)
        return failure(error.status_code, detail, code, error.headers, param)

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
            self.check_name(wanted)
            return JSONResponse(model)
        return JSONResponse({"object": "list", "data": [model]})

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
            echoes(body) and body.n_logprobs() is not None,
            body.penalties(),
        )
        for field, ids in (("stop_token_ids", rules.stop), ("logit_bias", rules.bias)):
            self.check_ids(field, ids)
        return rules

    def _check_length(self, prompt: list[int], n_tokens: int | None, n_least: int) -> None:
        new = n_tokens if n_tokens is not None else n_least
        if len(prompt) + (new if n_tokens == 0 else max(1, new)) > self.engine.capacity:
            asked = f" and {new} new ones" if new or n_tokens == 0 else " leave no room for new ones and"
            raise Refused(
                400,
                f"{len(prompt)} prompt tokens{asked} do not fit the context of {self.engine.capacity}",
                "context_length_exceeded",
            )

    def _start(self, request: Request, body: Body, made: "Ready", n_tokens: int | None) -> list[Answer]:
        """Jobs of a request, `n` for each prompt; all or none."""
        most = self._check_amount(body, made, n_tokens)
        for prompt in made.prompts:
            self._check_length(prompt, n_tokens, body.min_tokens)
            self.check_ids("prompt", prompt)
        answers = list[Answer]()
        request.scope[ANSWERS] = answers
        try:
            for prompt, opening in zip(made.prompts, made.openings, strict=True):
                for _ in range(body.n):
                    length = min(self.engine.capacity - len(prompt), most) if n_tokens is None else n_tokens
                    answers.append(self._submit(body, prompt, length, made, len(answers)))
                    answers[-1].opening, answers[-1].spoken = opening, Spoken(made.parted, made.tools)
        except QuantkitError as error:
            for answer in answers:
                answer.close()
            if isinstance(error, QueueFull):
                raise Refused(429, str(error), "queue_full", {"Retry-After": "1"}) from None
            raise Refused(503, str(error)) from None
        return answers

    def _check_amount(self, body: Body, made: "Ready", n_tokens: int | None) -> int:
        """The most new tokens of an answer whose log probabilities may be told; else no limit. Refused for more."""
        if len(made.prompts) * body.n > MAX_CHOICES:
            raise Refused(
                400, f"n: {len(made.prompts)} prompts x {body.n} are more than {MAX_CHOICES} answers", param="n"
            )
        told = sum(map(len, made.prompts)) * body.n * (1 + (made.rules.n_logprobs or 0)) if made.rules.of_prompt else 0
        if told > MAX_TOLD:
            raise Refused(
                400,
                f"logprobs: {told:,} log probabilities of the prompts are more than {MAX_TOLD:,}: send fewer at once",
                param="logprobs",
            )
        if made.rules.n_logprobs is None:
            return self.engine.capacity
        n_answers, each = len(made.prompts) * body.n, 1 + made.rules.n_logprobs
        if n_answers * each * (n_tokens or 0) > MAX_TOLD_NEW:
            raise Refused(
                400,
                f"logprobs: {n_answers} x {n_tokens} tokens with {each} log probabilities each are more than "
                f"{MAX_TOLD_NEW:,}: ask for fewer",
                param="logprobs",
            )
        return MAX_TOLD_NEW // (n_answers * each)

    def _submit(self, body: Body, prompt: list[int], n_tokens: int, made: "Ready", index: int) -> Answer:
        loop, events = asyncio.get_running_loop(), Events()

        def emit(token: int | None, why: str | None) -> None:
            self.post.put(loop, events, (token, why))

        constraint = self.grammars.constraint(made.matcher, made.thinking) if made.matcher else None
        job = Job(prompt, n_tokens, body.sampling(index), emit, made.rules, constraint=constraint, reuse=body.reuses())
        self.scheduler.submit(job)
        pieces = Pieces(self.tokenizer, body.stops(), body.min_tokens, body.skip_special_tokens and made.tools is None)
        return Answer(self.scheduler, job, events, pieces, index=index)

    def _matcher(self, body: Body, call: Wanted | None = None) -> Any:
        schema = body.schema_wanted()
        if call is not None:
            return self.grammars.of_calls(call)
        return None if schema is None else self.grammars.of(schema)

    async def chat(self, request: Request) -> Response:
        """/v1/chat/completions: messages through the file's template."""
        body, size = await self.parse(request, ChatBody)

        def prepare(renderer: Renderer) -> Ready:
            most = self.engine.capacity * self.markers.longest
            try:
                made = chat_prompt(ChatTemplate(self.metadata, renderer, most), self.markers, body)
            except TooLong as error:
                what = f"messages: {error}, and do not fit the context of {self.engine.capacity} tokens"
                raise Refused(400, what, "context_length_exceeded", param="messages") from None
            opening, parted = Opening(made.begun), body.parts_reasoning(made.tools, self.settings.parted)
            ready = Ready([self.ids(made.prompt)], [opening], self._rules(body), self._matcher(body, made.call))
            tools = arguments(body.tools) if made.tools else None
            return replace(ready, thinking=bool(made.begun), parted=parted, tools=tools)

        answers = self._start(request, body, await self.lanes.render(weight(body, size), prepare), body.n_tokens())
        return await reply(request, body, answers, ChatForm(), self.name)

    async def completion(self, request: Request) -> Response:
        """/v1/completions: texts or tokens as they are; control tokens in texts are control tokens."""
        body, size = await self.parse(request, CompletionBody)
        prompts = body.prompts()

        def prepare() -> Ready:
            ids = [self.ids(Prompt(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]
            rules = self._rules(body)
            openings = [Opening()] * len(ids)
            if body.echo:
                openings = [self._echo(*each, rules.of_prompt) for each in zip(prompts, ids, strict=True)]
            return Ready(ids, openings, rules, self._matcher(body))

        made, asked = await self.lanes.tokenize(weight(body, size), prepare), body.max_tokens_given()
        answers = self._start(request, body, made, body.n_tokens() if asked else COMPLETION_TOKENS)
        return await reply(request, body, answers, CompletionForm(), self.name)

    def _echo(self, prompt: str | list[int], ids: list[int], told: bool) -> Opening:
        self.check_ids("prompt", ids)
        text = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt, skip_special_tokens=False)
        if not told:
            return Opening(text)
        bos = self.tokenizer.id_to_token(self.engine.config.bos) or ""
        unshown = int(isinstance(prompt, str) and not (bos and prompt.startswith(bos)))
        pieces = Pieces(self.tokenizer)
        for token in ids[unshown:]:
            pieces.add(token)
        return Opening(text, pieces.starts, unshown)


def weight(body: Body, size: int) -> int:
    """Bytes of a request, by which it gets its lane: short ones do not wait for a schema to be made ready."""
    has_grammar = body.schema_wanted() is not None or (isinstance(body, ChatBody) and body.requires_call())
    return max(size, SHORT + 1) if has_grammar else size


def unknown(request: Request, error: HTTPException) -> str:
    """What is said of a path or a method that this server does not have."""
    if error.status_code != 404:
        return f"{request.method} {shown(request.url.path)}: {error.detail}"
    return f"{shown(request.url.path)}: no such path; this server has /v1/chat/completions, /v1/completions, /v1/models"


def echoes(body: Body) -> bool:
    """Whether the prompt is wanted in the answer."""
    return isinstance(body, CompletionBody) and body.echo


@dataclass(frozen=True)
class Ready:
    """A request in tokens. openings: with what the answers to each prompt begin. matcher: of the format that they have
    to keep, after reasoning if they begin with it (`thinking`). parted, tools: as `Spoken`."""

    prompts: list[list[int]]
    openings: list[Opening]
    rules: TokenRules
    matcher: Any = None
    thinking: bool = False
    parted: bool = False
    tools: Mapping[str, Arguments] | None = None


def bind(host: str, port: int) -> socket.socket:
    """A socket of that address (port 0: any free one), to be had before a model is loaded for minutes. It does not
    listen yet: clients are refused, and need not wait. QuantkitError if it cannot be had."""
    try:
        with contextlib.ExitStack() as unless_bound:
            made = unless_bound.enter_context(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET))
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if made.family == socket.AF_INET6:
                made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            made.bind((host, port))
            unless_bound.pop_all()
    except OSError as error:  # of the first line, too: a machine may have no IPv6
        raise QuantkitError(f"--host {host} --port {port}: {error.strerror}; choose another") from None
    return made


def listen(listener: socket.socket) -> None:
    """QuantkitError if somebody else has begun to meanwhile."""
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        raise QuantkitError(f"--port {listener.getsockname()[1]}: {error.strerror}; choose another") from None


class Server(uvicorn.Server):
    """uvicorn's, which at its end waits for nothing that is only made ready, and says what is alike seldom."""

    lanes: Lanes

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        with seldom("uvicorn.error", "asyncio", "quantkit.serving.scheduler"):
            await super().serve(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's."""
        self.lanes.close()
        await super().shutdown(sockets)


def server(api: Api) -> Server:
    """To be run on sockets that are bound already."""
    config = uvicorn.Config(
        api.app(),
        http=guarded(api.settings.connections or most_connections()),
        ws="none",
        backlog=BACKLOG,
        log_level="warning",
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
        lifespan="on",
        server_header=False,
    )
    made = Server(config)
    made.lanes = api.lanes
    return made


def serve(weights: GGUFWeights, engine: Engine, listener: socket.socket, settings: Settings, gate: Gate) -> None:
    """Serve on what `bind` gave until SIGINT or SIGTERM; then running requests have SHUTDOWN_SECONDS to end."""
    if isinstance(engine, GraphEngine):
        engine.prepare()
    name = model_file_name(weights.file.path)
    api = Api(name, weights.file.metadata, weights.tokenizer(), engine, settings, gate)
    try:
        ChatTemplate(api.metadata, api.lanes.renderers[0]).render([{"role": "user", "content": "?"}])
    except QuantkitError as error:
        say(f"{name}: {error}; chats will be refused")
    listen(listener)
    host, port = listener.getsockname()[:2]
    at = f"[{host}]:{port}" if listener.family == socket.AF_INET6 else f"{host}:{port}"
    say(
        f"{name}: http://{at}/v1 · {engine.n_slots} sequences of {engine.capacity} tokens"
        f"{'' if gate.key else ' · no API key'} · Ctrl-C ends"
    )
    gc.collect()
    gc.freeze()  # what is there stays: no collection need walk through it
    with listener, contextlib.suppress(KeyboardInterrupt):
        server(api).run(sockets=[listener])
