"""What a person finds out before any work: help in order, recipes, completion, and refusals at once."""

import os
import subprocess
import sys

from click.testing import CliRunner

from quantkit import progress
from quantkit.__main__ import main
from quantkit.cli.group import SECTIONS


def test_help_lists_every_command_once_in_the_order_of_use():
    listed = [name for names in SECTIONS.values() for name in names]
    assert sorted(listed) == sorted(main.commands)
    text = CliRunner().invoke(main, ["--help"], terminal_width=80).output
    places = [text.index(f"\n  {name} ") for name in listed]
    assert places == sorted(places) and "--dry-run" in text


def test_recipes_are_listed_and_shown():
    listed = CliRunner().invoke(main, ["recipes"]).output
    assert "1.58bit" in listed and "Within a budget" in listed
    shown = CliRunner().invoke(main, ["recipes", "1.58bit"]).output
    assert 'name = "1.58bit"' in shown and "[[rules]]" in shown


def test_a_shell_completes_recipes():
    words = {"_QUANTKIT_COMPLETE": "bash_complete", "COMP_WORDS": "quantkit make --recipe 1.5", "COMP_CWORD": "3"}
    program = "from quantkit.__main__ import main; main(prog_name='quantkit')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | words)
    assert done.stdout.splitlines() == ["plain,1.58bit"]


def test_a_plan_goes_to_stdout_alone():
    import json

    done = CliRunner().invoke(main, ["plan", "tiny-r1", "-o", "-"])
    assert json.loads(done.stdout)["model"] == "tiny-r1"


def test_every_command_can_be_quiet():
    try:
        done = CliRunner().invoke(main, ["plan", "tiny-r1", "-q", "--recipe", "1.58bit"])
        assert done.exit_code == 0 and progress._level == "quiet"
    finally:
        progress.set_level("normal")


def test_a_prompt_comes_from_a_file_and_a_chat_has_a_system_message(made, tmp_path):
    (tmp_path / "prompt.txt").write_text("It was a dark and")
    given = ["run", str(made), "--temp", "0", "-c", "1k", "-n", "4", "--device", "cpu"]
    typed = CliRunner().invoke(main, [*given, "-p", "It was a dark and"])
    read = CliRunner().invoke(main, [*given, "-f", str(tmp_path / "prompt.txt")])
    assert typed.exit_code == read.exit_code == 0 and typed.stdout == read.stdout != "\n", read.output
    plain, told = (
        CliRunner().invoke(main, [*given, "--chat", "-p", "Hello", *more]) for more in ([], ["--system", "Say seven."])
    )
    assert plain.exit_code == told.exit_code == 0 and plain.stdout != told.stdout
    refused = CliRunner().invoke(main, [*given, "-p", "Hello", "--system", "Say seven."])
    assert refused.exit_code == 1 and "--system is for chats: add --chat" in refused.output
    refused = CliRunner().invoke(main, [*given, "-p", "Hello", "-f", str(tmp_path / "prompt.txt")])
    assert refused.exit_code == 1 and "both give the prompt" in refused.output
