"""Standard streams as people's shells, services and containers leave them: closed, in another encoding, cut short."""

import contextlib
import io
import json
import os
import sys
import unicodedata
from typing import TextIO

import click

from quantkit.errors import QuantkitError, shown

OUT = ("stdout", "stderr")


def make_usable() -> None:
    """At the start of a command. A closed stream is /dev/null from here on: else the next file that is opened would
    have its number, and whatever a library prints would be written into that file. A character that a stream's encoding
    lacks is written as its escape."""
    with contextlib.suppress(OSError):
        while (fd := os.open(os.devnull, os.O_RDWR)) < 3:  # the lowest number that is free
            pass
        os.close(fd)
    for name, mode, errors in (("stdin", "r", "surrogateescape"), *((n, "w", "backslashreplace") for n in OUT)):
        stream: TextIO | None = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper) and stream.errors != errors:
            stream.reconfigure(errors=errors)


def show(text: object) -> None:
    """What a command has found out, on stdout. Whatever a file's names and metadata hold, a terminal only shows it."""
    click.echo(shown(str(text)))


def show_json(found: object) -> None:
    """What a command has found out, as JSON on stdout."""
    click.echo(json.dumps(found, indent=1, default=str))


def harmless(text: str) -> str:
    """A model's words as they are, but on a terminal without control characters: nobody knows what a file may say."""
    if text.isprintable() or not sys.stdout.isatty():
        return text
    return "".join(repr(c)[1:-1] if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)


def flush() -> None:
    """At the end: what cannot be written is an error, not a complaint of the interpreter after it has ended."""
    for name in OUT:
        try:
            getattr(sys, name).flush()
        except OSError as error:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
            if not isinstance(error, BrokenPipeError):
                raise QuantkitError(f"{name}: {error.strerror}") from None


def forget() -> None:
    """Nobody reads any more: what is still to be written goes nowhere."""
    with contextlib.suppress(OSError):
        fd = os.open(os.devnull, os.O_WRONLY)
        os.dup2(fd, 1)
        os.close(fd)


def whole_input() -> str:
    """All of stdin, in any locale. QuantkitError if it is not UTF-8."""
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise QuantkitError(f"stdin: not UTF-8 text (byte {error.start})") from None


def text_of(value: str, what: str) -> str:
    """What a person typed, as text: bytes that their locale could not decode are UTF-8. QuantkitError, naming the
    option, if they are not."""
    try:
        return os.fsencode(value).decode() if any("\ud800" <= c <= "\udfff" for c in value) else value
    except UnicodeError:
        raise QuantkitError(f"{what}: this is not text: its bytes are not UTF-8") from None
