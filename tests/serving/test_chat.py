"""Text of tokens as they come, reasoning told apart, and a conversation that remembers."""

import pytest
from click.testing import CliRunner
from mutations import Model

from quantkit.__main__ import main
from quantkit.models.family import PRE
from quantkit.models.tokenizer import tokenize
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.runtime.engines.open import open_engine
from quantkit.runtime.generate import Sampling
from quantkit.runtime.sources.gguf import open_gguf
from quantkit.serving.chat import Conversation
from quantkit.serving.pieces import Pieces, thoughts


@pytest.fixture(scope="module")
def path(made):
    return next(made.glob("tiny-r1-*.gguf"))


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return read_tokenizer(tiny.path, PRE)


def test_pieces_join_to_the_text(tokenizer):
    text = "naïve 你好, 世界! 🙂🙃 end"
    pieces = Pieces(tokenizer)
    parts = [pieces.add(token) for token in tokenize(tokenizer, text)] + [pieces.rest()]
    assert "".join(parts) == text and not any("\ufffd" in part for part in parts)


def test_half_a_character_is_not_swallowed(tokenizer):
    pieces = Pieces(tokenizer)
    ids = tokenize(tokenizer, "🙂")
    assert len(ids) > 1 and [pieces.add(token) for token in ids[:-1]] == [""] * (len(ids) - 1)
    assert pieces.rest()


@pytest.mark.parametrize(
    ("stop", "expected"), [(["storm"], "a dark "), (["xyz"], "a dark stormy night"), (["k s", "dark"], "a ")]
)
def test_stop_strings(tokenizer, stop, expected):
    pieces = Pieces(tokenizer, stop)
    shown = ""
    for token in tokenize(tokenizer, "a dark stormy night"):
        shown += pieces.add(token)
        assert expected.startswith(shown)
    assert shown + pieces.rest() == expected
    assert pieces.stopped == (expected != "a dark stormy night")


def test_thoughts():
    def told(text: str, thinking: bool) -> tuple[str, str]:
        parts = list(thoughts(list(text), thinking))
        assert "".join(part for part, _ in parts) == text
        return "".join(part for part, own in parts if own), "".join(part for part, own in parts if not own)

    assert told("so</think>yes", True) == ("so</think>", "yes")
    assert told("a <think>b</think> c < d", False) == ("<think>b</think>", "a  c < d")
    assert told("never ends </thin", True) == ("never ends </thin", "")


def test_conversation_computes_only_what_is_new(path):
    def ask(talk: Conversation, text: str) -> str:
        return "".join(piece for piece, _ in talk.ask(text, 12))

    weights = open_gguf(path)
    talk, other = (Conversation(weights, open_engine(weights, 1, 512), Sampling(temperature=0)) for _ in range(2))
    ask(talk, "Tell me about the sea, the ships and the storms of winter.")
    first = len(talk.cached)
    pieces = talk.ask("Go on.", 12)  # left early, as by Ctrl-C
    assert next(pieces)[0] == "<think>\n" and next(pieces)
    pieces.close()
    prefilled = []
    talk.engine.prefill, compute = lambda *args: prefilled.append(args) or compute(*args), talk.engine.prefill
    other.messages = list(talk.messages)
    assert ask(talk, "And then?") == ask(other, "And then?")
    assert [turn["role"] for turn in talk.messages] == ["user", "assistant"] * 3
    assert len(prefilled) == 1 and prefilled[0][2] >= first // 2


def test_run_on_the_command_line(path):
    once = CliRunner().invoke(main, ["run", str(path), "-p", "The ", "-n", "8", "--temperature", "0"])
    assert once.exit_code == 0 and "tok/s" in once.stderr and once.stdout.strip()
    args = ["run", str(path), "-n", "8", "--context", "64"]
    talk = CliRunner().invoke(main, args, input="hello\n" + "word " * 80 + "\n/clear\nhello\n/exit\n")
    assert talk.exit_code == 0 and talk.stdout.count("<think>\n") >= 2
    assert "do not fit a context of 64; --context gives a larger one; /clear" in talk.stderr
    assert talk.stderr.count("answer") >= 2


def test_a_prompt_from_a_pipe(path):
    """All of it is one prompt, whatever its lines."""
    args = ["run", str(path), "-f", "-", "-n", "4", "--temperature", "0"]
    text = "Line one.\nLine two, naïve.\r\n"
    piped = CliRunner().invoke(main, args, input=text.encode())
    given = CliRunner().invoke(main, ["run", str(path), "-p", text, "-n", "4", "--temperature", "0"])
    assert piped.exit_code == 0 and piped.stdout == given.stdout
    wrong = CliRunner().invoke(main, args, input=b"\xe9")
    assert wrong.exit_code == 1 and "stdin: not UTF-8 text (byte 0)" in wrong.stderr


def test_a_long_prompt_is_no_silence(path):
    for n, said in ((100, False), (1200, True)):
        done = CliRunner().invoke(main, ["run", str(path), "-p", "x\n" * n, "-n", "1"])
        assert done.exit_code == 0 and (" tokens\n" in done.stderr and "reading " in done.stderr) == said


def test_the_end_of_the_context_is_said(path, capfd):
    full = CliRunner().invoke(main, ["run", str(path), "-p", "The ", "-c", "16", "-n", "40", "--temperature", "0"])
    assert full.exit_code == 0 and "the context of 16 tokens is full" in full.stderr
    weights = open_gguf(path)
    most = weights.config.n_context
    assert open_engine(weights, 1, most + 1).capacity == most
    assert f"was made for {most:,}, which it gets" in capfd.readouterr().err


@pytest.mark.parametrize("switch", ["thinking", "enable_thinking"])
def test_reasoning_is_switched_where_the_template_can(path, tmp_path, switch):
    """As DeepSeek-V3.1's template and Qwen3's; without the option it is the template's own default."""
    model = Model(path)
    template = "{{ messages[0].content }}{% if SWITCH is defined and SWITCH %}<think>{% else %}</think>{% endif %}"
    model.metadata["tokenizer.chat_template"] = template.replace("SWITCH", switch)
    file = str(model.write(tmp_path / "switched.gguf"))
    for options, thinks in ((["--thinking"], True), (["--no-thinking"], False), ([], False)):
        done = CliRunner().invoke(main, ["run", file, "--chat", "-p", "Hello", "-n", "2", *options])
        assert done.exit_code == 0 and done.stdout.startswith("<think>") == thinks, (options, done.output)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (
            ["--chat", "-p", "x", "--thinking"],
            "--thinking: this file's chat template reads neither thinking nor enable_t",
        ),
        (["--no-thinking"], "--no-thinking: this file's chat template reads neither thinking nor enable_thinking"),
        (["-p", "x", "--thinking"], "--thinking is for chats: add --chat"),
    ],
)
def test_a_switch_without_effect_is_refused(path, options, why):
    """R1's template always reasons."""
    done = CliRunner().invoke(main, ["run", str(path), *options], input="/exit\n")
    assert done.exit_code == 1 and why in done.stderr
