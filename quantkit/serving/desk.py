"""What every endpoint needs: the model, who may ask, reading a request, its text in tokens."""

import asyncio
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from tokenizers import Tokenizer

from quantkit.runtime.generate import Engine
from quantkit.serving.gate import Gate
from quantkit.serving.grammar import Grammars
from quantkit.serving.lanes import SHORT, Lanes
from quantkit.serving.markers import Markers, Prompt, tokenize_prompt
from quantkit.serving.metrics import Journal
from quantkit.serving.post import Post
from quantkit.serving.refusals import Refused
from quantkit.serving.renderer import TooLong
from quantkit.serving.requests import Parsed, parse
from quantkit.serving.scheduler import Scheduler

BODY_SECONDS = 30  # a client that sends its request slower is cut off


@dataclass(frozen=True)
class Settings:
    """max_body: bytes of a request; queue: requests that may wait for a slot; connections: open at once, default half
    of the files that the process may open. aliases: names of the model besides its own, the first of which clients are
    told. parted: reasoning is a field of its own in chats, unless a request says otherwise."""

    max_body: int = 4 << 20
    queue: int = 256
    connections: int | None = None
    aliases: tuple[str, ...] = ()
    parted: bool = False


class Desk:
    """One model. metadata: of its GGUF. gate: whom it lets in."""

    def __init__(
        self,
        name: str,
        metadata: Mapping[str, Any],
        tokenizer: Tokenizer,
        engine: Engine,
        settings: Settings,
        gate: Gate,
    ):
        self.name, self.names = (settings.aliases or (name,))[0], {"", name, *settings.aliases}
        self.metadata, self.tokenizer, self.engine = metadata, tokenizer, engine
        self.settings, self.gate, self.created = settings, gate, int(time.time())
        self.markers = Markers(metadata, tokenizer)
        self.grammars = Grammars(tokenizer, engine.config.n_vocab, engine.config.ends)
        self.post, self.lanes, self.journal = Post(), Lanes(settings.queue), Journal()
        self.scheduler = Scheduler(engine, settings.queue, self.post.send, self.journal.add)
        self.long_body = asyncio.Lock()

    def check_name(self, wanted: str) -> None:
        """Refused for another model's."""
        if wanted not in self.names:
            raise Refused(404, f"model {wanted!r} does not exist; this server has {self.name!r}", "model_not_found")

    async def read(self, request: Request) -> bytes:
        """The body. Only JSON is read: a form in some web page must not be able to start work here."""
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise Refused(415, "Content-Type must be application/json")
        limit, body = self.settings.max_body, bytearray()
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

    async def parse(self, request: Request, kind: type[Parsed]) -> tuple[Parsed, int]:
        """The body and its size in bytes."""
        self.gate.check_key(request)
        data = await self.read(request)
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
        self.check_name(body.model)
        return body, len(data)

    def check_ids(self, field: str, ids: Iterable[int]) -> None:
        """Refused for what is no token."""
        n_vocab = self.engine.config.n_vocab
        if not all(0 <= token < n_vocab for token in ids):
            raise Refused(400, f"{field}: token ids must be 0 to {n_vocab - 1}", param=field)

    def ids(self, prompt: Prompt) -> list[int]:
        """With BOS. Refused for more than fits the context."""
        try:
            return tokenize_prompt(self.markers, prompt, self.engine.config.bos, self.engine.capacity)
        except TooLong as error:
            raise Refused(400, str(error), "context_length_exceeded") from None
