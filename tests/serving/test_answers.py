"""What clients get beside text: log probabilities of prompts, penalties, formats, calls of tools, reasoning apart."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from patience import within
from server import Running

from quantkit.runtime import draws
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Ask, Sampling, generate
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving.logits import Chance, Past, Penalties, TokenRules, likeliest
from quantkit.serving.markers import Prompt
from quantkit.serving.spoken import Spoken
from quantkit.serving.tools import OPENINGS, arguments, calls

PROMPT = [0, 50, 60, 70, 61, 300, 301]
HELLO = [{"role": "user", "content": "Tell me about the sea."}]


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


@pytest.fixture(scope="module")
def running(weights):
    server = Running(weights, parted=False)
    yield server
    server.wait_idle()
    server.stop()


def complete(running: Running, **body) -> dict:
    status, answer = running.post(json.dumps({"temperature": 0, **body}).encode(), "/v1/completions")
    assert status == 200, answer
    return answer


def chat(running: Running, **body) -> dict:
    status, answer = running.post(json.dumps({"messages": HELLO, "temperature": 0, **body}).encode())
    assert status == 200, answer
    return answer["choices"][0]


@pytest.mark.parametrize(("n", "off"), [(7, 0.2), (300, 0.3)])
def test_echo_tells_the_prompts_log_probabilities(running, weights, n, off):
    """As a prompt that ends there would tell it. A long one goes layer by layer, its last token through other products
    than the rest."""
    ids = (PROMPT * 50)[:n]
    answer = complete(running, prompt=ids, echo=True, logprobs=2, max_tokens=0)
    choice, told = answer["choices"][0], answer["choices"][0]["logprobs"]
    text = weights.tokenizer().decode(ids, skip_special_tokens=False)
    assert choice["text"] == text and choice["finish_reason"] == "length"
    details = {"cached_tokens": 0}
    assert answer["usage"] == {
        "prompt_tokens": n,
        "completion_tokens": 0,
        "total_tokens": n,
        "prompt_tokens_details": details,
    }
    assert told["token_logprobs"][0] is None and told["top_logprobs"][0] is None and len(told["tokens"]) == n
    assert told["text_offset"][:2] == [0, len("<｜begin▁of▁sentence｜>")]
    places = zip(told["tokens"], told["text_offset"], strict=True)
    assert all(text.startswith(part, at) or "\ufffd" in part for part, at in places)
    engine, bad = open_engine(weights, 1, 512), 0
    for at in range(1, 7) if n < 10 else (150, 200, 250, 299):
        row = engine.prefill(0, ids[:at], 0).log_softmax(-1)
        assert told["token_logprobs"][at] == pytest.approx(float(row[ids[at]]), abs=off)
        best = weights.tokenizer().decode([int(row.argmax())], skip_special_tokens=False)
        bad += best != max(told["top_logprobs"][at], key=told["top_logprobs"][at].get)
    assert bad <= n // 100


def test_echo_goes_on_with_the_answer(running):
    plain = complete(running, prompt="The ship", max_tokens=6, logprobs=1)["choices"][0]
    body = {"prompt": "The ship", "max_tokens": 6, "logprobs": 1, "echo": True, "temperature": 0}
    whole = complete(running, **body)["choices"][0]
    assert whole["text"] == "The ship" + plain["text"]
    told, n = whole["logprobs"], len(whole["logprobs"]["tokens"]) - 6
    assert told["token_logprobs"][n:] == plain["logprobs"]["token_logprobs"]
    assert [at - len("The ship") for at in told["text_offset"][n:]] == plain["logprobs"]["text_offset"]
    assert "".join(told["tokens"][:n]) == "The ship" and None not in told["token_logprobs"]  # BOS stood before
    streamed = list(running.client().completions.create(model="tiny", stream=True, **body))
    assert "".join(chunk.choices[0].text for chunk in streamed) == whole["text"]
    parts = [chunk.choices[0].logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [value for part in parts for value in part.token_logprobs] == told["token_logprobs"]


def test_an_end_counts_as_a_token_where_the_prompt_is_told(running):
    """lm-eval asks for one token and leaves the last entry out; an answer that ends at once must have one."""
    eos = running.engine.config.eos
    answer = complete(running, prompt=PROMPT, max_tokens=1, echo=True, logprobs=1, logit_bias={str(eos): 100})[
        "choices"
    ][0]
    assert answer["finish_reason"] == "stop" and len(answer["logprobs"]["tokens"]) == len(PROMPT) + 1
    assert answer["logprobs"]["text_offset"][-1] == len(answer["text"])


def test_more_log_probabilities_than_fit_are_refused(running):
    body = {"prompt": [[0] * 500] * 128, "echo": True, "logprobs": 20, "max_tokens": 0}
    status, answer = running.post(json.dumps(body).encode(), "/v1/completions")
    assert status == 400 and answer["error"]["message"].startswith("logprobs: 1,344,000 log probabilities")


def edited(logits: torch.Tensor, rules: TokenRules, prompt: list[int], made: list[int], ends: Sequence[int] = ()):
    """What the rules make of logits; tokens were made one by one."""
    own, past = logits.numpy(), Past(prompt, [])
    for token in made:
        rules.edits(own, past, ends)
        past.made.append(token)
    return Ask(Sampling(), 0.0, *rules.edits(own, past, ends)).edited(own).tolist()


def test_rules_apply_one_after_the_other():
    """Bias first, then penalties, whose tokens need not be the same; what must not come last of all."""
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5, 3.0, 0.0])
    inf = float("inf")
    both = Penalties(frequency=0.25, presence=1, repetition=2, repeat=4, last_n=2)
    for rules, expected in (
        (TokenRules(), logits.tolist()),
        (TokenRules(bias={5: 2.0, 0: -1.0}), [1, -2, 1, 0.5, 3, 2]),
        (TokenRules(bias={4: 1.0}, ignore_eos=True), [2, -2, 1, 0.5, -inf, 0]),
        (TokenRules(n_least=4, stop=frozenset({5})), [2, -2, 1, 0.5, -inf, -inf]),
        (TokenRules(n_least=3, stop=frozenset({5})), logits.tolist()),
        (TokenRules(banned=((0, 2, 3), (2, 0, 1), (9,), (5,))), [2, -2, 1, -inf, 3, -inf]),
        (
            TokenRules(bias={0: 2.0, 3: 1.0}, penalties=both, banned=((3,),)),
            [4 / 8 - 1.5, -4, 1 / 8 - 1.25, -inf, 3, 0],
        ),
    ):
        assert edited(logits, rules, [1], [0, 0, 2], [4]) == expected, rules


def test_penalties():
    logits = torch.tensor([2.0, -2.0, 1.0, 0.5])
    for penalties, expected in (
        (Penalties(frequency=1), [0.0, -2, 0, 0.5]),
        (Penalties(presence=1), [1.0, -2, 0, 0.5]),
        (Penalties(repetition=2), [1.0, -4, 0.5, 0.5]),
        (Penalties(repeat=2, last_n=2), [1.0, -2, 0.5, 0.5]),
        (Penalties(repeat=2, last_n=0), logits.tolist()),
        (Penalties(repeat=2, last_n=4), [1.0, -4, 0.5, 0.5]),
    ):
        assert edited(logits, TokenRules(penalties=penalties), [1], [0, 0, 2]) == expected, penalties
    chances = Chance.each(logits[None].expand(2, 4), [0, 3], 2)
    assert [c.token for c in chances] == [0, 3] and chances[1].best[0][0] == 0


def test_the_most_probable_tokens_are_found():
    generator = torch.Generator().manual_seed(4)
    for n_vocab in (1, 5, 700, 5000, 5120):
        logits = torch.randn(n_vocab, generator=generator).mul(8).round().div(4)  # many are alike
        logits[-1] = 9.0
        for n in {0, 1, min(3, n_vocab), min(18, n_vocab), n_vocab}:
            ids = likeliest(logits.numpy(), n)
            assert ids.tolist() == logits.argsort(descending=True, stable=True)[:n].tolist(), (n_vocab, n)
        total = draws.log_total(logits.numpy())
        mine, other = Chance.of(logits.numpy(), 0, 3, total), Chance.of(logits.numpy(), int(ids[0]), 1, total)
        whole = Chance.each(logits[None], [0], 3)[0]
        assert mine.logprob == pytest.approx(whole.logprob, abs=1e-5) and other.logprob == other.best[0][1]
        assert [p for _, p in mine.best] == pytest.approx([p for _, p in whole.best], abs=1e-5)


def test_penalties_reach_the_answer(running):
    base = {"prompt": "the the the the", "max_tokens": 40, "ignore_eos": True}
    plain = complete(running, **base)["choices"][0]["text"]
    for field, value in (
        ("frequency_penalty", 2),
        ("presence_penalty", 2),
        ("repetition_penalty", 5),
        ("repeat_penalty", 5),
    ):
        other = complete(running, **base, **{field: value})["choices"][0]["text"]
        assert other != plain, field
    off = complete(running, **base, repeat_penalty=5, repeat_last_n=0)["choices"][0]["text"]
    assert off == plain


SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["sea", "ship"]}, "n": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


def test_an_answer_keeps_its_schema(running):
    pytest.importorskip("llguidance")
    forms = (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}},
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        {"json_schema": SCHEMA},
    )
    for form in forms:
        answer = complete(running, prompt="A ship: ", max_tokens=400, n=2, **form)
        for choice in answer["choices"]:
            made = json.loads(choice["text"])
            assert choice["finish_reason"] == "stop" and made["name"] in ("sea", "ship") and 0 <= made["n"] <= 99
    any_json = complete(running, prompt="x", max_tokens=20, response_format={"type": "json_object"})["choices"][0]
    assert any_json["text"].lstrip().startswith("{")
    # R1's template begins with reasoning: that is free, and apart from what a program reads.
    end = running.api.tokenizer.token_to_id("</think>")
    told = chat(running, max_tokens=400, logit_bias={str(end): 100}, **forms[0])
    assert told["finish_reason"] == "stop" and json.loads(told["message"]["content"])["name"] in ("sea", "ship")
    assert "think>" not in json.dumps(told["message"])
    contradicted = {"prompt": "x", "logit_bias": [[i, False] for i in range(768)], "json_schema": SCHEMA}
    assert running.post(json.dumps(contradicted).encode(), "/v1/completions")[0] == 400


def test_without_the_library_one_line_says_so(running, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llguidance", None)
    body = {"prompt": "x", "response_format": {"type": "json_object"}}
    status, answer = running.post(json.dumps(body).encode(), "/v1/completions")
    assert status == 400 and "pip install 'quantkit[grammar]'" in answer["error"]["message"]


@pytest.fixture
def says(running, monkeypatch):
    """says(text): the next answer."""
    ids, ends = list[int](), running.engine.config.ends
    monkeypatch.setattr(draws, "tokens", lambda logits, asked: [ids.pop(0) if ids else ends[0] for _ in asked])
    return lambda text: ids.extend(running.api.markers.tokenize(Prompt(text)))


def test_reasoning_in_a_field_of_its_own(running, says):
    text = "It is wide </think>\n\nThe sea <is> wide."
    says(text)
    assert chat(running)["message"] == {"role": "assistant", "content": "<think>\n" + text}
    parts = {"reasoning_content": "It is wide ", "content": "The sea <is> wide."}
    for field in ({"reasoning_format": "deepseek"}, {"separate_reasoning": True}):
        says(text)
        assert chat(running, **field)["message"] == {"role": "assistant", **parts}, field
    says(text)
    chunks = running.client().chat.completions.create(
        model="tiny", messages=HELLO, stream=True, extra_body={"reasoning_format": "deepseek"}
    )
    deltas = [chunk.choices[0].delta for chunk in chunks]
    for field, wanted in parts.items():
        assert "".join(getattr(delta, field, None) or "" for delta in deltas) == wanted


@pytest.mark.parametrize("hard", ["multiple", "patterns"])
def test_a_schema_that_takes_gigabytes_is_refused(running, hard):
    """And others are answered meanwhile."""
    patterns = [{"type": "string", "pattern": f".*{a}.*{b}.*"} for a in "abcdef" for b in "ghij"]
    schema = {"multiple": {"type": "integer", "multipleOf": 99_999_989}, "patterns": {"allOf": patterns}}[hard]
    body = json.dumps({"messages": HELLO, "max_tokens": 1, "json_schema": schema}).encode()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(running.post, body)
        with within(5):
            chat(running, max_tokens=1)
        assert not asked.done()
        status, answer = asked.result()
    assert status == 400 and "takes more than a second" in answer["error"]["message"], answer


V31 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
R1 = "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>{}\n```json\n{}\n```<｜tool▁call▁end｜>"
KIMI = "<|tool_calls_section_begin|><|tool_call_begin|>functions.{}:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
HERMES = '<tool_call>\n{{"name": "{}", "arguments": {}}}\n</tool_call>'


@pytest.mark.parametrize("form", [V31, R1, KIMI, HERMES], ids=["V3.1", "R1", "Kimi", "Hermes"])
def test_calls_of_tools(form):
    told = form.format("search", '{"query": "the sea", "n": 2}')
    text = "<think>\nLet me look.</think>\n\nI search. " + told
    for size in (1, 5, 1000):
        spoken, fields = Spoken(parted=True, tools={}), {"reasoning_content": "", "content": ""}
        pieces = [spoken.add(text[at : at + size]) for at in range(0, len(text), size)] + [spoken.rest()]
        for key in fields:
            fields[key] = "".join(piece.get(key, "") for piece in pieces)
        assert fields == {"reasoning_content": "Let me look.", "content": "I search. "}, size
        (call,) = pieces[-1]["tool_calls"]
        assert call["function"]["name"] == "search" and call["index"] == 0
        assert json.loads(call["function"]["arguments"]) == {"query": "the sea", "n": 2}
    broken = text.replace('"the sea"', "the sea")
    spoken = Spoken(tools={})
    pieces = [spoken.add(broken), spoken.rest()]
    assert "".join(piece.get("content", "") for piece in pieces) == broken and not spoken.n_calls


GLM = "<tool_call>{}\n<arg_key>a</arg_key>\n<arg_value>1</arg_value></tool_call>"


@pytest.mark.parametrize("form", [V31, R1, KIMI, HERMES, GLM], ids=["V3.1", "R1", "Kimi", "Hermes", "GLM"])
def test_calls_before_the_cut_are_kept(form):
    """Wherever its length cuts the last of three: what is not whole of it is left out."""
    opening = next((mark for mark in OPENINGS[::2] if form.startswith(mark)), "")
    one = form.removeprefix(opening).removesuffix("<｜tool▁calls▁end｜>")
    first, last = opening + one.format("f", '{"a": 1}') + one.format("g", '{"a": 1}'), one.format("h", '{"a": 1}')
    for at in range(len(last) + 1):
        found = calls(first + last[:at], cut=True)
        assert found in ([(name, '{"a": 1}') for name in names] for names in ("fg", "fgh")), at
    spoken = Spoken(tools={})
    spoken.add(first + last[:-25])
    fields = spoken.rest(cut=True)
    assert [call["function"]["name"] for call in fields["tool_calls"]] == ["f", "g"] and "content" not in fields
    assert calls(opening + last[:-25], cut=True) is None  # there is none before it
    assert form is GLM or calls((first + last).replace(": 1", ": ", 1), cut=True) is None  # broken, not cut


def test_schemas_say_which_of_glms_arguments_are_text():
    """Which without one look like JSON."""

    def told(value: str, schema: object) -> object:
        given = arguments([{"function": {"name": "f", "parameters": {"properties": {"a": schema}}}}])
        ((_, found),) = calls(GLM.format("f").replace(">1<", f">{value}<"), given) or ()
        return json.loads(found)["a"]

    text = {"type": "string"}
    for value in ("007", "1", "true", "null", "[1]", '"x"', "1e400"):
        assert told(value, text) == value
    optional = {"anyOf": [text, {"type": "null"}], "title": "A"}
    for schema in (optional, {"type": ["string", "null"]}):
        assert (told("12", schema), told("null", schema), told("x y", schema)) == ("12", None, "x y")
    either = {"type": ["string", "integer"]}
    assert (told("12", either), told("1.5", either), told("true", either)) == (12, "1.5", "true")
    for schema in ({}, {"type": "integer"}, {"$ref": "#/$defs/A"}, {"type": 5, "anyOf": 5}, True):
        assert told("12", schema) == 12
    assert (
        told('"sea"', {"type": "string", "enum": ["sea"]}) == told("sea", {"type": "string", "enum": ["sea"]}) == "sea"
    )
    assert told("1" * 400, {"type": ["string", "number"]}) == int("1" * 400)
    assert arguments([{}, {"function": 5}, {"function": {"name": "f", "parameters": {"properties": []}}}]) == {}


def test_calls_as_glm_writes_them():
    two = (
        "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n<arg_key>b</arg_key>\n<arg_value>x y</arg_value>"
    )
    assert calls(f"{two}</tool_call><tool_call>g</tool_call>") == [("f", '{"a": 1, "b": "x y"}'), ("g", "{}")]
    assert calls("<tool_call>" + "[" * 100_000) is None and calls("<tool_call>") is None
    assert calls(two) is None and calls("<tool_call>g") is None  # cut short: arguments, or the name, may be missing
    assert calls(f"{two.removesuffix('</arg_value>')}</tool_call>") is None
    assert Spoken().add("<tool_call>") == {"content": "<tool_call>"}


@pytest.mark.parametrize(
    "begin", ["<｜tool▁call▁begin｜>", "<|tool_call_begin|>", "<tool_call>f<arg_key>", "<arg_key>"]
)
def test_calls_that_never_end_take_no_time(begin):
    """A logit bias can make a model say that, and the event loop waits."""
    told = "<｜tool▁call▁begin｜>function<｜tool▁sep｜>" + " ``` \n" * 50_000
    with within(3):
        assert calls("<tool_call>f" + begin * 50_000) is None
        assert calls(told + "x") is None


def test_arguments_that_no_client_can_read_are_text():
    for value in ("NaN", "-Infinity", r'"\ud800"'):
        assert calls(HERMES.format("f", f'{{"a": {value}}}')) is None, value
        assert calls(V31.format("f", f'{{"a": {value}}}')) is None or value[0] == '"'
    glm = "<tool_call>f<arg_key>a</arg_key><arg_value>NaN</arg_value></tool_call>"
    assert calls(glm) == [("f", '{"a": "NaN"}')]


def test_tools_where_the_template_describes_them(running, monkeypatch, says):
    template = (
        "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
        "{% if false %}<｜tool▁calls▁begin｜>{% endif %}"
    )
    monkeypatch.setattr(running.api, "metadata", {**running.api.metadata, "tokenizer.chat_template": template})
    tools = [{"type": "function", "function": {"name": "search", "parameters": {"type": "object"}}}]
    told = V31.format("search", '{"q": 1}')
    says(told)
    choice = chat(running, tools=tools)
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "search", "arguments": '{"q": 1}'}
    says(told)
    chunks = list(running.client().chat.completions.create(model="tiny", messages=HELLO, tools=tools, stream=True))
    (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert call.function.name == "search" and chunks[-1].choices[0].finish_reason == "tool_calls"
    says(text := told.replace("<｜tool▁calls▁end｜>", "<｜tool▁call▁begin｜>search<｜tool▁sep｜>{"))
    cut = chat(running, tools=tools, max_tokens=len(running.api.markers.tokenize(Prompt(text))))
    assert cut["finish_reason"] == "length" and len(cut["message"]["tool_calls"]) == 1 and not cut["message"]["content"]
    says(told)
    assert chat(running, tools=tools, tool_choice="none")["message"]["content"] == told
    body = {"messages": HELLO, "tools": tools, "parallel_tool_calls": False}
    assert running.post(json.dumps(body).encode())[0] == 400


FORMS = {
    "deepseek": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function ```json",
    "v3.1": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>",
    "kimi": "<|tool_calls_section_begin|>",
    "glm": "<tool_call><arg_key>",
    "hermes": "<tool_call>",
}
SEARCH = {
    "type": "object",
    "properties": {"words": {"enum": ["the sea", "a ship"]}, "n": {"type": "integer", "maximum": 9, "minimum": 0}},
    "required": ["words", "n"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_call_can_be_required(running, monkeypatch, form):
    """tiny-r1 knows of no tools: whatever it would say, it has to call one, as the template teaches to."""
    pytest.importorskip("llguidance")
    describes = "{% for tool in tools or [] %}{{ tool.function.name }} {% endfor %}{{ messages[0].content }}"
    template = f"{describes}{{% if false %}}{FORMS[form]}{{% endif %}}"
    monkeypatch.setattr(running.api, "metadata", {**running.api.metadata, "tokenizer.chat_template": template})
    tools = [{"type": "function", "function": {"name": "search", "parameters": SEARCH}}]
    tools.append({"type": "function", "function": {"name": "now"}})
    named = {"type": "function", "function": {"name": "search"}}
    for how in ({"tool_choice": named}, {"tool_choice": "required", "parallel_tool_calls": False}):
        choice = chat(running, tools=tools[: 1 + ("parallel_tool_calls" in how)], max_tokens=300, **how)
        assert choice["finish_reason"] == "tool_calls", choice
        (call,) = choice["message"]["tool_calls"]
        told = json.loads(call["function"]["arguments"])
        if call["function"]["name"] == "search":
            assert told["words"] in SEARCH["properties"]["words"]["enum"] and 0 <= told["n"] <= 9
    for wrong, says in (
        ({"tools": tools, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "no tool is called 'fly'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": tools, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave"),
        *(
            ({"tools": [{"type": "function", "function": {"name": name, "parameters": wrong}}]} | how, "tools: ")
            for name, wrong in (
                *(("f", {"type": "x"}), ("f", {"properties": {"a": [1]}}), ("f", {"properties": [], "required": 5})),
                ("no name", {}),  # the answer would be read as text
            )
        ),
    ):
        status, answer = running.post(json.dumps({"messages": HELLO, **wrong}).encode())
        assert status == 400 and says in answer["error"]["message"], answer


def test_what_leaves_no_token_is_the_clients_fault(running, weights):
    """400 with a line, not an error of the server."""
    pytest.importorskip("llguidance")
    texts = {token: weights.tokenizer().decode([token]) for token in range(weights.config.n_vocab)}
    needed = [token for token, text in texts.items() if "{" in text or not text.strip()]
    assert len(needed) <= 1024
    body = {"prompt": "a", "response_format": {"type": "json_object"}, "logit_bias": [[t, False] for t in needed]}
    for stream in (False, True):
        status, _, data = running.ask("POST", "/v1/completions", json.dumps({**body, "stream": stream}).encode())
        said = data.decode()
        assert status == (200 if stream else 400) and "no token continues the answer" in said, said
        assert "invalid_request_error" in said


def test_log_probabilities_are_bounded(running):
    status, answer = running.post(
        json.dumps({"prompt": [0, 50], "n": 128, "logprobs": 20, "max_tokens": 500}).encode(), "/v1/completions"
    )
    assert status == 400 and "are more than 524,288" in answer["error"]["message"]
    assert complete(running, prompt=[0, 50], n=2, logprobs=20, max_tokens=2)["usage"]["completion_tokens"] >= 2


def test_a_prompt_that_is_only_read(running, weights):
    made = list(generate(open_engine(weights, 1, 64), PROMPT, 4, Sampling(temperature=0)))
    assert complete(running, prompt=PROMPT, max_tokens=0)["choices"][0]["text"] == ""
    text = weights.tokenizer().decode(made, skip_special_tokens=False)
    assert complete(running, prompt=PROMPT, max_tokens=4)["choices"][0]["text"] == text
    full = [0] * 512
    assert complete(running, prompt=full, max_tokens=0)["usage"]["prompt_tokens"] == 512
