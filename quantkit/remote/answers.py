"""HTTP answers within bounds: however a server drips or goes on for ever, reading it ends.

httpx2's own timeout is for the gap between two reads: a byte every nine seconds never exceeds it.
"""

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import httpx2
from huggingface_hub import constants
from huggingface_hub.utils import get_session, hf_raise_for_status

STALL, LEAST = 30.0, 32 << 10  # a connection that brings fewer bytes in so many seconds counts as broken
ERROR_BYTES = 64 << 10  # of what a server says of an error


def opened(url: str, headers: Mapping[str, str]) -> "Opened":
    """A GET whose answer is read piece by piece; a context manager. Redirects are followed."""
    wait = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return Opened(get_session().stream("GET", url, headers=dict(headers), follow_redirects=True, timeout=wait))


class Opened:
    """A response whose head comes within STALL seconds, however slowly a server drips it; else ReadTimeout."""

    def __init__(self, stream: AbstractContextManager[httpx2.Response]) -> None:
        self._stream, self._lock, self._abandoned = stream, threading.Lock(), False
        self._head = Future[httpx2.Response]()

    def __enter__(self) -> httpx2.Response:
        threading.Thread(target=self._ask, daemon=True).start()
        try:
            return self._head.result(STALL)
        except TimeoutError:
            with self._lock:
                self._abandoned = not self._head.done()
            if self._abandoned:
                raise httpx2.ReadTimeout(f"no whole answer in {STALL:.0f} s") from None
            return self._head.result()

    def __exit__(self, *error: Any) -> None:
        self._stream.__exit__(*error)

    def _ask(self) -> None:
        try:
            response = self._stream.__enter__()
        except BaseException as error:
            self._head.set_exception(error)
            return
        with self._lock:
            if not self._abandoned:
                self._head.set_result(response)
                return
        self._stream.__exit__(None, None, None)


def paced(response: httpx2.Response) -> Iterator[bytes]:
    """The body as it comes; ReadTimeout if it is neither at its end nor LEAST bytes further after STALL seconds."""
    began, got = time.monotonic(), 0
    for piece in response.iter_raw():
        got += len(piece)
        now = time.monotonic()
        if got >= LEAST:
            began, got = now, 0
        elif now - began > STALL:
            raise httpx2.ReadTimeout(f"{got} bytes in {now - began:.0f} s")
        yield piece


def body(response: httpx2.Response, most: int) -> bytes:
    """At most so many bytes of a body as it was sent, and one more if there are more."""
    pieces, size = [], 0
    for piece in paced(response):
        pieces.append(piece)
        size += len(piece)
        if size > most:
            break
    return b"".join(pieces)[: most + 1]


def raise_for_status(response: httpx2.Response) -> None:
    """As huggingface_hub's, without reading more of the answer than a person would."""
    if response.status_code >= 400:
        dropped = ("content-encoding", "content-length", "transfer-encoding")
        said = httpx2.Response(
            response.status_code,
            headers={k: v for k, v in response.headers.items() if k.lower() not in dropped},
            content=body(response, ERROR_BYTES)[:ERROR_BYTES],
            request=response.request,
        )
        hf_raise_for_status(said)
