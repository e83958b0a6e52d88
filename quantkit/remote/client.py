"""Talking to a Hub with huggingface_hub's own client: retries with backoff, and one clear line when it is no use.

Token, endpoint and folders are huggingface_hub's (`HF_TOKEN`, `HF_ENDPOINT`, `HF_HOME`). No message contains a header
or the query of a URL: tokens and signatures live there.
"""

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn, TypeVar
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import ModelInfo, constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (
    build_hf_headers,
    get_token,
    parse_ratelimit_headers,
)

from quantkit.errors import QuantkitError
from quantkit.formats.safetensors_header import load_object
from quantkit.progress import say
from quantkit.remote.answers import LEAST, Opened, body, opened, paced, raise_for_status

T = TypeVar("T")
RETRIED_STATUS = (408, 429, 500, 502, 503, 504)
ATTEMPTS = 8  # in a row without LEAST bytes of progress: 0.5 + 1 + 2 + ... s, about a minute
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
LONGEST_REQUESTED_WAIT = 900.0  # rate limits of the Hub are counted over 300 s
NOTABLE_WAIT = 5.0
LISTING_BYTES = 64 << 20  # of a repository's files; R1's has 100 kB


@dataclass(frozen=True)
class Repo:
    """A model repository at one commit. revision: what the person asked for; commit: what it was when we looked."""

    id: str
    endpoint: str
    revision: str | None = None
    commit: str | None = None

    def __str__(self) -> str:
        return self.id

    @property
    def trusted(self) -> bool:
        """Whether this is the endpoint that the person's token is for."""
        return origin(self.endpoint) == origin(constants.ENDPOINT)

    @property
    def token(self) -> bool | None:
        """For huggingface_hub: None uses HF_TOKEN or the stored token, False sends none."""
        return None if self.trusted else False

    def url(self, file: str) -> str:
        """Where a file lies at this commit."""
        return f"{self.endpoint}/{self.id}/resolve/{self.commit}/{file}"


def origin(url: str) -> tuple[str, str, int]:
    """Scheme, host and port: what a token may be sent to."""
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or {"http": 80, "https": 443}.get(parts.scheme, 0)


class ChangedError(QuantkitError):
    """A file is not the one that was pinned."""


def with_retry(call: Callable[[], T], repo: Repo, what: str) -> T:
    """call(), repeated while the trouble may pass; else a QuantkitError. For calls of huggingface_hub."""
    attempt = 0
    while True:
        try:
            return call()
        except QuantkitError:
            raise
        except Exception as error:
            attempt += 1
            if not is_transient(error) or attempt >= ATTEMPTS:
                explain(error, repo, what)
            pause(attempt, root(error))


def is_transient(error: Exception) -> bool:
    """Whether trying again may help: a busy server or a broken connection."""
    cause = root(error)
    if isinstance(cause, HfHubHTTPError):
        return cause.response is not None and cause.response.status_code in RETRIED_STATUS
    return isinstance(cause, httpx2.TransportError) and not isinstance(cause, httpx2.UnsupportedProtocol)


def root(error: Exception) -> Exception:
    """What huggingface_hub wrapped: a failed transfer in a RuntimeError, a look-up in a LocalEntryNotFoundError."""
    while isinstance(error, RuntimeError | LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    return error


def pause(attempt: int, error: Exception, stop: threading.Event | None = None) -> None:
    """Wait before attempt + 1: what the server asks for, else exponentially longer, spread so that connections that
    failed together do not come back together."""
    wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
    response = getattr(error, "response", None)
    if response is not None and (asked := requested_wait(response.headers)) is not None:
        if asked > LONGEST_REQUESTED_WAIT:
            raise QuantkitError(f"{where_of(response)} asks to wait {asked:.0f} s; run the same command again then")
        wait = max(wait, asked)
    if wait >= NOTABLE_WAIT:
        say(f"waiting {wait:.0f} s for the server ({describe(error)})")
    if stop is None:
        time.sleep(wait)
    else:
        stop.wait(wait)


def requested_wait(headers: Mapping[str, str]) -> float | None:
    """Seconds from Retry-After or the Hub's own rate limit headers."""
    value = headers.get("retry-after", "")
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and not limit.remaining else None


def describe(error: Exception) -> str:
    """A few words: the HTTP status, else the kind of error."""
    response = getattr(error, "response", None)
    return f"HTTP {response.status_code}" if response is not None else type(error).__name__


def where_of(response: httpx2.Response) -> str:
    """The host that answered; never a whole address, which may hold a signature."""
    return response.request.url.host


def explain(error: Exception, repo: Repo, what: str) -> NoReturn:
    """The QuantkitError for anything that huggingface_hub or the transport raises."""
    error = root(error)
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    at = f"{repo} at {repo.endpoint}"
    login = "log in with `hf auth login` or set HF_TOKEN"
    known = "your token was sent" if repo.trusted and get_token() else "no token was sent"
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError):
        line = f"{repo}: {what} is not in the local cache, and HF_HUB_OFFLINE forbids asking {repo.endpoint}"
    elif isinstance(error, HFValidationError):
        line = f"{repo.id}: not a folder, a bundled model, or an id like user/name"
    elif isinstance(error, LocalTokenNotFoundError):
        line = f"{at}: a token is needed; {login}"
    elif isinstance(error, GatedRepoError):
        line = f"{at}: gated; ask for access on its page, then {login} ({known})"
    elif isinstance(error, RevisionNotFoundError):
        line = f"{at}: no revision {repo.revision or repo.commit}"
    elif isinstance(error, EntryNotFoundError):
        line = f"{at}: no file {what}"
    elif isinstance(error, RepositoryNotFoundError) or status == 404:
        line = f"{at}: no such model, or it is private; check the id, or {login} ({known})"
    elif status == 401:
        line = f"{at}: the token was refused, or this is private; {login} ({known})"
    elif status == 403:
        line = f"{at}: no permission for {what}; the token needs that right ({known})"
    elif status == 429:
        line = f"{at}: rate limited while asking for {what}; try again in some minutes, or {login} ({known})"
    elif status is not None:
        line = f"{at}: HTTP {status} for {what}"
    elif isinstance(error, httpx2.TransportError):
        line = f"{at}: {what} failed ({type(error).__name__}: {first_line(error)}); check the network, then run again"
    elif isinstance(error, OSError):
        line = f"{error.filename or what}: {error.strerror or error}"
    else:
        line = f"{at}: {what} failed ({type(error).__name__}: {first_line(error)})"
    raise QuantkitError(line) from None


def first_line(error: Exception) -> str:
    """Its message without the queries of URLs, which hold signatures."""
    line = (str(error).splitlines() or [""])[0]
    return re.sub(r"(https?://[^\s?']+)\?[^\s']*", r"\1", line)


def normalised(etag: str | None) -> str | None:
    """An ETag without quotes and the mark of a weak one, so that two can be compared."""
    return etag.removeprefix("W/").strip('"') if etag else None


def model_info(repo: Repo) -> ModelInfo:
    """The listing of a repository at its revision, with sizes and ETags; what `HfApi.model_info` asks for, with bounds
    on size and time. QuantkitError, or what `with_retry` repeats."""
    at = "" if repo.revision is None else f"/revision/{quote(repo.revision, safe='')}"
    headers = build_hf_headers(token=repo.token, library_name="quantkit") | {"Accept-Encoding": "identity"}
    with opened(f"{repo.endpoint}/api/models/{repo.id}{at}?blobs=true", headers) as response:
        raise_for_status(response)
        text = body(response, LISTING_BYTES)
    if len(text) > LISTING_BYTES:
        raise QuantkitError(f"{repo} at {repo.endpoint}: its listing is larger than {LISTING_BYTES:,} bytes")
    found = load_object(text, f"{repo} at {repo.endpoint}: its listing")
    try:
        return ModelInfo(**found)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise QuantkitError(f"{repo} at {repo.endpoint}: its listing is not a model's ({error})") from None


class RangeReader:
    """Byte ranges of the files of one repository, each file pinned to its ETag and size. Used from many threads.

    files: name -> (ETag, bytes). `received` counts the bytes of bodies, for reports.
    """

    def __init__(self, repo: Repo, files: Mapping[str, tuple[str, int]]) -> None:
        self.repo, self.files = repo, files
        self.received = 0
        self.stop = threading.Event()
        self._location: dict[str, str] = {}  # signed address of a file outside the Hub, while it lasts
        self._served: dict[str, str | None] = {}  # the ETag that came from an address
        self._lock = threading.Lock()

    def fetch(self, file: str, begin: int, end: int, sink: Callable[[bytes], None], what: str) -> None:
        """Hand bytes begin:end to `sink`, in order and each once, however often the connection breaks."""
        done, attempt, failed_at = begin, 0, begin
        while done < end:
            try:
                location = self._location.get(file)
                with self._open(file, done, end, location) as response:
                    self._check(file, done, end, response, location)
                    for piece in paced(response):
                        if self.stop.is_set():
                            raise QuantkitError(f"{self.repo}: reading {what} was stopped")
                        piece = piece[: end - done]
                        sink(piece)
                        done += len(piece)
                        with self._lock:
                            self.received += len(piece)
                        if done == end:  # whatever else the server goes on to send
                            break
                if done < end:  # a whole response, but of fewer bytes than asked for
                    raise httpx2.RemoteProtocolError("the range was cut short")
            except (httpx2.TransportError, HfHubHTTPError, Refused) as error:
                if isinstance(error, Refused):
                    self._forget(file)
                attempt = 1 if done - failed_at >= LEAST else attempt + 1  # a byte a connection is no progress
                failed_at = done
                if attempt >= ATTEMPTS or not (isinstance(error, Refused) or is_transient(error)):
                    explain(error, self.repo, f"{file} ({what})")
                pause(attempt, error, self.stop)

    def _open(self, file: str, begin: int, end: int, location: str | None) -> Opened:
        headers = {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        if location is None:
            headers |= build_hf_headers(token=self.repo.token, library_name="quantkit")
        return opened(location or self.repo.url(file), headers)

    def _check(self, file: str, begin: int, end: int, response: httpx2.Response, location: str | None) -> None:
        """It is the pinned file and the range that was asked for; QuantkitError or HfHubHTTPError else."""
        if location and response.status_code in (401, 403, 404, 410):
            raise Refused(response)  # the signature has expired: ask the Hub for a new address
        if response.status_code >= 400:
            raise_for_status(response)
        hops = [*response.history, response]  # a renamed repository redirects too, before the file does
        key = constants.HUGGINGFACE_HEADER_X_LINKED_ETAG
        linked = next((hop.headers[key] for hop in hops if key in hop.headers), None)
        linked, served = normalised(linked), normalised(response.headers.get("ETag"))
        etag, size = self.files[file]
        if location is None and (linked or served) != etag:
            raise ChangedError(
                f"{self.repo}: {file} changed on the Hub: its ETag was {etag}, now it is "
                f"{linked or served}; run again to use what is there now"
            )
        if location and served != self._served.get(location):
            raise Refused(response)  # something else lies there now: the Hub knows whether it is the same file
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", response.headers.get("Content-Range", ""))
        if response.status_code != 206 or not match:
            if not (begin == 0 and end == size and response.status_code == 200):
                raise QuantkitError(f"{self.repo}: {where_of(response)} does not serve ranges of {file}")
        elif int(match[1]) != begin or int(match[3]) != size:
            raise ChangedError(f"{self.repo}: {file} has {match[3]} bytes on the Hub, {size} were listed; run again")
        if response.history and origin(str(response.url)) != origin(self.repo.endpoint):
            with self._lock:
                self._location[file] = str(response.url)
                self._served[str(response.url)] = served

    def _forget(self, file: str) -> None:
        with self._lock:
            self._served.pop(self._location.pop(file, ""), None)


class Refused(Exception):
    """A signed address no longer works."""

    def __init__(self, response: httpx2.Response) -> None:
        super().__init__(f"HTTP {response.status_code}")
        self.response = response
