"""What a stranger's file says is shown, not obeyed."""

import sys

import hostile_gguf
from rich.console import Console

from quantkit import progress
from quantkit.cli import streams
from quantkit.cli.running import show_answer
from quantkit.evaluation.certificate import Certificate, Check
from quantkit.job.inspect import SHOWN, describe


def test_metadata_cannot_steer_the_terminal(tmp_path):
    model = hostile_gguf.model()
    model.metadata |= {"general.name": "a\x1b]0;title\x07\x1b[2J\r\nfake line\u202e", "general.x\x1b[31m": "y" * 10_000}
    text = describe(str(model.write(tmp_path / "m.gguf")))
    assert all(line.isprintable() for line in text.splitlines()) and "\\x1b]0;title\\x07" in text
    assert not any(line.startswith("fake") for line in text.splitlines())
    assert max(map(len, text.splitlines())) < SHOWN + 200 and "[10,000 characters]" in text


HOSTILE = "a\x1b]0;title\x07\x9b2J"


def test_all_that_is_printed_goes_through_one_place(capsys):
    progress.say(f"warning: {HOSTILE}")
    streams.show(f"first {HOSTILE}\nsecond")
    Console(file=sys.stdout).print(Certificate("llama.cpp", {HOSTILE: 1}, [Check("name", "fail", HOSTILE)]).table())
    said = capsys.readouterr()
    lines = (said.out + said.err).splitlines()
    assert all(line.isprintable() for line in lines) and "second" in lines
    assert sum("\\x1b]0;" in line for line in lines) >= 4


def test_a_model_cannot_steer_the_terminal_either(monkeypatch, capsys):
    show_answer(iter([(HOSTILE, False)]))
    assert capsys.readouterr().out == f"{HOSTILE}\n"  # into a file: the model's words
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    show_answer(iter([(f"{HOSTILE}\n\tüя　", False)]))
    assert capsys.readouterr().out == "a\\x1b]0;title\\x07\\x9b2J\n\tüя　\n"
