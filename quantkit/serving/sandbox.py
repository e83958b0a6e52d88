"""The program that renders chat templates, as a process of its own: templates come from strangers, and a process can be
limited in memory, and ended (`serving/renderer.py`). It imports nothing of quantkit, so that it starts at once.

Templates are rendered as Hugging Face's renderer does, in jinja2's sandbox. What they may rely on, with and without
transformers: blocks are trimmed; `break`, `continue`, `{% generation %}`; `raise_exception`, `strftime_now`; a `tojson`
that escapes nothing and keeps the order of keys.

Each request and each answer on the socket (descriptor 0) is JSON after its length in 8 bytes. Requests: {"template",
"most", "variables"}: {"text"}, or {"long": true} beyond `most` characters. {"template"}: {"names"} that its code
mentions. What fails: {"error"}.
"""

import json
import os
import resource
import signal
import socket
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

MEMORY = 256 << 20  # bytes beyond what the program itself takes
SECONDS = 2  # of CPU time for one request; the other side has less patience, but may be gone
OPEN_FILES = 16
HEADER = 8  # bytes that say how long a message is


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant wrote, for training; to a prompt it is what stands in it."""

    tags = {"generation"}  # noqa: RUF012  (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@lru_cache(16)
def _compiled(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(text)


def render(template: str, variables: Mapping[str, Any], most: int) -> str | None:
    """The text, None beyond `most` characters."""
    parts, length = [], 0
    for part in _compiled(template).generate(variables):
        parts.append(part)
        length += len(part)
        if length > most:
            return None
    return "".join(parts)


def names(template: str) -> list[str]:
    """Names that a template's code mentions, but for attributes."""
    found, after_dot = set(), False
    for _, kind, value in jinja2.Environment().lex(template):
        if kind == "name" and not after_dot:
            found.add(value)
        after_dot = kind == "operator" and value == "."
    return sorted(found)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """To one request."""
    try:
        if "variables" not in request:
            return {"names": names(request["template"])}
        text = render(request["template"], request["variables"], request["most"])
        return {"long": True} if text is None else {"text": text}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY >> 20} MiB"}
    except jinja2.TemplateError as error:
        return {"error": str(error)}
    except Exception as error:  # whatever a stranger's template does
        return {"error": f"{error} ({type(error).__name__})"}


def send(connection: socket.socket, message: Mapping[str, Any]) -> None:
    """One message."""
    data = json.dumps(message).encode()
    connection.sendall(len(data).to_bytes(HEADER, "big") + data)


def receive(connection: socket.socket) -> dict[str, Any]:
    """One message. EOFError if the other side is gone."""
    return json.loads(_receive(connection, int.from_bytes(_receive(connection, HEADER), "big")))


def _receive(connection: socket.socket, n: int) -> bytes:
    data = bytearray()
    while len(data) < n:
        if not (part := connection.recv(min(n - len(data), 1 << 20))):
            raise EOFError
        data += part
    return bytes(data)


def _limit() -> None:
    """Of the process, once everything is imported."""
    with open("/proc/self/statm") as file:
        own = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    for kind, value in (
        (resource.RLIMIT_AS, own + MEMORY),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, OPEN_FILES),
    ):
        hard = resource.getrlimit(kind)[1]
        resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard),) * 2)


def _more_time() -> None:
    """SECONDS from now on; beyond, the system ends the process, whether or not anybody waits for it."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    limit = int(used.ru_utime + used.ru_stime) + 1 + SECONDS
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def main() -> None:
    """Answer requests until the other side is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who asks
    connection = socket.socket(fileno=0)
    render("{{ messages[0] | tojson }}", {"messages": [{"role": "user", "content": "x"}]}, 100)  # imports the rest
    _limit()
    send(connection, {"ready": True})
    try:
        while True:
            request = receive(connection)
            _more_time()
            send(connection, answer(request))
    except (EOFError, ConnectionError):
        return


if __name__ == "__main__":
    main()
