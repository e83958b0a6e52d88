"""Attacks on `quantkit serve`, each while a bystander asks for one token again and again, as text and in a chat.

    python scripts/torture/serve_attacks.py tiny-r1-1.58bit/tiny-r1-1.58bit.gguf

Prints how long the bystander waited at most. After each attack the server gets SIGTERM: how long it took to end,
and how much memory it had grown by. Fails if a bystander waited more than --most seconds, was not answered, or if the
server did not end. Figures: docs/results/robustness.md.
"""

import argparse
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from quantkit.formats.gguf_reader import GGUFFile

CONTEXT = 16384
TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
ONE = {
    TEXT: json.dumps({"prompt": [0, 50, 60], "max_tokens": 1}).encode(),
    CHAT: json.dumps({"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1}).encode(),
}
LOOP = "{% for i in range(99999) %}"
HANGS = 3 * LOOP + 3 * "{% endfor %}"
LONG = {"prompt": [0] + [50] * 16000, "max_tokens": 1, "cache_prompt": False}


def post(port: int, path: str, body: bytes, seconds: float = 120) -> int:
    """The status of an answer that was read whole; 0: there was none."""
    connection = HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, HTTPException):
        return 0
    finally:
        connection.close()


@dataclass
class Attack:
    """What n threads do with a port, again and again, and the chat template of the file meanwhile, if another."""

    name: str
    do: Callable[[int], object]
    n: int = 4
    template: str | None = None
    asks: tuple[str, ...] = (TEXT, CHAT)


def sends(path: str, body: bytes) -> Callable[[int], object]:
    """An attack that posts."""
    return lambda port: post(port, path, body)


def idle(port: int) -> None:
    """Hundreds of connections with half a header each."""
    held = []
    with suppress(OSError):
        for _ in range(400):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
            held.append(connection)
        time.sleep(1)
    for connection in held:
        connection.close()


def hang_up(port: int) -> None:
    """A long answer that nobody reads."""
    body = json.dumps({"prompt": [0, 50], "max_tokens": 4000, "ignore_eos": True, "stream": True}).encode()
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
        head = (
            f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
        )
        connection.sendall(head.encode() + b"\r\n\r\n" + body)
        connection.recv(100)


def said(text: str, role: str = "user") -> bytes:
    """A chat of one message."""
    return json.dumps({"messages": [{"role": role, "content": text}], "max_tokens": 1}).encode()


def formed(schema: object) -> bytes:
    """A text that has to keep a schema."""
    return json.dumps({"prompt": "x", "max_tokens": 8, "json_schema": schema}).encode()


WORDS = "a1 <" * 100_000
PATTERNS = {"allOf": [{"type": "string", "pattern": f".*{a}.*{b}.*"} for a in "abcdef" for b in "ghij"]}
ECHO = {"prompt": [0] + [50] * 3000, "max_tokens": 0, "echo": True, "logprobs": 5}
ATTACKS = [
    Attack("nothing", lambda _: time.sleep(0.1), 1),
    Attack("template that never ends", sends(CHAT, said("x")), 8, HANGS, (TEXT,)),
    Attack("template that makes 10^9 letters", sends(CHAT, said("x")), 8, "{{ 'a' * 10 ** 9 }}", (TEXT,)),
    Attack(
        "template slow with long messages",
        sends(CHAT, said("x" * 60_000)),
        8,
        "{% for c in messages[0].content %}{% for d in messages[0].content %}{% endfor %}{% endfor %}",
    ),
    Attack("text of 4 MB", sends(TEXT, b'{"prompt": "' + b"word " * 800_000 + b'"}'), 8),
    Attack("text just below the context's bytes", sends(TEXT, json.dumps({"prompt": "a1 <" * 100_000}).encode()), 8),
    Attack("message of 4 MB", sends(CHAT, said("word " * 800_000)), 8),
    Attack("message of 4 MB of control tokens", sends(CHAT, said("<｜User｜>" * 170_000)), 8),
    Attack("answer of 4 MB that the template drops", sends(CHAT, said("<｜" * 330_000 + "</think>", "assistant")), 8),
    Attack("400,000 ids", sends(TEXT, b'{"prompt": [' + b"5," * 400_000 + b"5]}"), 8),
    Attack("900,000 prompts", sends(TEXT, b'{"prompt": [' + b"[5]," * 900_000 + b"[5]]}"), 8),
    Attack("130,000 messages", sends(CHAT, b'{"messages": [' + b'{"role":"user","content":""},' * 130_000 + b"1]}"), 8),
    Attack("nested 1,000,000 deep", sends(TEXT, b"[" * 1_000_000), 8),
    Attack("400,000 biases", sends(TEXT, b'{"prompt": "x", "logit_bias": {' + b'"1":1,' * 400_000 + b'"1":1}}'), 8),
    Attack("connections without a request", idle, 4),
    Attack("clients that hang up", hang_up, 3),
    Attack("schema of a multiple of 9 digits", sends(TEXT, formed({"type": "integer", "multipleOf": 99_999_989})), 4),
    Attack("schema of 24 patterns at once", sends(TEXT, formed(PATTERNS)), 4),
    Attack("schema of 2,000 properties", sends(TEXT, formed({"properties": {f"p{i}": {} for i in range(2000)}})), 4),
    Attack("log probabilities of 3,000 tokens", sends(TEXT, json.dumps(ECHO).encode()), 3),
    Attack("text to be tokenized", sends("/tokenize", json.dumps({"content": WORDS, "with_pieces": True}).encode()), 8),
    Attack("ids to be detokenized", sends("/detokenize", json.dumps({"tokens": [50] * 16_000}).encode()), 8),
    Attack("three prompts of 16,000 tokens", sends(TEXT, json.dumps(LONG).encode()), 3),
]


@dataclass
class Bystander:
    """Asks for one token at one endpoint until it is stopped."""

    port: int
    path: str
    stop: threading.Event
    waits: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Until then."""
        while not self.stop.is_set():
            begin = time.monotonic()
            status = post(self.port, self.path, ONE[self.path])
            self.waits.append(time.monotonic() - begin)
            self.bad += [status] * (status != 200)
            time.sleep(0.05)


def with_template(file: Path, template: str, out: Path) -> Path:
    """The file with another chat template in the bytes of its own."""
    own = str(GGUFFile.open(file).metadata["tokenizer.chat_template"]).encode()
    data, new = file.read_bytes(), template.encode()
    assert data.count(own) == 1 and len(new) + 4 <= len(own), "no room for that template"
    out.write_bytes(data.replace(own, new + b"{#" + b" " * (len(own) - len(new) - 4) + b"#}"))
    return out


@contextmanager
def serving(file: Path, log: Path) -> Iterator[tuple[subprocess.Popen, int]]:
    """A server and its port."""
    arguments = ["serve", file, "--port", "0", "--context", str(CONTEXT), "--parallel", "4"]
    with log.open("w") as errors:
        process = subprocess.Popen([sys.executable, "-m", "quantkit", *map(str, arguments)], stderr=errors)
    try:
        while not (found := re.search(r"http://127.0.0.1:(\d+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield process, int(found[1])
    finally:
        process.kill()
        process.wait()


def memory(pid: int) -> float:
    """MB of RSS."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1e3  # type: ignore[index]


def trial(attack: Attack, file: Path, seconds: float, folder: Path) -> tuple[dict[str, Bystander], float, float]:
    """The bystanders, MB that the server grew by, seconds until it had ended (-1: it had not)."""
    if attack.template:
        file = with_template(file, attack.template, folder / "other.gguf")
    with serving(file, folder / "log") as (process, port):
        assert all(post(port, path, ONE[path]) == 200 for path in attack.asks)
        before, stop = memory(process.pid), threading.Event()
        asking = {path: Bystander(port, path, stop) for path in attack.asks}

        def again() -> None:
            while not stop.is_set():
                attack.do(port)

        with ThreadPoolExecutor(attack.n + 2) as pool:
            doing = [pool.submit(again) for _ in range(attack.n)]
            time.sleep(0.5)
            waiting = [pool.submit(each.run) for each in asking.values()]
            time.sleep(seconds)
            stop.set()
            for each in waiting:
                each.result()
            grown, begin = memory(process.pid) - before, time.monotonic()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
                ended = time.monotonic() - begin
            except subprocess.TimeoutExpired:
                ended = -1
                process.kill()
            for each in doing:
                each.result()
    return asking, grown, ended


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--seconds", type=float, default=8, help="of each attack")
    parser.add_argument("--most", type=float, default=2, help="seconds that a bystander may wait")
    parser.add_argument("--only", default="", help="attacks with this in their name")
    args = parser.parse_args()
    failed, folder = 0, Path(tempfile.mkdtemp())
    print(f"{'attack':42} {'asked':>6} {'text, s':>8} {'chat, s':>8} {'bad':>4} {'MB':>6} {'end, s':>7}")
    for attack in ATTACKS:
        if args.only not in attack.name:
            continue
        asking, grown, ended = trial(attack, args.file, args.seconds, folder)
        bad = sum(len(each.bad) for each in asking.values())
        longest = {path: max(each.waits) for path, each in asking.items()}
        told = [f"{longest[path]:.2f}" if path in longest else "-" for path in (TEXT, CHAT)]
        asked = sum(len(each.waits) for each in asking.values())
        print(f"{attack.name:42} {asked:6} {told[0]:>8} {told[1]:>8} {bad:4} {grown:6.0f} {ended:7.2f}", flush=True)
        failed += bool(bad) or max(longest.values()) > args.most or ended < 0
    shutil.rmtree(folder)
    print(f"{failed} of the attacks reached a bystander")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
