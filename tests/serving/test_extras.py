"""Endpoints beside those that answer: tokens, what the server is, sums, the page, other pages."""

import json
import os
import re
import shutil
import time

import pytest
from patience import wait_for
from server import KEY, Running

from quantkit.errors import QuantkitError
from quantkit.models.tokenizer import tokenize
from quantkit.runtime.sources.gguf import GGUFWeights, open_gguf
from quantkit.serving.extras import page
from quantkit.serving.gate import Gate
from quantkit.serving.metrics import WAITING_LINES, Journal

PAGE = "https://chat.example"


@pytest.fixture(scope="module")
def weights(made) -> GGUFWeights:
    return open_gguf(next(made.glob("tiny-r1-*.gguf")), n_threads=1)


@pytest.fixture(scope="module")
def running(weights):
    gate = Gate(KEY, origins=(PAGE,))
    server = Running(weights, n_slots=2, gate=gate, aliases=("R1", "gpt-4"), parted=True)
    yield server
    server.wait_idle()
    server.stop()


def test_tokens_and_back(running, weights):
    text = "naïve 你好 <｜User｜>"
    ids = tokenize(weights.tokenizer(), text)
    for body, bos in (
        ({"content": text}, []),
        ({"content": text, "add_special": True}, [0]),
        ({"prompt": text}, [0]),
        ({"prompt": text, "add_special_tokens": False}, []),
    ):
        status, answer = running.post(json.dumps(body).encode(), "/tokenize")
        assert status == 200 and answer["tokens"] == bos + ids and answer["count"] == len(bos + ids), answer
    pieces = running.post(json.dumps({"content": text, "with_pieces": True}).encode(), "/tokenize")[1]["tokens"]
    assert [piece["id"] for piece in pieces] == ids
    back = running.post(json.dumps({"tokens": ids}).encode(), "/detokenize")[1]
    assert back == {"content": text, "prompt": text}
    for path, body, field in (
        ("/tokenize", {"content": text, "colour": 1}, "colour"),
        ("/tokenize", {}, "content"),
        ("/tokenize", {"content": "word " * 400_000}, None),
        ("/detokenize", {"tokens": [768]}, "tokens"),
        ("/detokenize", {"tokens": [1] * 300_000}, "tokens"),
    ):
        status, answer = running.post(json.dumps(body).encode(), path)
        assert status == 400 and answer["error"]["param"] == field, answer
    assert running.post(b"{}", "/tokenize", Authorization="")[0] == 401


def test_what_a_server_tells_of_itself(running):
    told = json.loads(running.ask("GET", "/props")[2])
    assert told["default_generation_settings"]["n_ctx"] == 512 and told["total_slots"] == 2
    assert told["model_alias"] == "R1" and told["bos_token"] == "<｜begin▁of▁sentence｜>"
    assert json.loads(running.ask("GET", "/tokenizer_info")[2])["eos_token"] == "<｜end▁of▁sentence｜>"
    assert [model.id for model in running.client().models.list()] == ["R1"]
    for name in ("R1", "gpt-4", "tiny"):
        running.client().completions.create(model=name, prompt=[0, 50], max_tokens=1)
    for path in ("/props", "/metrics", "/tokenizer_info"):
        assert running.ask("GET", path, Authorization="")[0] == 401


def test_reasoning_apart_where_the_server_says_so(running):
    ask = {"model": "R1", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 8}
    message = running.client().chat.completions.create(**ask).choices[0].message
    assert message.reasoning_content and "<think>" not in message.reasoning_content
    whole = running.client().chat.completions.create(**ask, extra_body={"reasoning_format": "none"})
    assert whole.choices[0].message.content == "<think>\n" + message.reasoning_content


def test_sums(running):
    def sums() -> dict[str, float]:
        text = running.ask("GET", "/metrics")[2].decode()
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        assert all(re.fullmatch(r'[a-z_]+(\{[a-z]+="[^"]+"(,[a-z]+="[^"]+")*\})? [\d.e+-]+', line) for line in lines)
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}

    before = sums()
    running.client().completions.create(model="R1", prompt=[0, 50, 60], max_tokens=4, extra_body={"ignore_eos": True})
    running.ask("GET", "/no/such/path/" + "x" * 1000)
    expected = (
        ("quantkit_prompt_tokens_total", 3),
        ("quantkit_completion_tokens_total", 4),
        ('quantkit_requests_total{path="completion",status="200"}', 1),
        ('quantkit_requests_total{path="other",status="404"}', 1),
        ("quantkit_first_token_seconds_count", 1),
    )
    wait_for(lambda: sums().get(expected[-2][0]))  # counted when its answer is on its way
    after = sums()
    for name, n in expected:
        assert after[name] - before.get(name, 0) == n, name
    assert after["quantkit_slots"] == 2


def test_the_log_stops_nobody():
    """Lines that nobody reads are dropped; refusals are one line a second."""
    journal = Journal()
    journal._write = lambda: time.sleep(0.5)
    for _ in range(3 * WAITING_LINES):
        journal.note("chat", 200, time.monotonic(), ())
    assert journal.lines.full()
    journal, lines = Journal(), []
    journal._line = lambda *parts: lines.append(parts)
    for _ in range(1000):
        journal.note("chat", 400, time.monotonic(), ())
    journal.told -= 10
    journal.note("chat", 429, time.monotonic(), ())
    assert len(lines) == 2 and "999 more were refused before" in lines[1]


def test_other_pages_ask_only_if_they_may(running):
    ask = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "authorization,content-type"}
    status, headers, _ = running.ask("OPTIONS", "/v1/chat/completions", Origin=PAGE, **ask)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    body = b'{"prompt": [0, 50], "max_tokens": 1}'
    status, headers, _ = running.ask("POST", "/v1/completions", body, Origin=PAGE)
    assert status == 200 and headers["access-control-allow-origin"] == PAGE
    other = "https://evil.example"
    assert running.ask("OPTIONS", "/v1/chat/completions", Origin=other, **ask)[0] == 400
    status, headers, _ = running.ask("POST", "/v1/completions", body, Origin=other)
    assert status == 403 and "access-control-allow-origin" not in headers
    with pytest.raises(QuantkitError, match=r"--cors \* lets every web page"):
        Gate.of("127.0.0.1", [], None, ["*"])
    assert Gate.of("127.0.0.1", [], "none", ["*"]).origins == ("*",) and not Gate.of("127.0.0.1", [], None).cors()
    for wrong in ("chat.example", "https://chat.example/", "null"):
        with pytest.raises(QuantkitError, match="write an origin"):
            Gate.of("127.0.0.1", [], None, [wrong])


def test_the_page_loads_nothing_from_elsewhere(running):
    status, headers, data = running.ask("GET", "/", Authorization="")
    text = data.decode()
    assert status == 200 and not re.search(r"https?://|//\w|src=|@import|url\(", text.replace("https://", "http://"))
    assert "default-src 'none'" in headers["content-security-policy"] and "innerHTML" not in text
    assert headers["content-security-policy"] == page()[1]


def browser() -> str | None:
    names = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("QUANTKIT_BROWSER") or next(filter(None, map(shutil.which, names)), None)


GROWS = """window.seen = [];  // every length that the answer has had
new MutationObserver(() => seen.push(document.querySelector('article.assistant:last-child')?.textContent.length ?? 0))
    .observe(document.querySelector('#talk'), {subtree: true, childList: true, characterData: true})"""
OUTSIDE = """[...document.querySelectorAll('header *, main *, form *, footer')].filter(e => {
    const box = e.getBoundingClientRect(); return box.width && (box.right > innerWidth + 1 || box.left < -1); })
    .map(e => e.tagName + '#' + e.id)"""


@pytest.fixture(scope="module")
def chromium():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not browser():
        pytest.skip("no Chromium or Chrome on this machine (or QUANTKIT_BROWSER)")
    with playwright.sync_playwright() as engine:
        window = engine.chromium.launch(executable_path=browser(), args=["--no-sandbox"])
        yield window
        window.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_the_page_in_a_browser(running, chromium, width, scheme):
    """Somebody types, and reads the answer while it is made; nothing is cut off, and nothing comes from elsewhere."""
    from playwright.sync_api import expect

    context = chromium.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    view, asked, errors = context.new_page(), [], []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    view.on("pageerror", lambda error: errors.append(str(error)))
    view.goto(f"http://127.0.0.1:{running.port}/")
    view.fill("#key", KEY)
    view.press("#key", "Tab")
    expect(view).to_have_title("R1")
    view.evaluate(GROWS)
    view.fill("#temperature", "0")
    view.fill("#text", "<b>Tell</b> me about the sea.")
    view.press("#text", "Enter")
    expect(view.locator("#speed")).to_contain_text("tok/s", timeout=30_000)
    expect(view.locator("#send")).to_be_visible()
    assert view.inner_text("article.user") == "<b>Tell</b> me about the sea."
    assert view.locator("article.assistant details").count() == 1
    assert len(set(view.evaluate("seen"))) > 5, "the answer came at once"
    view.fill("#text", "And then?")
    view.click("#send")
    expect(view.locator("article.assistant")).to_have_count(2)
    expect(view.locator("#send")).to_be_visible(timeout=30_000)
    assert view.evaluate(OUTSIDE) == [] and view.evaluate("document.documentElement.scrollWidth") <= width
    ink = view.evaluate("getComputedStyle(document.querySelector('article.user')).color")
    assert (ink == "rgb(255, 255, 255)") == (scheme == "dark"), ink
    assert all(url.startswith(f"http://127.0.0.1:{running.port}/") for url in asked)
    assert [error for error in errors if "401" not in error] == []
    if folder := os.environ.get("QUANTKIT_SCREENSHOTS"):
        view.screenshot(path=os.path.join(folder, f"chat-{width}-{scheme}.png"))
    view.click("#clear")
    assert view.locator("article").count() == 0
    context.close()
