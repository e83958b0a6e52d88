"""The server over loopback, asked by the real openai client; and by clients that misbehave."""

import contextlib
import dataclasses
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, RemoteDisconnected

import openai
import pytest
from mutations import Model
from patience import wait_for, within
from server import CONTEXT, KEY, Running

from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling, generate
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving import connections, http
from quantkit.serving.jobs import Job


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


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
        "reasoning_format": "none",
        "separate_reasoning": False,
        "repeat_last_n": 64,
        "parse_tool_calls": True,
        "think": True,
        "continue_final_message": False,
        "add_generation_prompt": True,
        "user": "ann",
        "metadata": {"chat": "1"},
        "stream": None,
        "max_completion_tokens": -1,
        "top_k": -1,
        "typical_p": 1,
        "top_logprobs": 0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "dry_multiplier": 0,
        "dry_base": 1.75,
        "dynatemp_range": 0,
        "samplers": "edskypmxt",
        "ignore_eos": False,
        "min_tokens": 0,
        "n_predict": 24,
        "bad_words": [],
        "stop_token_ids": [],
        "grammar": "",
        "json_schema": None,
        "guided_json": None,
        "structured_outputs": None,
        "parallel_tool_calls": True,
        "chat_template_kwargs": {"thinking": True},
        "enable_thinking": True,
        "thinking": {"type": "enabled"},
        "modalities": ["text"],
        "cache_prompt": True,
        "id_slot": -1,
        "timings_per_token": False,
        "keep_alive": "5m",
        "store": False,
        "service_tier": "auto",
        "whatever": None,
    }
    for field, value in neutral.items():
        status, answer = running.post(json.dumps({**ask, field: value}).encode())
        assert status == 200, (field, answer)
        assert (answer["choices"], answer["usage"]) == (plain["choices"], plain["usage"]), field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("frequency_penalty", 3),
        ("repeat_penalty", 0),
        ("mirostat", 1),
        ("tfs_z", 0.5),
        ("format", "json"),
        ("logit_bias", {"5432": 10}),  # not in the vocabulary
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("tool_choice", {"type": "function", "function": {"name": "search_notes"}}),
        ("top_logprobs", 2),
        ("grammar", 'root ::= "a"'),
        ("json_schema", {"type": "nonsense"}),
        ("response_format", {"type": "json_schema"}),
        ("response_format", {"type": "xml"}),
        ("response_format", {"type": "json_object", "ignore_eos": True}),
        ("max_tokens", 0),
        ("guided_choice", ["a", "b"]),
        ("structured_outputs", {"regex": "a+"}),
        ("xtc_probability", 0.5),
        ("dry_multiplier", 0.8),
        ("dynatemp_range", 0.5),
        ("samplers", ["top_k"]),
        ("audio", {"voice": "alloy", "format": "mp3"}),
        ("modalities", ["text", "audio"]),
        ("chat_template", "{{ messages }}"),
        ("chat_template_kwargs", {"thinking": False}),
        ("chat_template_kwargs", {"colour": "red"}),
        ("thinking", {"type": "disabled"}),
        ("reasoning_effort", "none"),
        ("stop_token_ids", [999999]),
        ("min_tokens", 3),
        ("logit_bias", {"5": 1e9}),
        ("stream_options", {"answer": 42}),
        ("no_such_field", 0),
        ("reasoning_effort", "low"),
        ("think", False),
        ("continue_final_message", True),
        ("add_generation_prompt", False),
    ],
)
def test_fields_that_would_change_the_answer_are_refused(running, field, value):
    status, answer = running.post(json.dumps({"messages": HELLO, "max_tokens": 2, field: value}).encode())
    assert status == 400, answer
    error = answer["error"]
    switch = {"json_schema": "response_format"}.get(field, field)
    switch = "thinking" if field in ("think", "reasoning_effort", "chat_template_kwargs") else switch
    assert error["message"].startswith((field, switch)), error
    assert error["param"] in (field, switch) and error["type"] == "invalid_request_error"


def test_tools_are_refused_where_calls_could_not_be_told(running, monkeypatch):
    template = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    monkeypatch.setattr(running.api, "metadata", {**running.api.metadata, "tokenizer.chat_template": template})
    ask = {"messages": HELLO, "max_tokens": 2}
    status, answer = running.post(json.dumps({**ask, "tools": TOOLS}).encode())
    assert status == 400 and "calls in its form are not known" in answer["error"]["message"]
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


def complete(running, **body) -> dict:
    body = {"prompt": [0, 50, 60, 70], "temperature": 0, "max_tokens": 12} | body
    status, answer = running.post(json.dumps(body).encode(), path="/v1/completions")
    assert status == 200, answer
    return answer


@pytest.fixture(scope="module")
def greedy(weights) -> list[int]:
    return list(generate(open_engine(weights, 1, 64), [0, 50, 60, 70], 12, Sampling(temperature=0)))


def test_what_a_request_asks_of_tokens(running, weights, greedy):
    text = weights.tokenizer().decode
    assert len(greedy) == 12
    whole = text(greedy, skip_special_tokens=False)
    assert (
        complete(running)["choices"][0]["text"]
        == complete(running, max_tokens=None, n_predict=12)["choices"][0]["text"]
    )
    once = next(i for i in range(4, 12) if greedy[i] not in greedy[:i])
    cut = complete(running, stop_token_ids=[greedy[once]])["choices"][0]
    assert (cut["text"], cut["finish_reason"]) == (text(greedy[:once], skip_special_tokens=False), "stop")
    later = complete(running, stop_token_ids=[greedy[once]], min_tokens=12)["choices"][0]
    assert later["finish_reason"] == "length" and later["text"].startswith(cut["text"]) and later["text"] != whole
    for banned in (
        {"logit_bias": {str(greedy[0]): -100}},
        {"logit_bias": [[greedy[0], False]]},
        {"bad_words": [text(greedy[:1], skip_special_tokens=False)]},
    ):
        assert not complete(running, **banned)["choices"][0]["text"].startswith(text(greedy[:1])), banned
    favoured = complete(running, logit_bias={"100": 100})["choices"][0]["text"]
    assert favoured == text([100] * 12, skip_special_tokens=False)
    stop = whole[3:5]
    held = complete(running, stop=stop, min_tokens=12)["choices"][0]
    assert held["text"] == whole and complete(running, stop=stop)["choices"][0]["text"] == whole[: whole.find(stop)]


def test_eos_ends_an_answer_unless_it_is_ignored(running, weights):
    eos = running.engine.config.eos
    ends = complete(running, logit_bias={str(eos): 100})
    assert (
        ends["choices"][0] | {"logprobs": None}
        == {
            "index": 0,
            "text": "",
            "logprobs": None,
            "finish_reason": "stop",
        }
        and ends["usage"]["completion_tokens"] == 0
    )
    for never in ({"ignore_eos": True}, {"min_tokens": 12}):
        on = complete(running, logit_bias={str(eos): 100}, **never)
        assert on["usage"]["completion_tokens"] == 12 and on["choices"][0]["finish_reason"] == "length"


def test_logprobs_are_the_models(running, weights, greedy):
    logits = open_engine(weights, 1, 64).prefill(0, [0, 50, 60, 70], 0)
    best = logits.log_softmax(-1).topk(3)
    told = complete(running, logprobs=3)["choices"][0]
    found, text = told["logprobs"], weights.tokenizer().decode
    assert found["tokens"] == [text([token], skip_special_tokens=False) for token in greedy]
    assert found["token_logprobs"][0] == pytest.approx(float(best.values[0]), abs=1e-5)
    tops = {text([int(i)], skip_special_tokens=False): float(v) for i, v in zip(best.indices, best.values, strict=True)}
    assert found["top_logprobs"][0] == pytest.approx(tops, abs=1e-5) and len(tops) == 3
    assert [told["text"][at:].startswith(t) for at, t in zip(found["text_offset"], found["tokens"], strict=True)] == [
        True
    ] * 12
    ask = {"model": "tiny", "messages": HELLO, "temperature": 0, "max_tokens": 8, "logprobs": True, "top_logprobs": 2}
    whole = running.client().chat.completions.create(**ask).choices[0]
    entries = whole.logprobs.content
    assert "<think>\n" + b"".join(bytes(each.bytes) for each in entries).decode() == whole.message.content
    assert all(each.logprob == each.top_logprobs[0].logprob and len(each.top_logprobs) == 2 for each in entries)
    chunks = running.client().chat.completions.create(**ask, stream=True)
    streamed = [each for c in chunks if c.choices[0].logprobs for each in c.choices[0].logprobs.content]
    assert streamed == entries
    cut = complete(running, logprobs=0, stop=[told["text"][6:8]])["choices"][0]
    assert "".join(cut["logprobs"]["tokens"]).startswith(cut["text"]) and len(cut["logprobs"]["tokens"]) < 12


def test_several_prompts_and_answers(running, weights):
    prompts = [[0, 50, 60, 70], [0, 80], [0, 90, 91]]
    alone = [complete(running, prompt=prompt)["choices"][0]["text"] for prompt in prompts]
    answer = complete(running, prompt=prompts)
    assert [c["text"] for c in answer["choices"]] == alone and [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 9
    assert complete(running, prompt=prompts[:1])["choices"][0]["text"] == alone[0]
    texts = complete(running, prompt=["The sea", "A ship"], echo=True)["choices"]
    assert [c["text"][:7] for c in texts] == ["The sea", "A ship" + texts[1]["text"][6:7]]
    many = complete(running, n=3, seed=5, temperature=1.0)
    first = complete(running, seed=5, temperature=1.0)["choices"][0]["text"]
    said = [c["text"] for c in many["choices"]]
    assert said[0] == first and len(set(said)) == 3 and many["usage"]["prompt_tokens"] == 4
    chunks = running.client().completions.create(
        model="tiny", prompt=prompts, temperature=0, max_tokens=12, stream=True, stream_options={"include_usage": True}
    )
    streamed, ends = ["", "", ""], []
    for chunk in chunks:
        for c in chunk.choices:
            streamed[c.index] += c.text
            ends += [c.index] if c.finish_reason else []
        usage = chunk.usage
    assert streamed == alone and sorted(ends) == [0, 1, 2] and usage.prompt_tokens == 9


def test_tools_in_a_conversation(running):
    """tiny-r1's template, as R1's, shows calls and their answers to the model."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        *HELLO,
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "tool_call_id": "1", "content": "42"},
    ]

    def n_prompt(*messages: dict) -> int:
        status, answer = running.post(json.dumps({"messages": messages, "max_tokens": 1}).encode())
        assert status == 200, answer
        return answer["usage"]["prompt_tokens"]

    more = messages[2] | {"content": "42 and much more of it"}
    assert n_prompt(*messages[:2], more) > n_prompt(*messages) > n_prompt(*HELLO)
    assert n_prompt(*HELLO, {"role": "assistant", "content": None}, *HELLO) > n_prompt(*HELLO)


def test_a_tool_message_that_a_template_leaves_out_is_refused(running, monkeypatch):
    template = "{% for m in messages if m.role != 'tool' %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(running.api, "metadata", running.api.metadata | {"tokenizer.chat_template": template})
    ask = {"messages": [*HELLO, {"role": "tool", "content": "x"}], "max_tokens": 1}
    status, answer = running.post(json.dumps(ask).encode())
    assert status == 400 and "leaves those of role tool out" in answer["error"]["message"]


def test_the_switch_of_a_template(running, monkeypatch):
    """As DeepSeek-V3.1's and Qwen3's, under every name that clients have for it."""
    template = "{{ messages[0].content }}{% if SWITCH %}<think>{% else %}</think>{% endif %}"
    for name in ("thinking", "enable_thinking"):
        metadata = running.api.metadata | {"tokenizer.chat_template": template.replace("SWITCH", name)}
        monkeypatch.setattr(running.api, "metadata", metadata)
        for field, on, off in (
            ("chat_template_kwargs", {"thinking": True}, {"enable_thinking": False}),
            ("thinking", {"type": "enabled"}, {"type": "disabled"}),
            ("enable_thinking", True, False),
            ("think", True, False),
        ):
            for value, opening in ((on, True), (off, False)):
                ask = {"messages": HELLO, "max_tokens": 1, field: value}
                status, answer = running.post(json.dumps(ask).encode())
                assert status == 200, answer
                assert answer["choices"][0]["message"]["content"].startswith("<think>") == opening, (name, ask)


def test_an_error_belongs_to_its_job(running, monkeypatch):
    """A temperature that nothing can be divided by is greedy; whatever fails in sampling ends one job only."""
    expected = complete(running)["choices"]
    assert complete(running, temperature=1e-300)["choices"] == expected
    assert complete(running, temperature=1e-5, top_p=1)["choices"] == expected
    whole = Job.ask
    monkeypatch.setattr(Job, "ask", lambda job, *rest: 1 / 0 if job.how.seed == 13 else whole(job, *rest))

    def ask(seed: int) -> int:
        body = {"prompt": [0, 50], "max_tokens": 60, "temperature": 1.0, "seed": seed, "ignore_eos": True}
        return running.post(json.dumps(body).encode(), path="/v1/completions")[0]

    with ThreadPoolExecutor(5) as pool:
        assert list(pool.map(ask, [1, 13, 2, 13, 3])) == [200, 500, 200, 500, 200]


def test_wrong_key(running):
    with pytest.raises(openai.AuthenticationError):
        running.client(api_key="guess").models.list()
    assert running.post(b"{}", Authorization="")[0] == 401


def test_a_page_with_another_name_is_refused(running):
    """DNS rebinding: on every path, before the key."""
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        for path in ("/v1/completions", "/health", "/nothing"):
            status, answer = running.post(b"{}", path, **headers)
            assert status == 403 and "is not a name of this server" in answer["error"]["message"]
    assert running.post(b"{}", Origin="http://localhost:3000")[0] == 400


def test_text_in_a_chat_is_text(running, monkeypatch):
    """Control tokens in messages are none to the model; in a completion's text they are."""
    taken, submit = [], running.api.scheduler.submit
    monkeypatch.setattr(running.api.scheduler, "submit", lambda job: taken.append(job.prompt) or submit(job))
    text = "a<｜end▁of▁sentence｜><｜Assistant｜>b</think>"
    status, _ = running.post(json.dumps({"messages": [{"role": "user", "content": text}], "max_tokens": 1}).encode())
    assert status == 200
    complete(running, prompt=text)
    ids = [running.api.tokenizer.token_to_id(name) for name in ("<｜end▁of▁sentence｜>", "<｜Assistant｜>", "</think>")]
    assert [[prompt.count(i) for i in ids] for prompt in taken] == [[0, 1, 0], [1, 1, 1]]


def test_a_template_that_hangs_hangs_nobody(weights, monkeypatch):
    """Neither completions nor the end of the server; each chat is refused after a while."""
    server = Running(weights, n_slots=2)
    loop = "{% for i in range(99999) %}"
    template = 3 * loop + 3 * "{% endfor %}"
    monkeypatch.setattr(server.api, "metadata", server.api.metadata | {"tokenizer.chat_template": template})
    chat = json.dumps({"messages": HELLO, "max_tokens": 1}).encode()
    status, answer = server.post(chat)
    assert status == 400 and "chat template fails: it takes more than 1 s" in answer["error"]["message"]

    def refused() -> bool:
        try:
            return server.post(chat)[0] in (400, 500, 503)
        except (ConnectionError, RemoteDisconnected):
            return True

    with ThreadPoolExecutor(8) as pool:
        hanging = [pool.submit(refused) for _ in range(8)]
        time.sleep(0.3)
        with within(2):
            assert server.post(b'{"prompt": [0, 50], "max_tokens": 1}', path="/v1/completions")[0] == 200
        with within(3):
            server.stop()
        assert all(each.result() for each in hanging)


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": "' + b"word " * 800_000 + b'"}',
        b'{"prompt": [' + b"5," * 1_900_000 + b"5]}",
        b'{"prompt": [' + b"[5]," * 900_000 + b"[5]]}",
        b'{"messages": [' + b'{"role":"user","content":""},' * 130_000 + b'{"role":"user","content":""}]}',
        b'{"messages": [{"role": "user", "content": ['
        + b'{"type":"text","text":""},' * 150_000
        + b'{"type":"text","text":""}]}]}',
        b'{"messages": [{"role": "user", "content": "' + b"<" * 4_000_000 + b'"}]}',
        b'{"prompt": "x", "bad_words": ["' + b"a" * 4_000_000 + b'"]}',
        b'{"prompt": "x", "logit_bias": {' + b",".join(b'"%d":1' % i for i in range(300_000)) + b"}}",
        b'{"prompt": "x", "stop": ["' + b"a" * 4_000_000 + b'"]}',
    ],
    ids=["text", "ids", "prompts", "messages", "parts", "content", "bad_words", "logit_bias", "stop"],
)
def test_an_oversized_request_stops_nobody(running, body):
    """Refused in less than a bystander would notice, which is asked meanwhile."""
    path = "/v1/completions" if b"prompt" in body[:20] else "/v1/chat/completions"
    with ThreadPoolExecutor(4) as pool:
        large = [pool.submit(running.post, body, path) for _ in range(4)]
        with within(2):
            assert running.post(b'{"prompt": [0, 50], "max_tokens": 1}', path="/v1/completions")[0] == 200
        assert {each.result()[0] for each in large} == {400}


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b'{"messages": [', 400, "Invalid JSON"),
        (b"\xff\xfe", 400, "Invalid JSON"),
        (b"{}", 400, "messages"),
        (b'{"messages": []}', 400, "messages"),
        (b'{"messages": [{"role": "tool"}]}', 400, "content: a message of role tool needs one"),
        (b'{"messages": [{"role": "function", "content": "x"}]}', 400, "role"),
        (b'{"messages": [{"role": "user", "content": "x", "prefix": true}]}', 400, "messages.0.prefix: true"),
        (b'{"messages": [{"role": "user", "content": 5}]}', 400, "content"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", '
            b'"image_url": {"url": "data:image/png;base64,iVBORw0K"}}]}]}',
            400,
            "1.type: Input should be 'text'",
        ),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "AA=="}}]}]}',
            400,
            'not "input_audio"',
        ),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 129}', 400, "n:"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": true}', 400, "seed: must be a number"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "Invalid JSON"),
        (b"[" * 100_000, 400, "Invalid JSON"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": -1}', 400, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 101}', 400, "less than or equal to 100"),
        (b'{"messages": [{"role": "user", "content": "x"}], "top_k": 9223372036854775808}', 400, "top_k"),
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
    status, answer = running.post(b"{}", path="/v1/embeddings")
    assert status == 404 and '"/v1/embeddings": no such path' in answer["error"]["message"]
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
    wait_for(lambda: running.api.scheduler.running)
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


def half_a_header(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    return connection


def test_a_header_that_does_not_come_is_not_waited_for(running, monkeypatch):
    monkeypatch.setattr(connections, "HEADER_SECONDS", 0.5)
    slow, kept = half_a_header(running.port), HTTPConnection("127.0.0.1", running.port, timeout=20)
    for _ in range(2):  # a whole request, and half of a second one on the same connection
        kept.request("GET", "/health")
        assert kept.getresponse().read() == b'{"status":"ok"}'
    kept.sock.sendall(b"GET /health HTTP/1.1\r\n")
    for waiting in (slow, kept.sock):
        with contextlib.suppress(ConnectionResetError):
            assert waiting.recv(100) == b""
        waiting.close()


def test_those_who_send_nothing_keep_nobody_out(weights, caplog):
    """Thrice as many as there is room for, some with half a body; whoever asks is answered at once, and running
    answers go on."""
    server = Running(weights, n_slots=2, connections=20)
    long = json.dumps({"prompt": [0, 50], "max_tokens": 300, "temperature": 0, "ignore_eos": True}).encode()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post, long, path="/v1/completions")
        while not server.api.scheduler.running:
            time.sleep(0.001)
        idle = []
        for i in range(60):
            connection = half_a_header(server.port)
            if i % 3 == 0:
                connection.sendall(
                    f"x\r\nAuthorization: Bearer {KEY}\r\nContent-Type: application/json\r\n"
                    'Content-Length: 100\r\n\r\n{"prompt'.encode()
                )
            idle.append(connection)
        with within(2):
            assert server.post(b'{"prompt": [0, 50], "max_tokens": 1}', path="/v1/completions")[0] == 200
        assert answer.result()[0] == 200
    assert len(server.server.server_state.connections) <= 20
    for connection in idle:
        connection.close()
    server.stop()


def test_the_log_does_not_grow_with_the_trouble():
    logger, lines = logging.getLogger("test.seldom"), []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger.addHandler(handler)
    with connections.seldom("test.seldom"):
        for i in range(1000):
            logger.warning("trouble %d", i)
        logger.warning("another")
        assert lines == ["trouble 0", "another"] and len(logger.filters) == 1
        logger.filters[0].last.clear()  # as after some time
        logger.warning("trouble %d", 1)
        assert lines[2:] == ["trouble 1 (999 more of these were left out)"]
    logger.warning("trouble %d", 2)  # a logger is everybody's in this process
    logger.warning("trouble %d", 3)
    assert lines[3:] == ["trouble 2", "trouble 3"] and not logger.filters


def test_a_server_that_has_ended_leaves_loggers_alone(weights):
    """Or what fails in a scheduler of somebody else in this process would be left out of the log."""
    log = logging.getLogger("quantkit.serving.scheduler")
    before = list(log.filters)  # of the server that other tests ask
    server = Running(weights, n_slots=1)
    assert len(log.filters) == len(before) + 1
    server.stop()
    assert log.filters == before


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


def test_a_split_file_is_served_under_the_name_of_the_whole(made, tmp_path):
    """`R1-00001-of-00003.gguf` is no model's name; and `~/model.gguf` is found."""
    first = Model(next(made.glob("tiny-r1-*.gguf"))).write(tmp_path / "tiny-split.gguf", split_max_bytes=3_000_000)
    assert first.name.startswith("tiny-split-00001-of-")
    command = [sys.executable, "-m", "quantkit", "serve", f"~/{first.name}", "--port", "0", "--device", "cpu"]
    environment = os.environ | {"HOME": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "http://" in line), "")
        assert line.startswith("tiny-split: http://127.0.0.1:"), line
        connection = HTTPConnection("127.0.0.1", int(line.split("127.0.0.1:")[1].split("/")[0]), timeout=30)
        connection.request("GET", "/v1/models")
        answer = json.loads(connection.getresponse().read())
        connection.close()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
    assert [model["id"] for model in answer["data"]] == ["tiny-split"]
