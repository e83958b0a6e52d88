"""What is asked beside answers: tokens of a text and back, what this server is, its sums, and a page to chat on."""

import base64
import hashlib
import json
import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from quantkit import __version__
from quantkit.serving.desk import Desk
from quantkit.serving.logprobs import shown
from quantkit.serving.markers import Prompt
from quantkit.serving.requests import Asked, Int
from quantkit.serving.template import special_tokens


class TextBody(Asked):
    """/tokenize, as llama-server has it (`content`, `add_special`, `with_pieces`) and vLLM (`prompt`,
    `add_special_tokens`)."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {"parse_special": (True,)}

    content: str | None = None
    prompt: str | None = None
    add_special: bool | None = None
    add_special_tokens: bool | None = None
    with_pieces: bool = False

    @model_validator(mode="after")
    def _one_text(self) -> "TextBody":
        if (self.content is None) == (self.prompt is None):
            raise ValueError("content is the text, which vLLM's clients call prompt: send one of them")
        return self

    def bos(self) -> bool:
        """Whether BOS is wanted: each of the two servers has its own default."""
        given = [value for value in (self.add_special, self.add_special_tokens) if value is not None]
        return given[0] if given else self.prompt is not None


class IdsBody(Asked):
    """/detokenize."""

    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    tokens: list[Int] = Field(default_factory=list)


class Extras:
    """Endpoints over what the desk has."""

    def __init__(self, desk: Desk):
        self.desk = desk

    def routes(self) -> list[Route]:
        """To be added to those that answer."""
        return [
            Route("/", self.page),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info),
            Route("/props", self.props),
            Route("/metrics", self.metrics),
        ]

    async def page(self, _: Request) -> Response:
        """A page to chat on. It holds nothing of the model; with a key, the page asks for that."""
        text, policy = page()
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}
        return HTMLResponse(text, headers=headers)

    async def tokenize(self, request: Request) -> Response:
        """A text's tokens. Control tokens in it are control tokens."""
        desk = self.desk
        body, size = await desk.parse(request, TextBody)
        text = body.content if body.content is not None else body.prompt or ""

        def made() -> bytes:
            bos = desk.engine.config.bos
            ids = desk.ids(Prompt(text))
            if not body.bos() and not text.startswith(desk.tokenizer.id_to_token(bos) or "\0"):
                ids = ids[1:]
            pieces = [{"id": token, "piece": shown(desk.tokenizer, token)[0]} for token in ids]
            told = {"tokens": pieces if body.with_pieces else ids}
            return json.dumps(told | {"count": len(ids), "max_model_len": desk.engine.capacity}).encode()

        return Response(await desk.lanes.tokenize(size, made), media_type="application/json")

    async def detokenize(self, request: Request) -> Response:
        """A text of tokens, under llama-server's name of it and vLLM's."""
        desk = self.desk
        body, size = await desk.parse(request, IdsBody)
        desk.check_ids("tokens", body.tokens)
        text = await desk.lanes.tokenize(size, lambda: desk.tokenizer.decode(body.tokens, skip_special_tokens=False))
        return JSONResponse({"content": text, "prompt": text})

    async def tokenizer_info(self, request: Request) -> Response:
        """Special tokens and chat template, as vLLM tells them to lm-eval."""
        self.desk.gate.check_key(request)
        return JSONResponse(special_tokens(self.desk.metadata) | {"chat_template": self._template()})

    async def props(self, request: Request) -> Response:
        """llama-server's: what a client may want to know before it asks."""
        desk = self.desk
        desk.gate.check_key(request)
        tokens = special_tokens(desk.metadata)
        told = {
            "default_generation_settings": {"n_ctx": desk.engine.capacity},
            "total_slots": desk.engine.n_slots,
            "model_alias": desk.name,
            "chat_template": self._template() or "",
            "bos_token": tokens.get("bos_token", ""),
            "eos_token": tokens.get("eos_token", ""),
            "modalities": {"vision": False, "audio": False},
            "build_info": f"quantkit {__version__}",
        }
        return JSONResponse(told)

    async def metrics(self, request: Request) -> Response:
        """For Prometheus."""
        self.desk.gate.check_key(request)
        text = self.desk.journal.text(self.desk.scheduler)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    def _template(self) -> str | None:
        text = self.desk.metadata.get("tokenizer.chat_template")
        return text if isinstance(text, str) else None


@cache
def page() -> tuple[str, str]:
    """The chat page, and the policy by which a browser runs its one script and loads nothing from elsewhere."""
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    parts = {
        kind: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        for kind in ("script", "style")
        if (found := re.search(rf"<{kind}>(.*?)</{kind}>", text, re.DOTALL))
    }
    policy = (
        f"default-src 'none'; connect-src 'self'; script-src 'sha256-{parts['script']}'; "
        f"style-src 'sha256-{parts['style']}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy
