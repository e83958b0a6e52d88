"""No template hangs who renders it, fills the memory, or ends the process; and honest ones cost next to nothing."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from patience import wait_for, within

from quantkit.errors import QuantkitError
from quantkit.serving import renderer, sandbox
from quantkit.serving.renderer import Renderer, TooLong

CONVERSATION = {"messages": [{"role": "user", "content": "hi"}]}
DEEP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3


@pytest.fixture(scope="module")
def own():
    made = Renderer()
    yield made
    made.close()


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (DEEP, "takes more than 1 s"),
        ("{{ [1] | slice(10 ** 9) | list }}", "takes more than 1 s"),
        ("{{ 'a' * 10 ** 9 }}", "more than 256 MiB"),
        ("{{ 'a' | center(10 ** 9) }}", "more than 256 MiB"),
        ("{{ '%1000000000d' | format(1) }}", "more than 256 MiB"),
        ("{{ '{:>1000000000}'.format(1) }}", "more than 256 MiB"),
        ("{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}", "256 MiB"),
        ("{{ " + "(" * 9000 + "1" + ")" * 9000 + " }}", "recursion"),
        ("{% if 1 %}" * 2000 + "{% endif %}" * 2000, "recursion"),
        ("{% extends 'x' %}", "no loader"),
        ("{{ strftime_now(1) }}", "strftime"),
        ("{{ '\\ud800' }}", "not Unicode"),
        ("x" * (renderer.LONGEST + 1), "longer than"),
        ("{{ x.y.z }}", "undefined"),
    ],
)
def test_what_a_template_exceeds_is_said(own, template, what, monkeypatch):
    if "1 s" not in what:  # a busy machine may take that long to come to the limit
        monkeypatch.setattr(renderer, "SECONDS", 20)
    with within(5), pytest.raises(QuantkitError, match=f"^the file's chat template fails: .*{what}"):
        own.render(template, CONVERSATION)
    assert own.render("{{ messages[0].content }}", CONVERSATION) == "hi"  # the next one is served


def test_a_text_ends_at_its_limit(own):
    endless = "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}"
    with pytest.raises(TooLong, match="longer than 5,000 characters"):
        own.render(endless, CONVERSATION, 5000)
    assert own.render("{{ 'a' * 5000 }}", CONVERSATION, 5000) == "a" * 5000


def test_rendering_costs_little(own):
    times = []
    for _ in range(50):
        begin = time.perf_counter()
        own.render("{% for m in messages %}{{ m.content }}{% endfor %}", CONVERSATION)
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005  # others may compute meanwhile


def test_closing_ends_what_is_rendered():
    """Not when its time is over."""
    here, failed = Renderer(), []

    def hang() -> None:
        with pytest.raises(QuantkitError, match="renderer ended"):
            here.render(DEEP, CONVERSATION)
        failed.append(True)

    here.render("x", {})
    thread = threading.Thread(target=hang)
    thread.start()
    wait_for(here.lock.locked)
    here.close()
    thread.join(30)
    assert failed


def test_an_interrupted_call_does_not_answer_the_next(own, monkeypatch):
    receive = sandbox.receive

    def interrupted(connection):
        monkeypatch.setattr(sandbox, "receive", receive)
        raise KeyboardInterrupt

    own.render("x", {})
    monkeypatch.setattr(sandbox, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        own.render("first", {})
    assert own.render("second", {}) == "second"


def test_its_process_ends_with_its_parent():
    """Even if that is killed while a template is rendered; and it has none of the parent's secrets."""
    program = (
        "import threading, time; from quantkit.serving.renderer import Renderer; r = Renderer(); r.render('x', {})\n"
        f"threading.Thread(target=r.render, args=({DEEP!r}, {{}}), daemon=True).start(); time.sleep(0.1)\n"
        "print(r.process.pid, flush=True); import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    child, end = Path(f"/proc/{int(done.stdout)}"), time.monotonic() + 30
    while child.exists() and "Z" not in (child / "stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_its_process_has_no_secrets(own, monkeypatch):
    monkeypatch.setenv("QUANTKIT_API_KEY", "secret")
    here = Renderer()
    here.render("x", {})
    assert here.process and b"secret" not in Path(f"/proc/{here.process.pid}/environ").read_bytes()
    assert os.environ["QUANTKIT_API_KEY"] == "secret"
    here.close()
