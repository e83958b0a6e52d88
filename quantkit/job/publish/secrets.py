"""What must not leave this computer: access tokens, passwords in addresses, and where things lie on its disks.

Text is searched as it stands and as its readers will see it: with JSON's, HTML's and URLs' escapes undone, and inside
base64. What is found is never quoted in a message.
"""

import base64
import binascii
import html
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from urllib.parse import unquote

from huggingface_hub.utils import get_token

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile

KINDS: Mapping[str, str] = {
    "an access token": (
        r"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
        r"|(?<![A-Za-z0-9])sk-[\w-]{24,}|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[0-9A-Z]{16}|AIza[\w-]{35}"
        r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]+"
    ),
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password or token in an address": (
        r"[A-Za-z][A-Za-z0-9+.-]{0,20}://[^\s/@\"'<>]+@[\w.\[-]"
        r"|[?&;#](?:[\w-]{0,40}(?:token|signature|credential|secret|password|passwd|api[-_]?key)|auth|sig|key|pwd)"
        r"=[^&\s\"'<>]{6,}"
    ),
    "credentials of a request": r"authorization[\"']?\s*[:=]\s*[\"']?(?:bearer|basic|token)\s+[^\s\"']{8,}",
}
PATTERNS = {kind: re.compile(pattern, re.IGNORECASE) for kind, pattern in KINDS.items()}
ESCAPED = re.compile(r"\\u([0-9a-fA-F]{4})|\\x([0-9a-fA-F]{2})|\\([/\\])")
BASE64 = re.compile(r"[A-Za-z0-9+/_-]{24,4096}={0,2}")
DEPTH = 4  # escapes within escapes
SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_KEY|CREDENTIAL", re.IGNORECASE)
SHORTEST = 12  # of a variable that is taken for a secret
LOCAL = re.compile(r"(?<![\w:/.~-])~?/(?:[^/\s\"'<>:|]+/)+[^/\s\"'<>:|]*|(?<![A-Za-z0-9])[A-Za-z]:[\\/][^\s\"'<>|]+")
PRIVATE_KEYS = ("command",)
"""Facts of provenance.json that say how and where a person works, and that nobody needs to make the file again."""


def refuse_secrets(where: object, data: bytes | str) -> None:
    """QuantkitError if a secret stands in what is to be published; it names the kind, not the secret."""
    text = data if isinstance(data, str) else data.replace(b"\0", b"").decode("utf-8", "replace")
    own = _own_secrets()
    for reading in _readings(text):
        kind = next((kind for kind, pattern in PATTERNS.items() if pattern.search(reading)), None)
        if kind is None and any(secret in reading for secret in own):
            kind = "an access token or another secret of your environment"
        if kind is not None:
            raise QuantkitError(f"{where}: holds {kind}; remove it before publishing")


def refuse_local(where: object, data: bytes | str, folder: Path) -> None:
    """QuantkitError if the text says where the person's home or this folder lies."""
    text = data if isinstance(data, str) else data.decode("utf-8", "replace")
    homes = {str(path) for path in (folder.resolve(), folder.resolve().parent, Path.cwd()) if len(path.parts) > 2}
    homes |= {str(Path.home())} - {"/"}
    for reading in _readings(text):
        if any(re.search(rf"{re.escape(home)}(?:/|\b)", reading) for home in homes):
            raise QuantkitError(
                f"{where}: says where files lie on this computer ({folder.resolve().parent} or your home); "
                "make it again without, or remove it before publishing"
            )


def refuse_in_header(file: GGUFFile, folder: Path) -> None:
    """As both, of a GGUF's metadata and names; no tensor data are read."""
    words = [f"{key} {each}" for key, value in file.metadata.items() for each in _strings(value)]
    text = "\n".join([*words, *file.tensors])
    refuse_secrets(file.path, text)
    ours = [word for word in words if not word.startswith("tokenizer.")]
    refuse_local(file.path, "\n".join(ours), folder)


def without_local(value: Any) -> Any:
    """A JSON value with the last part of each absolute local path in place of the path, and without PRIVATE_KEYS."""
    if isinstance(value, dict):
        return {_nameless(key): without_local(each) for key, each in value.items() if key not in PRIVATE_KEYS}
    if isinstance(value, list):
        return [without_local(each) for each in value]
    return _nameless(value) if isinstance(value, str) else value


def _nameless(text: str) -> str:
    if PurePosixPath(text).is_absolute() or text.startswith("~/"):
        return PurePosixPath(text).name
    if PureWindowsPath(text).drive and PureWindowsPath(text).is_absolute():
        return PureWindowsPath(text).name
    return LOCAL.sub(lambda match: re.split(r"[\\/]", match[0].rstrip("\\/"))[-1], text)


def _own_secrets() -> set[str]:
    named = {value for name, value in os.environ.items() if SECRET_NAMES.search(name) and len(value) >= SHORTEST}
    named = {value for value in named if not os.path.exists(value)}  # where a secret lies is none
    return named | ({token} if (token := get_token()) else set())


def _readings(text: str) -> Iterator[str]:
    """The text, and what it becomes as escapes are undone; then what its base64 says."""
    for _ in range(DEPTH):
        yield text
        plain = html.unescape(unquote(ESCAPED.sub(_character, text)))
        if plain == text:
            break
        text = plain
    found = []
    for match in BASE64.finditer(text):
        raw = match[0].rstrip("=").replace("-", "+").replace("_", "/")
        try:
            found.append(base64.b64decode(raw + "=" * (-len(raw) % 4)).decode("ascii"))
        except (binascii.Error, ValueError):
            continue
    yield "\n".join(found)


def _character(match: re.Match[str]) -> str:
    code = match[1] or match[2]
    return chr(int(code, 16)) if code else match[3]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (each for each in value if isinstance(each, str))
