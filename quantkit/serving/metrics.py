"""What was asked and answered: a line of the log for each request, and sums in Prometheus's text format.

Neither holds anything that a client wrote. Lines go through a thread of their own and are dropped where nobody reads
them: a full pipe stops no answer.
"""

import contextlib
import queue
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quantkit.progress import say
from quantkit.runtime.generate import Engine
from quantkit.serving.jobs import Job

ANSWERS = "quantkit.answers"
"""Where a request's scope has its answers."""
PATHS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completion",
    **{path: path[1:] for path in ("/tokenize", "/detokenize", "/props", "/metrics", "/health", "/v1/models")},
}
SILENT = ("health", "metrics")  # asked every few seconds: counted, not logged
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)  # seconds
WAITING_LINES = 256
LEFT = 499  # a status: the client went before it had an answer
REFUSED_EVERY = 1.0  # seconds between two lines of refused requests


class Answered(Protocol):
    """An answer. first: when its first token came, in time.monotonic's seconds."""

    job: Job
    first: float | None
    finish: str


def usage(answers: Sequence[Answered]) -> dict[str, Any]:
    """Tokens of the prompts (each counted once, however many answers it got), of the answers so far, and both; of the
    prompts those that a slot held already: of several answers, as of the one that found most."""
    prompts = {id(answer.job.prompt): len(answer.job.prompt) for answer in answers}
    cached = dict.fromkeys(prompts, 0)
    for answer in answers:
        cached[id(answer.job.prompt)] = max(cached[id(answer.job.prompt)], answer.job.reused)
    old, new = sum(prompts.values()), sum(answer.job.n_made for answer in answers)
    details = {"cached_tokens": sum(cached.values())}
    return {
        "prompt_tokens": old,
        "completion_tokens": new,
        "total_tokens": old + new,
        "prompt_tokens_details": details,
    }


class Busy(Protocol):
    """A scheduler."""

    engine: Engine
    running: list[Job]
    waiting: deque[Job]


class Times:
    """A histogram of seconds."""

    def __init__(self) -> None:
        self.counts, self.sum, self.n = [0] * len(BUCKETS), 0.0, 0

    def add(self, seconds: float) -> None:
        """One more."""
        self.sum, self.n = self.sum + seconds, self.n + 1
        for i, most in enumerate(BUCKETS):
            self.counts[i] += seconds <= most

    def lines(self, name: str, about: str) -> list[str]:
        """In Prometheus's format."""
        out = [f"# HELP {name} {about}", f"# TYPE {name} histogram"]
        out += [f'{name}_bucket{{le="{most:g}"}} {n}' for most, n in zip(BUCKETS, self.counts, strict=True)]
        return [*out, f'{name}_bucket{{le="+Inf"}} {self.n}', f"{name}_sum {self.sum:.6f}", f"{name}_count {self.n}"]


class Journal:
    """Of one server. All but `_write` runs in its event loop."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.first, self.whole = Times(), Times()
        self.refused, self.told = 0, 0.0  # refused requests without a line, and when one last had one
        self.lock = threading.Lock()
        self.lines: queue.Queue[str | None] = queue.Queue(WAITING_LINES)
        self.thread: threading.Thread | None = None

    def around(self, app: ASGIApp) -> ASGIApp:
        """The app, watched."""

        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return await app(scope, receive, send)
            status, begin = LEFT, time.monotonic()

            async def sent(message: Message) -> None:
                nonlocal status
                if message["type"] == "http.response.start":
                    status = message["status"]
                await send(message)

            try:
                await app(scope, receive, sent)
            except Exception:  # whoever is further out answers
                status = 500 if status == LEFT else status
                raise
            finally:
                self.note(PATHS.get(scope["path"], "other"), status, begin, scope.get(ANSWERS, ()))

        return watched

    def note(self, path: str, status: int, begin: float, answers: Sequence[Answered]) -> None:
        """A request that came at `begin`, in time.monotonic's seconds, and has ended."""
        seconds = time.monotonic() - begin
        self.requests[path, status] += 1
        if not answers:
            return self._refused(path, status) if status >= 400 else self._line(path, status, seconds)
        counts = usage(answers)
        held = counts["prompt_tokens_details"]["cached_tokens"]
        self.tokens.update({kind: counts[f"{kind}_tokens"] for kind in ("prompt", "completion")} | {"cached": held})
        self.whole.add(seconds)
        begun = [answer.first - begin for answer in answers if answer.first]
        parts = [f"{counts['prompt_tokens']:,} + {counts['completion_tokens']:,} tokens"]
        if held:
            parts.append(f"{held:,} held already")
        if begun:
            self.first.add(min(begun))
            parts.append(f"first after {min(begun):.2f} s")
            left = seconds - min(begun)
            if counts["completion_tokens"] > len(answers) and left > 0:
                parts.append(f"{(counts['completion_tokens'] - len(answers)) / left:,.1f} tok/s")
        ends = ", ".join(sorted({answer.finish or "left" for answer in answers}))
        self._line(path, status, seconds, *parts, ends)

    def _refused(self, path: str, status: int) -> None:
        now = time.monotonic()
        if now - self.told < REFUSED_EVERY:
            self.refused += 1
            return
        more = [f"{self.refused:,} more were refused before"] if self.refused else []
        self.refused, self.told = 0, now
        self._line(path, status, 0.0, *more)

    def _line(self, path: str, status: int, seconds: float, *more: str) -> None:
        if path in SILENT:
            return
        self.add(" · ".join((f"{time.strftime('%H:%M:%S')} {path} {status}", *more, f"{seconds:.2f} s")))

    def add(self, text: str) -> None:
        """A line; from any thread. Nobody waits until it is written: what finds no room is dropped."""
        with self.lock:
            if self.thread is None:
                self.thread = threading.Thread(target=self._write, name="quantkit-journal", daemon=True)
                self.thread.start()
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(text)

    def _write(self) -> None:
        while (line := self.lines.get()) is not None:
            say(line, plain=True)

    def close(self) -> None:
        """End the thread; does not wait for who reads the lines."""
        if self.thread is not None:
            with contextlib.suppress(queue.Full):
                self.lines.put_nowait(None)

    def text(self, scheduler: Busy) -> str:
        """For /metrics."""
        out = []
        gauges = {
            "sequences_running": (len(scheduler.running), "Sequences that have a slot."),
            "sequences_waiting": (len(scheduler.waiting), "Sequences that wait for one."),
            "slots": (scheduler.engine.n_slots, "Sequences computed at once."),
            "context_tokens": (scheduler.engine.capacity, "Tokens of a sequence."),
        }
        for name, (value, about) in gauges.items():
            out += [f"# HELP quantkit_{name} {about}", f"# TYPE quantkit_{name} gauge", f"quantkit_{name} {value}"]
        kinds = {
            "prompt": "Tokens of prompts.",
            "cached": "Those of them that a slot held already.",
            "completion": "Tokens generated.",
        }
        for kind, about in kinds.items():
            name = f"quantkit_{kind}_tokens_total"
            out += [f"# HELP {name} {about}", f"# TYPE {name} counter", f"{name} {self.tokens[kind]}"]
        name = "quantkit_requests_total"
        out += [f"# HELP {name} Requests by endpoint and status.", f"# TYPE {name} counter"]
        out += [f'{name}{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(self.requests.items())]
        out += self.first.lines("quantkit_first_token_seconds", "From a request to its first token.")
        out += self.whole.lines("quantkit_request_seconds", "From a request to the end of its answers.")
        return "\n".join([*out, ""])
