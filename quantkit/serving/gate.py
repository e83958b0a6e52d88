"""Who may ask: who has the key, and calls this server by its name.

A web page can have its own name resolved to 127.0.0.1 (DNS rebinding) and then ask a server there as if it were the
page's own; but the browser says that name, in Host and Origin.
"""

import hmac
import ipaddress
import socket
from collections.abc import Iterable
from urllib.parse import urlsplit

from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from quantkit.errors import QuantkitError
from quantkit.serving.refusals import Refused, failure

NO_KEY = "none"  # as a key: there shall be none, though others can reach the server
OTHERS = "lets other machines in"
ANY = "*"


class Gate:
    """key: what clients must send, if anything. names: of this server, without port, besides addresses of loopback;
    None: any, since who has the key is no web page. addresses: clients may call any address, which no page can have
    resolved to another. origins: web pages that may ask (CORS); ANY: all."""

    def __init__(
        self,
        key: str | None = None,
        names: Iterable[str] | None = ("localhost",),
        addresses: bool = False,
        origins: Iterable[str] = (),
    ):
        self.key, self.addresses, self.origins = key, addresses, tuple(origins)
        self.names = None if names is None else {name.lower().rstrip(".") for name in names} - {""}

    @classmethod
    def of(cls, host: str, more: Iterable[str], key: str | None, origins: Iterable[str] = ()) -> "Gate":
        """For a server that listens on `host`. QuantkitError for a key that no client can send, and if other machines
        can reach the server without one, unless the key is NO_KEY."""
        if key is not None and (not key.strip() or key != key.strip() or not key.isprintable()):
            raise QuantkitError("--api-key: empty, or with spaces around it: no client can send that; set another")
        local = is_loopback(host)
        if key is None and not local:
            raise QuantkitError(
                f"--host {host} {OTHERS}: set --api-key or $QUANTKIT_API_KEY (--api-key {NO_KEY}: whoever reaches it "
                "may ask)"
            )
        if ANY in (origins := check_origins(origins)) and key is None:
            raise QuantkitError(
                f"--cors {ANY} lets every web page that you open ask: set --api-key, or name the pages (--api-key "
                f"{NO_KEY}: they may)"
            )
        key = None if key == NO_KEY else key
        own = () if local else (socket.gethostname(), f"{socket.gethostname()}.local")
        names = None if key and not local else ("localhost", host, *own, *more)
        return cls(key, names, addresses=not local, origins=origins)

    def check_key(self, request: Request) -> None:
        """Refused without the key."""
        scheme, _, given = request.headers.get("authorization", "").encode("latin-1").partition(b" ")
        right = self.key is None or hmac.compare_digest(given.strip(), self.key.encode())
        if not right or (self.key and scheme.lower() != b"bearer"):
            raise Refused(401, "wrong or missing API key", "invalid_api_key", {"WWW-Authenticate": "Bearer"})

    def check_names(self, host: str | None, origin: str | None) -> None:
        """Refused for a Host or an Origin that is not of this server."""
        if self.names is None:
            return
        for header, value, right in (
            ("Host", host, host is not None and self._is_own(f"//{host}", self.addresses)),
            ("Origin", origin, origin is None or self._may_ask(origin) or origin.partition("://")[2] == host),
        ):
            if not right:
                raise Refused(
                    403,
                    f"{header}: {str(value)[:80]!r} is not a name of this server; names are given after the address: "
                    "--host 127.0.0.1,NAME",
                )

    def _may_ask(self, origin: str) -> bool:
        return ANY in self.origins or origin in self.origins or self._is_own(origin, False)

    def cors(self) -> list[Middleware]:
        """What tells browsers that pages of those origins may ask; nothing if there are none."""
        if not self.origins:
            return []
        headers = ["Authorization", "Content-Type"]
        methods = ["GET", "POST"]
        return [Middleware(CORSMiddleware, allow_origins=self.origins, allow_headers=headers, allow_methods=methods)]

    def _is_own(self, url: str, any_address: bool) -> bool:
        try:
            name = (urlsplit(url).hostname or "").rstrip(".")
            return name in (self.names or ()) or any_address | ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False

    def before(self, app: ASGIApp) -> ASGIApp:
        """The app, behind `check_names`."""

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] == "http":
                request = Request(scope)
                try:
                    self.check_names(request.headers.get("host"), request.headers.get("origin"))
                except Refused as error:
                    return await failure(error.status_code, error.detail, error.code)(scope, receive, send)
            await app(scope, receive, send)

        return guarded


def check_origins(origins: Iterable[str]) -> tuple[str, ...]:
    """Those that are not empty. QuantkitError for what no browser sends: scheme, name and port, nothing after it."""
    found = tuple(origin for origin in origins if origin)
    for origin in found:
        parts = urlsplit(origin)
        if origin != ANY and (not parts.hostname or origin != f"{parts.scheme}://{parts.netloc}".lower()):
            raise QuantkitError(f"--cors {origin}: write an origin, like https://chat.example:3000, or {ANY}")
    return found


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there. QuantkitError for an unknown name."""
    try:
        found = socket.getaddrinfo(host or "0.0.0.0", None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise QuantkitError(f"--host {host}: {getattr(error, 'strerror', None) or error}; choose another") from None
    return all(ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback for *_, address in found)
