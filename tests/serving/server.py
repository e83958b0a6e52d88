"""A server in a thread of the tests' process."""

import json
import threading
import time
from http.client import HTTPConnection

import openai
import uvicorn

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.serving import http
from quantkit.serving.gate import Gate

KEY = "secret"
CONTEXT = 512


class Running:
    """Its scheduler can be looked at."""

    def __init__(self, weights: GGUFWeights, n_slots: int = 8, gate: Gate | None = None, **settings):
        self.engine = open_engine(weights, n_slots, CONTEXT)
        tokenizer, gate = weights.tokenizer(), gate or Gate(KEY)
        self.api = http.Api("tiny", weights.file.metadata, tokenizer, self.engine, http.Settings(**settings), gate)
        self.listener = http.bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.server: uvicorn.Server = http.server(self.api)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.listener]})
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, **options) -> openai.OpenAI:
        given = {"base_url": f"http://127.0.0.1:{self.port}/v1", "api_key": KEY, "max_retries": 0, **options}
        return openai.OpenAI(**given)

    def ask(self, method: str, path: str, body: bytes | None = None, **headers) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        base = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request(method, path, body, base | {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
        connection.close()
        return found

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers) -> tuple[int, dict]:
        status, _, data = self.ask("POST", path, body, **headers)
        return status, json.loads(data)

    def wait_idle(self, seconds: float = 20) -> None:
        scheduler, end = self.api.scheduler, time.monotonic() + seconds
        while scheduler.running or scheduler.waiting:
            assert time.monotonic() < end, f"{len(scheduler.running)} jobs still run"
            time.sleep(0.01)
        assert sorted(scheduler.slots.free) == list(range(self.engine.n_slots))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.listener.close()
        assert not self.thread.is_alive() and not self.api.scheduler.thread.is_alive()
