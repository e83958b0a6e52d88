"""Who may ask a server: whoever has the key and calls it by its name."""

import errno
import os
import socket

import pytest
from click.testing import CliRunner
from starlette.requests import Request

from quantkit.__main__ import main
from quantkit.errors import QuantkitError
from quantkit.serving.gate import Gate
from quantkit.serving.http import bind, listen
from quantkit.serving.refusals import Refused

LOCAL = Gate.of("127.0.0.1", ["Proxy.example", ""], None)
OPEN = Gate.of("0.0.0.0", [], "none")


def lets_in(gate: Gate, host: str | None, origin: str | None = None) -> bool:
    try:
        gate.check_names(host, origin)
    except Refused as error:
        assert error.status_code == 403
        return False
    return True


@pytest.mark.parametrize(
    "host",
    ["localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST:1", "localhost.", "proxy.example:443"],
)
def test_names_of_loopback(host):
    assert lets_in(LOCAL, host) and lets_in(LOCAL, host, f"http://{host}")


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "10.0.0.1",
        "",
        None,
        "[::1",
    ],
)
def test_other_names_are_refused(host):
    assert not lets_in(LOCAL, host)


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "", "http://localhost.evil.example", "http://6.6.6.6", "x", "http://["]
)
def test_other_origins_are_refused(origin):
    assert not lets_in(LOCAL, "localhost:8000", origin)
    assert not lets_in(OPEN, "10.0.0.1:8000", origin)


def test_names_beyond_loopback():
    assert lets_in(OPEN, "10.0.0.1:8000") and lets_in(OPEN, "10.0.0.1:8000", "http://10.0.0.1:8000")
    assert not lets_in(OPEN, "evil.example:8000")
    keyed = Gate.of("0.0.0.0", [], "secret")
    assert lets_in(keyed, "any.example", "https://any.other")  # whoever has the key is no web page
    assert Gate.of("127.0.0.1", [], "secret").names


@pytest.mark.parametrize("key", ["", " ", "a ", "a\n"])
def test_keys_that_nobody_can_send_are_refused(key):
    with pytest.raises(QuantkitError, match="no client can send that"):
        Gate.of("127.0.0.1", [], key)


def test_others_need_a_key_or_the_word_none():
    for host in ("0.0.0.0", "::", "10.0.0.1"):
        with pytest.raises(QuantkitError, match=f"--host {host} lets other machines in: set --api-key"):
            Gate.of(host, [], None)
        assert Gate.of(host, [], "none").key is None
    assert Gate.of("localhost", [], None).key is None
    with pytest.raises(QuantkitError, match=r"--host no\.such\.name\.invalid: "):
        Gate.of("no.such.name.invalid", [], None)


def test_the_commands_key(made, monkeypatch):
    file = str(next(made.glob("tiny-r1-*.gguf")))
    for arguments, environment, said in (
        ([], "", "no client can send that"),
        (["--api-key", ""], None, "no client can send that"),
        (["--host", "0.0.0.0"], None, "lets other machines in"),
    ):
        if environment is None:
            monkeypatch.delenv("QUANTKIT_API_KEY", raising=False)
        else:
            monkeypatch.setenv("QUANTKIT_API_KEY", environment)
        done = CliRunner().invoke(main, ["serve", file, *arguments])
        assert done.exit_code and said in done.output


@pytest.mark.parametrize(
    ("header", "right"),
    [
        ("Bearer schlüssel", True),
        ("bearer schlüssel", True),
        ("BEARER  schlüssel", True),
        ("schlüssel", False),
        ("Basic schlüssel", False),
        ("Bearer schlussel", False),
        ("Bearer", False),
        (None, False),
    ],
)
def test_the_key(header, right):
    headers = [] if header is None else [(b"authorization", header.encode())]
    request = Request({"type": "http", "headers": headers})
    Gate().check_key(request)
    gate = Gate.of("127.0.0.1", [], "schlüssel")
    if right:
        return gate.check_key(request)
    with pytest.raises(Refused) as refused:
        gate.check_key(request)
    assert refused.value.status_code == 401


def test_a_port_that_is_taken_is_refused_before_the_model_is_opened(tmp_path):
    """Which takes minutes; this one could not be opened at all."""
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = CliRunner().invoke(main, ["serve", str(tmp_path / "m.gguf"), "--port", str(port), "--device", "cpu"])
    assert done.exit_code == 1 and f"--port {port}: Address already in use; choose another" in done.stderr


def test_a_machine_without_ipv6_is_told_in_a_line(monkeypatch):
    def missing(*_: object) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))

    monkeypatch.setattr(socket, "socket", missing)
    with pytest.raises(QuantkitError, match="--host ::1 --port 0: Address family not supported"):
        bind("::1", 0)


def test_who_listened_meanwhile_is_refused_in_a_line():
    first, second = bind("127.0.0.1", 0), socket.socket()
    with first, second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(first.getsockname())
        second.listen()
        with pytest.raises(QuantkitError, match="Address already in use; choose another"):
            listen(first)
