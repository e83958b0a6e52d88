"""A chat as a person has it: in a terminal, with its keys."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LEFT, UP, INTERRUPT = "\x1b[D", "\x1b[A", "\x03"


class Terminal:
    """A program behind a pseudo-terminal."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.screen, theirs = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "PYTHONPATH": os.getcwd()} | environment
        command = [sys.executable, "-m", "quantkit", *arguments]

        def on_its_own() -> None:
            """With the terminal as its own, so that Ctrl-C reaches it, which a shell's background job ignores."""
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.login_tty(theirs)

        self.program = subprocess.Popen(command, stdin=theirs, env=environment, preexec_fn=on_its_own)
        os.close(theirs)
        self.shown = ""

    def wait(self, for_text: str, seconds: float = 120) -> str:
        """What is shown until then, which is then taken as read."""
        until = time.monotonic() + seconds
        while for_text not in self.shown:
            screen = select.poll()  # any number of files may be open here
            screen.register(self.screen, select.POLLIN)
            assert screen.poll(1000 * max(0.0, until - time.monotonic())), f"no {for_text!r} in {self.shown!r}"
            try:
                self.shown += os.read(self.screen, 4096).decode(errors="replace")
            except OSError:  # the program has ended
                raise AssertionError(f"ended without {for_text!r}: {self.shown!r}") from None
        read, _, self.shown = self.shown.partition(for_text)
        return read

    def type(self, keys: str) -> None:
        """As if pressed."""
        os.write(self.screen, keys.encode())

    def interrupt(self, until: str) -> None:
        """Ctrl-C in the middle of a line, and what is said then."""
        self.type("half a line")
        self.wait("half a line")
        time.sleep(0.5)
        self.type(INTERRUPT)
        self.wait(until)


@pytest.fixture(scope="module")
def talk(made, tmp_path_factory):
    """A chat in which everything of this file has been typed: what was saved, where, and what was shown."""
    home = tmp_path_factory.mktemp("home")
    options = ("-c", "512", "-n", "4", "--temp", "0", "--device", "cpu")
    t = Terminal("run", str(made), *options, HOME=str(home), XDG_CACHE_HOME=str(home))
    t.wait("/help lists commands")
    t.wait("> ")
    seen = {}
    t.type("Hllo" + 3 * LEFT + "e\r")
    seen["first"] = t.wait(" of 512 tokens")
    t.wait("> ")
    t.type(UP + " again\r")
    t.wait(" of 512 tokens")
    t.wait("> ")
    t.type('"""one\r')
    t.wait(". ")
    t.type("two\r")
    t.wait(". ")
    t.type('"""\r')
    t.wait(" of 512 tokens")
    t.wait("> ")
    t.interrupt("(Ctrl-C again, Ctrl-D or /exit ends)")
    t.wait("> ")
    for keys, name, until in (
        ("/set temperature 0.25\r", "set", "n_tokens 4"),
        ("/set temperature hot\r", "wrong", "not a number from 0 to 100"),
        ("/nonsense\r", "unknown", "no such command; /help lists them"),
        ("/help\r", "help", "message of several lines"),
        (f"/save {home}/talk.json\r", "saved", "6 messages in"),
        ("/system Be short.\r", "system", "(a new conversation)"),
        (f"/save {home}/empty.json\r", "again", "1 messages in"),
        (f"/load {home}/talk.json\r", "loaded", "6 messages of"),
        (f"/load {home}/.none\r", "missing", "no such file"),
        (f"/lo\t{home}/empty.json\r", "completed", "1 messages of"),
    ):
        t.type(keys)
        seen[name] = t.wait(until)
        t.wait("> ")
    t.interrupt("Ctrl-C again")
    t.wait("> ")
    t.interrupt("interrupted")
    seen["exit"] = t.program.wait(60)
    os.close(t.screen)
    return home, seen


def saved(home: Path, name: str) -> dict:
    return json.loads((home / name).read_text())


def test_lines_are_edited_and_recalled_and_may_be_many(talk):
    home, _ = talk
    turns = saved(home, "talk.json")["messages"]
    assert [turn["content"] for turn in turns[::2]] == ["Hello", "Hello again", "one\ntwo"]
    assert {turn["role"] for turn in turns[1::2]} == {"assistant"}


def test_commands_change_what_they_say(talk):
    home, _ = talk
    assert saved(home, "talk.json")["settings"]["temperature"] == 0.25
    assert saved(home, "empty.json")["messages"] == [{"role": "system", "content": "Be short."}]


def test_the_second_interrupt_in_a_row_ends_it(talk):
    _, seen = talk
    assert "context" in seen["first"] and seen["exit"] == 130  # after the first, the chat went on


def test_history_is_kept_for_its_owner_alone(talk):
    home, _ = talk
    path = home / "quantkit-history"
    assert "Hello again" in path.read_text() and path.stat().st_mode & 0o077 == 0
