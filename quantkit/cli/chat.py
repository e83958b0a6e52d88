"""A chat on the terminal: lines with history and editing, blocks of several lines, commands that begin with a slash."""

import json
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli import streams
from quantkit.container import cache_folder
from quantkit.errors import QuantkitError
from quantkit.runtime import bounds

if TYPE_CHECKING:
    from quantkit.serving.chat import Conversation

HELP = '''/set [NAME VALUE]  temperature, top_p, top_k, min_p, typical_p, seed; n_tokens:
                   most of an answer; thinking on or off, if the template can
/system [TEXT]     begin anew, under this system message; without TEXT: none
/clear             forget the conversation, but for the system message
/save FILE         keep conversation and settings, as JSON
/load FILE         go on with them
/exit, Ctrl-D      end; Ctrl-C stops an answer, or drops what is being typed
"""                begins and ends a message of several lines'''
HISTORY, MOST_LINES = "quantkit-history", 1000
BLOCK = '"""'
COMMAND = re.compile(r"/[a-z]+(?=\s|$)")
ROLES = ("system", "user", "assistant")
BOUNDS = bounds.BOUNDS | {"n_tokens": (1, 10**8)}


class Lines:
    """What a person types. On a terminal with history and editing, as readline has them; from a pipe as it comes."""

    def __init__(self) -> None:
        self.readline, self.history = None, None
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            return
        with suppress(ImportError):
            import readline

            self.readline = readline
            readline.set_history_length(MOST_LINES)
            readline.set_completer_delims(" ")
            readline.set_completer(_complete)
            edits = "libedit" in (readline.__doc__ or "")
            readline.parse_and_bind("bind ^I rl_complete" if edits else "tab: complete")
            if folder := cache_folder():
                self.history = folder / HISTORY
                with suppress(OSError):
                    readline.read_history_file(self.history)

    def read(self, prompt: str) -> str | None:
        """A line without its end; None at the end of input."""
        if self.readline:
            try:
                return input(prompt)
            except EOFError:
                click.echo()
                return None
        click.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        return line.removesuffix("\n") if line else None

    def message(self) -> str | None:
        """One line, or what stands between two \""" over several; None at the end of input."""
        first = self.read("> ")
        before, mark, text = (first or "").partition(BLOCK)
        if first is None or not mark or (before.strip() and not COMMAND.fullmatch(before.strip())):
            return first
        while BLOCK not in text:
            line = self.read(". ")
            if line is None:
                return None
            text += "\n" + line
        return before + text.partition(BLOCK)[0].strip("\n")

    def close(self) -> None:
        """Keep the history, for this user's eyes."""
        if self.readline and self.history:
            with suppress(OSError):
                self.history.touch(mode=0o600)
                self.readline.write_history_file(self.history)


def _complete(text: str, state: int) -> str | None:
    names = [f"/{name}" for name in sorted(COMMANDS) if f"/{name}".startswith(text)] if text.startswith("/") else []
    return names[state] + " " if state < len(names) else None


class Chat:
    """A conversation and what the commands change of it. n_tokens: most of an answer."""

    def __init__(self, talk: "Conversation", n_tokens: int) -> None:
        self.talk, self.n_tokens = talk, n_tokens
        self.system = talk.messages[:1]

    def answer(self, text: str) -> None:
        """Print what the model says to that, and how full the context is."""
        try:
            show_answer(self.talk.ask(text, self.n_tokens))
            click.echo(click.style(f"{self.talk.speed} · {self.talk.context}", dim=True), err=True)
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)
        except QuantkitError as error:
            raise QuantkitError(f"{error}; /clear starts anew") from None

    def help(self, _: str) -> None:
        """/help"""
        click.echo(HELP, err=True)

    def clear(self, _: str) -> None:
        """/clear"""
        self.talk.messages = [*self.system]
        click.echo("(a new conversation)", err=True)

    def begin(self, text: str) -> None:
        """/system"""
        self.system = [{"role": "system", "content": text}] if text else []
        self.clear(text)

    def set(self, text: str) -> None:
        """/set"""
        name, _, value = text.partition(" ")
        value = value.strip()
        if name == "thinking" and value in ("on", "off"):
            from quantkit.serving.template import reasoning

            self.talk.given = reasoning(self.talk.metadata, value == "on")
        elif name in BOUNDS and value:
            self._set(name, _number(name, value))
        elif text and name not in self._settings():
            raise QuantkitError(f"/set {text}: there are {', '.join(self._settings())}, and thinking on or off")
        click.echo(", ".join(f"{key} {value:g}" for key, value in self._settings().items()), err=True)

    def _set(self, name: str, value: float) -> None:
        if name == "n_tokens":
            self.n_tokens = int(value)
        else:
            given: dict[str, Any] = {name: value}
            self.talk.how = replace(self.talk.how, **given)

    def _settings(self) -> dict[str, float]:
        how = self.talk.how
        return {field.name: getattr(how, field.name) for field in fields(how)} | {"n_tokens": self.n_tokens}

    def save(self, text: str) -> None:
        """/save"""
        from quantkit.formats.whole_file import write_json

        path = _path(text, "/save")
        if path.exists():
            _conversation(path)  # of anything else the words are not to be lost
        write_json(path, {"messages": self.talk.messages, "settings": self._settings()})
        click.echo(f"({len(self.talk.messages)} messages in {path})", err=True)

    def load(self, text: str) -> None:
        """/load"""
        path = _path(text, "/load")
        found = _conversation(path)
        for name, value in found.get("settings", {}).items():
            if name in BOUNDS:
                self._set(name, _number(name, str(value)))
        self.talk.messages = [{"role": turn["role"], "content": turn["content"]} for turn in found["messages"]]
        self.system = [turn for turn in self.talk.messages[:1] if turn["role"] == "system"]
        click.echo(f"({len(self.talk.messages)} messages of {path})", err=True)


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "help": Chat.help,
    "set": Chat.set,
    "system": Chat.begin,
    "clear": Chat.clear,
    "save": Chat.save,
    "load": Chat.load,
}


def _number(name: str, value: str) -> float:
    try:
        number = int(value) if name in ("seed", "top_k", "n_tokens") else float(value)
    except ValueError:
        number = float("nan")
    bounds.check(number, BOUNDS[name], f"/set {name} {value}")
    return number


def _path(text: str, command: str) -> Path:
    if not text:
        raise QuantkitError(f"{command} needs the name of a file")
    return Path(text).expanduser()


def _conversation(path: Path) -> dict[str, Any]:
    """What /save wrote; QuantkitError for anything else."""
    from quantkit.formats.byte_source import read_text

    try:
        found = json.loads(read_text(path, "text"))
        turns = found["messages"]
        right = all(turn["role"] in ROLES and isinstance(turn["content"], str) for turn in turns)
        right = right and isinstance(found.get("settings", {}), dict)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        right = False
    if not right:
        raise QuantkitError(f"{path}: not a conversation that /save wrote")
    return dict(found)


def show_answer(pieces: Iterator[tuple[str, bool]]) -> None:
    """Print pieces of an answer as they come, reasoning dimmed (on a terminal)."""
    try:
        for piece, thought in pieces:
            piece = streams.harmless(piece)
            click.echo(click.style(piece, dim=True) if thought and piece else piece, nl=False)
    finally:
        if isinstance(pieces, Generator):
            pieces.close()
    click.echo()


def chat_on_terminal(talk: "Conversation", n_tokens: int) -> None:
    """Read, answer, until /exit or Ctrl-D. Ctrl-C ends the answer under way; at the prompt it drops the line, and only
    the second in a row ends the chat."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # which is not to be taken for Ctrl-C
    chat, lines, warned = Chat(talk, n_tokens), Lines(), False
    click.echo('/help lists commands, """ begins several lines, /exit or Ctrl-D ends, Ctrl-C stops an answer', err=True)
    try:
        while True:
            try:
                typed = lines.message()
            except KeyboardInterrupt:
                click.echo(err=True)  # leaves the line of the prompt
                if warned:
                    raise
                warned = True
                click.echo("(Ctrl-C again, Ctrl-D or /exit ends)", err=True)
                continue
            warned = False
            if typed is None or typed.strip() == "/exit":
                return
            try:
                _obey(chat, streams.text_of(typed.strip(), "stdin"))
            except (QuantkitError, OSError) as error:
                click.echo(str(error), err=True)
    finally:
        lines.close()


def _obey(chat: Chat, text: str) -> None:
    """Answer, or do what a command says."""
    if not (found := COMMAND.match(text)):
        if text:
            chat.answer(text)
        return
    name = found[0][1:]
    if name not in COMMANDS:
        raise QuantkitError(f"/{name}: no such command; /help lists them")
    COMMANDS[name](chat, text[found.end() :].strip())
