"""Chat templates are rendered in a process beside this one (`serving/sandbox.py`), which is limited and can be ended:
no template hangs who asks, fills its memory, or ends it."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

from quantkit.errors import QuantkitError
from quantkit.serving import sandbox

SECONDS = 1.0  # for one rendering; an honest one takes some milliseconds
START_SECONDS = 60.0  # for the process to start
MOST = 16 << 20  # characters of a rendered text, where no context says less
LONGEST = 1 << 20  # characters of a template
INHERITED = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "TZ", "LANG", "LC_ALL")  # no keys, no tokens


class TooLong(QuantkitError):
    """A text that cannot fit the context."""


class Renderer:
    """One process that renders; started by the first call of `start` or `ask`, and anew whenever it had to be ended.
    Calls from several threads wait for each other."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen | None = None
        self.connection: socket.socket | None = None
        self.ready = self.closed = False

    def start(self) -> None:
        """Start the process, without waiting until it is ready. QuantkitError if the system gives none."""
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self.process = subprocess.Popen(
                    [sys.executable, "-P", sandbox.__file__],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    env={name: os.environ[name] for name in INHERITED if name in os.environ},
                )
        except OSError as error:
            raise QuantkitError(f"the process that renders chat templates does not start ({error.strerror})") from None
        self.connection, self.ready = ours, False

    def close(self) -> None:
        """End the process, whatever it does; a call under way fails."""
        self.closed = True
        if self.process:
            self.process.kill()

    def names(self, template: str) -> set[str]:
        """Names that a template's code mentions, but for attributes. QuantkitError for what is no template."""
        return set(self._ask(template)["names"])

    def render(self, template: str, variables: Mapping[str, Any], most: int = MOST) -> str:
        """The text. QuantkitError with what the template says, or what it exceeds; TooLong beyond `most` characters."""
        answer = self._ask(template, variables=variables, most=most)
        if "long" in answer:
            raise TooLong(f"the text of these messages is longer than {most:,} characters")
        try:
            answer["text"].encode()
        except UnicodeEncodeError:
            raise QuantkitError("the file's chat template fails: what it makes is not Unicode text") from None
        return answer["text"]

    def _ask(self, template: str, **rest: Any) -> dict[str, Any]:
        if len(template) > LONGEST:
            raise QuantkitError(f"the file's chat template fails: it is longer than {LONGEST:,} characters")
        with self.lock:
            try:
                answer = self._answer({"template": template, **rest})
            except (OSError, EOFError) as error:
                self._end()
                if not self.closed:
                    self.start()  # ready when the next one asks
                why = f"it takes more than {SECONDS:g} s" if isinstance(error, TimeoutError) else "its renderer ended"
                raise QuantkitError(f"the file's chat template fails: {why}") from None
            except BaseException:
                self._end()  # its answer must not be taken for the next one's
                raise
        if "error" in answer:
            raise QuantkitError(f"the file's chat template fails: {answer['error']}")
        return answer

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if self.closed:
            raise EOFError
        if self.connection is None:
            self.start()
        assert self.connection
        if not self.ready:
            self.connection.settimeout(START_SECONDS)
            try:
                self.ready = sandbox.receive(self.connection)["ready"]
            except (OSError, EOFError):
                self._end()
                raise QuantkitError("the process that renders chat templates does not start") from None
        self.connection.settimeout(SECONDS)
        sandbox.send(self.connection, request)
        return sandbox.receive(self.connection)

    def _end(self) -> None:
        if self.process:
            self.process.kill()
            self.process.wait()
        if self.connection:
            self.connection.close()
        self.process = self.connection = None


@cache
def shared() -> Renderer:
    """The one of this process, for who has none of its own."""
    return Renderer()
