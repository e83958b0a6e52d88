"""The server over loopback, asked by the real openai client; and by clients that misbehave."""

import dataclasses
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import openai
import pytest
import uvicorn

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling, generate
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving import http

KEY = "secret"
CONTEXT = 512


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


class Running:
    """A server in a thread of this process: its scheduler can be looked at."""

    def __init__(self, weights: GGUFWeights, n_slots: int = 8, **limits):
        self.engine = open_engine(weights, n_slots, CONTEXT)
        tokenizer = weights.tokenizer()
        self.api = http.Api("tiny", weights.file.metadata, tokenizer, self.engine, http.Limits(**limits), KEY)
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

    def post(self, body: bytes, path: str = "/v1/chat/completions", **headers) -> tuple[int, dict]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        base = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        connection.request("POST", path, body, base | {k.replace("_", "-"): v for k, v in headers.items()})
        answer = connection.getresponse()
        found = answer.status, json.loads(answer.read())
        connection.close()
        return found

    def wait_idle(self, seconds: float = 20) -> None:
        scheduler, end = self.api.scheduler, time.monotonic() + seconds
        while scheduler.running or scheduler.waiting:
            assert time.monotonic() < end, f"{len(scheduler.running)} jobs still run"
            time.sleep(0.01)
        assert sorted(scheduler.free) == list(range(self.engine.n_slots))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.listener.close()
        assert not self.thread.is_alive() and not self.api.scheduler.thread.is_alive()


def endless(engine, monkeypatch) -> None:
    """No token ends a sequence."""
    monkeypatch.setattr(engine, "config", dataclasses.replace(engine.config, eos=-1))


@pytest.fixture(scope="module")
def running(weights):
    server = Running(weights)
    yield server
    server.wait_idle()
    server.stop()


HELLO = [{"role": "user", "content": "Tell me about the sea."}]


def test_models(running):
    assert [model.id for model in running.client().models.list()] == ["tiny"]
    assert running.client().models.retrieve("tiny").owned_by == "quantkit"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        running.client().models.retrieve("gpt-4")


def test_chat_and_its_stream_say_the_same(running):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = running.client().chat.completions.create(**ask)
    assert whole.choices[0].finish_reason in ("stop", "length")
    text = whole.choices[0].message.content
    assert text.startswith("<think>\n") and len(text) > 20
    chunks = list(running.client().chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len(chunks) > 10
    parts = [{"role": "user", "content": [{"type": "text", "text": HELLO[0]["content"]}]}]
    assert running.client().chat.completions.create(**ask | {"messages": parts}).choices[0].message.content == text


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_current_timestamp",
            "description": "Get the current Unix timestamp.",
            "parameters": {"properties": {}, "type": "object"},
        },
    },
    {
        "type": "function",
        "function": {
            "name": "search_notes",
            "description": "Search the user's notes.",
            "parameters": {
                "properties": {
                    "query": {"description": "What to look for", "type": "string"},
                    "count": {"default": 5, "type": "integer"},
                },
                "required": ["query"],
                "type": "object",
            },
        },
    },
]


@pytest.mark.parametrize(
    "body",
    [
        {"stream": True, "model": "tiny", "messages": HELLO, "tools": TOOLS},
        {
            "stream": True,
            "model": "tiny",
            "messages": [{"role": "system", "content": "Be brief."}, *HELLO],
            "temperature": 0.8,
            "top_p": 0.9,
            "top_k": 40,
            "min_p": 0.05,
            "seed": 42,
            "max_tokens": 60,
            "stop": ["END", "\n\n\n"],
            "frequency_penalty": 0,
            "presence_penalty": 0,
            "tools": TOOLS,
        },
        {
            "stream": True,
            "model": "tiny",
            "max_tokens": 40,
            "tools": TOOLS,
            "stream_options": {"include_usage": True},
            "messages": [
                *HELLO,
                {"role": "assistant", "content": "It is blue."},
                {"role": "user", "content": "And the sky?"},
            ],
        },
        {"stream": True, "model": "tiny", "messages": [*HELLO, *HELLO], "max_tokens": 40, "tools": TOOLS},
        {
            "stream": True,
            "model": "tiny",
            "messages": [*HELLO, {"role": "assistant", "content": "It is"}],
            "max_tokens": 40,
            "tools": TOOLS,
        },
        {
            "model": "tiny",
            "stream": False,
            "max_tokens": 100,
            "messages": [
                {"role": "user", "content": "### Task:\nGenerate a concise title summarizing the chat history."}
            ],
        },
    ],
    ids=["default", "all-settings", "second-turn", "turn-without-answer", "continue", "title"],
)
def test_requests_of_open_webui(running, body):
    """As Open-WebUI 0.12.4 sends them, shortened: its own tools come with every chat."""
    connection = HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request(
        "POST",
        "/v1/chat/completions",
        json.dumps(body),
        {
            "Authorization": f"Bearer {KEY}",
            "Content-Type": "application/json",
            "Accept": "*/*",
            "Accept-Encoding": "gzip, deflate, br",
        },
    )
    answer = connection.getresponse()
    raw = answer.read().decode()
    connection.close()
    assert answer.status == 200, raw
    if not body["stream"]:
        choice = json.loads(raw)["choices"][0]
        assert choice["message"]["content"].startswith("<think>\n") and "tool_calls" not in choice["message"]
        return
    events = [line.removeprefix("data: ") for line in raw.split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    deltas = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(delta["delta"].get("content", "") for delta in deltas).startswith("<think>\n")
    assert deltas[-1]["finish_reason"] in ("stop", "length")
    assert ("usage" in chunks[-1]) == ("stream_options" in body)


def test_fields_without_effect_are_accepted(running):
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 24}
    plain = running.post(json.dumps(ask).encode())[1]
    neutral = {
        "n": 1,
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "logit_bias": {},
        "logprobs": False,
        "repeat_penalty": 1.0,
        "repetition_penalty": 1,
        "mirostat": 0,
        "tfs_z": 1,
        "format": None,
        "tools": TOOLS,
        "tool_choice": "auto",
        "functions": [],
        "response_format": {"type": "text"},
        "reasoning_effort": "medium",
        "think": True,
        "continue_final_message": False,
        "add_generation_prompt": True,
        "user": "ann",
        "metadata": {"chat": "1"},
    }
    for field, value in neutral.items():
        status, answer = running.post(json.dumps({**ask, field: value}).encode())
        assert status == 200, (field, answer)
        assert (answer["choices"], answer["usage"]) == (plain["choices"], plain["usage"]), field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 0.5),
        ("repeat_penalty", 1.1),
        ("repetition_penalty", 1.1),
        ("mirostat", 1),
        ("tfs_z", 0.5),
        ("format", "json"),
        ("logit_bias", {"5432": 10}),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("tool_choice", {"type": "function", "function": {"name": "search_notes"}}),
        ("logprobs", True),
        ("response_format", {"type": "json_object"}),
        ("reasoning_effort", "low"),
        ("think", False),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(running, field, value):
    status, answer = running.post(json.dumps({"messages": HELLO, "max_tokens": 2, field: value}).encode())
    assert status == 400 and answer["error"]["message"].startswith(field)


def test_tools_are_refused_where_the_template_describes_them(running, monkeypatch):
    template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    monkeypatch.setattr(running.api, "metadata", {**running.api.metadata, "tokenizer.chat_template": template})
    ask = {"messages": HELLO, "max_tokens": 2}
    status, answer = running.post(json.dumps({**ask, "tools": TOOLS}).encode())
    assert status == 400 and answer["error"]["message"].startswith("tools: this file's chat template describes them")
    for harmless in ({}, {"tools": []}):
        assert running.post(json.dumps(ask | harmless).encode())[0] == 200


def test_completion_is_what_the_engine_gives(running, weights):
    prompt = [0, 50, 60, 70]
    made = list(generate(open_engine(weights, 1, 64), prompt, 20, Sampling(temperature=0)))
    answer = running.client().completions.create(model="tiny", prompt=prompt, temperature=0, max_tokens=20)
    assert answer.choices[0].text == weights.tokenizer().decode(made, skip_special_tokens=False)
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == len(made)


def test_seed_and_stop(running):
    def ask(**options) -> str:
        options = {"model": "tiny", "prompt": "The ", "max_tokens": 40, "temperature": 1.0} | options
        answer = running.client().completions.create(**options)
        return answer.choices[0].text, answer.choices[0].finish_reason

    text, _ = ask(seed=3)
    assert ask(seed=3)[0] == text != ask(seed=4)[0]
    stop = text[10:13]
    cut, why = ask(seed=3, stop=[stop])
    assert cut == text[: text.find(stop)] and why == "stop"
    assert ask(seed=3, extra_body={"top_k": 1}) == ask(temperature=0)
    assert ask(seed=3, extra_body={"min_p": 1.0}) == ask(temperature=0)


def test_wrong_key(running):
    with pytest.raises(openai.AuthenticationError):
        running.client(api_key="guess").models.list()
    assert running.post(b"{}", Authorization="")[0] == 401


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"messages": [', 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', 400, "role"),
        (b'{"messages": [{"role": "user", "content": 5}]}', 400, "content"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", '
            b'"image_url": {"url": "data:image/png;base64,iVBORw0K"}}]}]}',
            400,
            "1.type: Input should be 'text'",
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 3}', 400, "n:"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 9999}', 400, "do not fit the context"),
        (b'{"messages": [{"role": "user", "content": "x"}], "model": "gpt-4"}', 404, "gpt-4"),
        (b'{"messages": [{"role": "user", "content": "' + b"word " * 2000 + b'"}]}', 400, "do not fit the context"),
        (b" " * (5 << 20), 413, "longer than"),
    ],
)
def test_bad_requests(running, body, status, text):
    found, answer = running.post(body)
    assert found == status and text in answer["error"]["message"]


def test_other_refusals(running):
    assert running.post(b"{}", Content_Type="text/plain")[0] == 415
    assert running.post(b"{}", path="/v1/nothing")[0] == 404
    assert running.post(b'{"prompt": [999999]}', path="/v1/completions")[0] == 400
    with pytest.raises(openai.BadRequestError) as info:
        running.client().completions.create(model="tiny", prompt="word " * 2000)
    assert info.value.code == "context_length_exceeded"


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_hangs_up_ends_its_job(running, monkeypatch, stream):
    endless(running.engine, monkeypatch)
    body = {"prompt": [0, 50], "max_tokens": CONTEXT - 2, "temperature": 1.5, "stream": stream}
    connection = HTTPConnection("127.0.0.1", running.port)
    connection.request(
        "POST",
        "/v1/completions",
        json.dumps(body),
        {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"},
    )
    if stream:
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: {")
        answer.close()
    deadline = time.monotonic() + 20
    while not running.api.scheduler.running and time.monotonic() < deadline:
        time.sleep(0.001)
    job = running.api.scheduler.running[0]
    connection.close()
    running.wait_idle()
    assert job.cancelled and job.n_made < CONTEXT - 2


def test_200_parallel_requests(running):
    """All are answered, each with what it would get alone; afterwards nothing is left over."""
    client = running.client(timeout=120)
    prompts = [[0, 40 + i, 50] for i in range(10)]

    def ask(i: int) -> str:
        prompt = prompts[i % 10]
        return client.completions.create(model="tiny", prompt=prompt, max_tokens=4, temperature=0).choices[0].text

    alone = [ask(i) for i in range(10)]
    tasks = threading.active_count()
    with ThreadPoolExecutor(200) as pool:
        together = list(pool.map(ask, range(200)))
    assert together == alone * 20
    running.wait_idle()
    assert threading.active_count() <= tasks + 2


def test_full_queue_is_429(weights, monkeypatch):
    server = Running(weights, n_slots=1, queue=2)
    endless(server.engine, monkeypatch)
    body = json.dumps({"prompt": [0, 50], "max_tokens": 200, "temperature": 1.0}).encode()
    with ThreadPoolExecutor(12) as pool:
        found = [status for status, _ in pool.map(lambda _: server.post(body, path="/v1/completions"), range(12))]
    assert set(found) == {200, 429}
    server.wait_idle()
    server.stop()


def test_shutdown_ends_running_streams(weights, monkeypatch):
    monkeypatch.setattr(http, "SHUTDOWN_SECONDS", 0.2)
    server = Running(weights, n_slots=1)
    endless(server.engine, monkeypatch)
    stream = server.client().completions.create(
        model="tiny", prompt=[0, 50], max_tokens=500, temperature=1.5, stream=True
    )
    next(iter(stream))
    server.stop()
    assert not server.api.scheduler.running
