"""Servers that drip, go on for ever, or pass for another: reading them ends, and nobody else's cache is touched."""

import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from loopback_hub import Blob, Hub
from patience import within

from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.models.open import ModelRef, open_weights
from quantkit.remote import answers, client
from quantkit.remote.cache import Store, home_of, matches
from quantkit.remote.client import RangeReader, Repo

NAME = "model.layers.1.mlp.experts.3.up_proj.weight"
SIZE = 100_000
STALL = 0.4


class Server:
    """Answers every GET by `answer(handler)`, which writes what it likes."""

    def __init__(self, answer):
        class Handler(BaseHTTPRequestHandler):
            over = threading.Event()

            def do_GET(self):
                outer.asked += 1
                try:
                    answer(self)
                except OSError:
                    outer.hung_up.set()
                self.close_connection = True

            def log_message(self, *_):
                pass

        self.over = Handler.over
        outer, self.asked, self.hung_up = self, 0, threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.server.shutdown()
        self.server.server_close()


def head(handler, status=206, begin=0, end=SIZE, **more) -> None:
    handler.send_response(status)
    for key, value in {"ETag": '"e"', "Content-Range": f"bytes {begin}-{end - 1}/{SIZE}", **more}.items():
        handler.send_header(key, value)
    handler.end_headers()


def asked(handler) -> tuple[int, int]:
    begin, end = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers["Range"]).groups()
    return int(begin), int(end) + 1


def wait(handler) -> None:
    """Between two drops, as long as the test runs."""
    if handler.over.wait(0.05):
        raise OSError


def endless(handler, status=206) -> None:
    head(handler, status)
    while not handler.over.is_set():
        handler.wfile.write(bytes(65536))


def drip(handler, status=206) -> None:
    head(handler, status, *(asked(handler) if "Range" in handler.headers else ()))
    while True:
        handler.wfile.write(b"x")
        wait(handler)


def drip_head(handler) -> None:
    handler.wfile.write(b"HTTP/1.1 206 OK\r\nX-Pad: ")
    while True:
        handler.wfile.write(b"x")
        wait(handler)


def byte_a_connection(handler) -> None:
    begin, end = asked(handler)
    head(handler, begin=begin, end=end, **{"Content-Length": str(end - begin)})
    handler.wfile.write(b"x")


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(answers, "STALL", STALL)
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)


def fetch(url: str) -> bytes:
    data = bytearray()
    RangeReader(Repo("user/x", url, commit="0" * 40), {"f": ("e", SIZE)}).fetch("f", 0, SIZE, data.extend, "weights")
    return bytes(data)


def test_an_endless_body_ends_with_the_range(env, hasty):
    with Server(endless) as server:
        assert fetch(server.url) == bytes(SIZE)
        assert server.hung_up.wait(10) and server.asked == 1


@pytest.mark.parametrize(
    "answer",
    [drip, drip_head, byte_a_connection, lambda handler: endless(handler, 404), lambda handler: drip(handler, 503)],
    ids=["drip", "dripping head", "a byte a connection", "endless error", "dripping error"],
)
def test_what_brings_nothing_is_given_up(env, hasty, answer):
    with Server(answer) as server:
        with within(10 * STALL), pytest.raises(QuantkitError, match=r"user/x at http") as error:
            fetch(server.url)
        assert len(str(error.value)) < 500
        assert server.asked <= 2


def test_slow_is_not_dripping(env, hasty, monkeypatch):
    """Above the least rate a transfer may take as long as it likes."""
    patience = 2 * STALL  # a busy machine may let the server wait, too
    monkeypatch.setattr(answers, "STALL", patience)

    def slow(handler) -> None:
        head(handler, **{"Content-Length": str(SIZE)})
        for _ in range(10):
            handler.wfile.write(bytes(SIZE // 10))
            handler.wfile.flush()
            time.sleep(patience / 4)

    with Server(slow) as server:
        began = time.monotonic()
        assert fetch(server.url) == bytes(SIZE) and server.asked == 1
        assert time.monotonic() - began > 2 * patience


@pytest.mark.parametrize("answer", [lambda h: endless(h, 200), lambda h: drip(h, 200), drip_head])
def test_a_listing_ends(env, hasty, monkeypatch, answer):
    monkeypatch.setattr(client, "LISTING_BYTES", 1 << 20)
    with Server(answer) as server, pytest.raises(QuantkitError, match="its listing"):
        open_weights(ModelRef(f"{server.url}/user/tiny-r1"))


class Forged(Blob):
    """Other bytes under the identity of a file."""

    def __init__(self, data: bytes, of: Blob):
        super().__init__(data, of.lfs)
        self.sha256, self.oid = of.sha256, of.oid


def twin(hub: Hub, evil: Hub, **forged) -> str:
    """The same model on another server, at the same commit, with other bytes in some files; its address."""
    files = hub.models["user/tiny-r1"].commits[0]
    other = {name: Forged(forged[name], blob) if name in forged else blob for name, blob in files.items()}
    evil.add("user/tiny-r1", {})
    evil.models["user/tiny-r1"].commits = [other]
    sha = hub.models["user/tiny-r1"].sha()
    evil.models["user/tiny-r1"].sha = lambda index=-1: sha
    return f"{evil.url}/user/tiny-r1"


def test_an_endpoint_cannot_fill_the_cache_of_another(hub, env, sharded):
    local = Checkpoint.open(sharded)
    shard = local.entry(NAME).file
    data = bytearray((sharded / shard).read_bytes())
    for i in range(local.entry(NAME).begin, local.entry(NAME).end):
        data[i] ^= 1
    with Hub() as evil:
        poisoned = open_weights(ModelRef(twin(hub, evil, **{shard: bytes(data)})))
        wrong = poisoned.read_raw(NAME)[0].view(torch.uint8)
        poisoned.close()
    right = open_weights(ModelRef("user/tiny-r1"))
    assert torch.equal(right.read(NAME), local.read(NAME))
    assert not torch.equal(wrong, local.read_raw(NAME)[0].view(torch.uint8))
    right.close()
    assert not (env / "hub").exists() or not list((env / "hub").rglob("config.json"))


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_small_files_are_what_their_etags_name(hub, env, sharded, name):
    data = (sharded / name).read_bytes()
    with Hub() as evil:
        address = twin(hub, evil, **{name: data.replace(b"0", b"1", 1)})
        with pytest.raises(QuantkitError, match=rf"{name} is not what its ETag"):
            open_weights(ModelRef(address))
    right = open_weights(ModelRef("user/tiny-r1"))
    assert (right.path / name).read_bytes() == data
    right.close()
    (right.path / name).resolve().write_bytes(data[:-1] + b"?")  # damaged on the disk
    again = open_weights(ModelRef("user/tiny-r1"))
    assert (again.path / name).read_bytes() == data
    again.close()


def test_folders_of_endpoints_and_hashes(env, hub):
    homes = [home_of(url) for url in ("https://huggingface.co", "http://huggingface.co", hub.url, "https://a.b/../x")]
    assert homes[0] == env / "quantkit" and len(set(homes)) == 4 and home_of("https://huggingface.co/") == homes[0]
    assert all(home.parent == env / "quantkit" / "endpoints" for home in homes[1:])
    data = b"abc"
    assert matches(data, hashlib.sha256(data).hexdigest()) and not matches(data, "0" * 64)
    assert matches(data, hashlib.sha1(b"blob 3\0abc").hexdigest()) and not matches(data, "0" * 40)


def test_small_files_and_headers_have_a_bound(tmp_path):
    """The oldest of other models go; this model's stay, and are refused if they alone are too much."""
    for number in range(10):
        Store(tmp_path, 1000).put(f"small/{number}", bytes(50))
    store = Store(tmp_path, 1000)
    assert store.used <= 1000 // 8 + 50
    assert (tmp_path / "small" / "9").exists() and not (tmp_path / "small" / "0").exists()
    for number in range(9):
        store.put(f"headers/{number}", bytes(100))
    with pytest.raises(QuantkitError, match="QUANTKIT_CACHE_SIZE"):
        store.put("headers/9", bytes(101))
    assert store.used <= 1000 and not (tmp_path / "headers" / "9").exists()
    assert store.find("headers/3", lambda data: len(data) == 99) is None and not (tmp_path / "headers" / "3").exists()


def test_headers_count_against_the_limit(hub, env):
    with pytest.raises(QuantkitError, match="QUANTKIT_CACHE_SIZE"):
        open_weights(ModelRef("user/tiny-r1", None, 100_000))
    held = sum(path.stat().st_size for path in home_of(hub.url).rglob("*") if path.is_file() and not path.is_symlink())
    assert held <= 100_000 + len(json.dumps({})) + 20_000  # and the listing's reference
