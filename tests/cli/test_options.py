"""The command line only translates: how many options it has, and what they are handed on as."""

import subprocess
import sys

import click
import pytest

from quantkit.__main__ import main
from quantkit.cli.options import OUT_FOLDER, FileSize, Shared, SizeOrBits
from quantkit.errors import QuantkitError, needs
from quantkit.models.open import ModelRef

# 20 and 112; `make --dry-run`: what a job of hours takes is asked for before it begins; `run --system` and `-f`, which
# every program that runs GGUF files has; `hardware --gpu` and `--cpu`, of a machine that is still to be bought; `make
# --baseline`: how much better than ggml's encoder, a report says first. `serve --alias`, `--cors`,
# `--reasoning-content`: what clients cannot be told otherwise. `evaluate`: how much is written, and where both run.
MOST, MOST_OF_ALL = 22, 131


def test_no_command_has_more_options_than_a_person_reads():
    counts = {
        name: sum(isinstance(parameter, click.Option) for parameter in command.params) - len(("--quiet", "--verbose"))
        for name, command in main.commands.items()
    }
    assert max(counts.values()) <= MOST and sum(counts.values()) <= MOST_OF_ALL, counts


def test_help_needs_no_torch():
    """It answers at once: heavy modules are imported by the command that runs, wrong sizes refused before."""
    program = "import sys\nfrom quantkit.__main__ import main\ntry:\n main()\nfinally:\n print('torch' in sys.modules)"
    for arguments in (["--help"], ["make", "--help"], ["make", "--size", "much"], ["run", "--help"]):
        done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
        assert done.stdout.splitlines()[-1] == "False", (arguments, done.stderr)


def test_options_become_one_noun():
    @click.command()
    @Shared((click.option("--a"), Shared((click.option("--b"),), "inner", lambda b: f"<{b}>")), "both", dict)
    @click.option("--c")
    def command(both: dict[str, str], c: str) -> None:
        click.echo(f"{both} {c}")

    from click.testing import CliRunner

    assert CliRunner().invoke(command, ["--a", "1", "--b", "2", "--c", "3"]).output == "{'a': '1', 'inner': '<2>'} 3\n"
    assert [parameter.name for parameter in command.params] == ["a", "b", "c"]


def test_a_size_may_be_bits():
    kind = SizeOrBits()
    assert kind.convert("1.8bpw", None, None) == FileSize(bpw=1.8)
    assert kind.convert("131GB", None, None) == FileSize(size=131 * 10**9)
    for wrong in ("0bpw", "bpw", "33 bpw", "nanbpw"):
        with pytest.raises(QuantkitError, match="bits per weight"):
            kind.convert(wrong, None, None)


def test_a_missing_extra_is_named_with_its_command():
    with pytest.raises(QuantkitError, match=r"this needs nothing_of_that_name: pip install 'quantkit\[plots\]'"):
        with needs("plots"):
            import nothing_of_that_name  # noqa: F401


def test_home_is_the_home_folder(tmp_path, monkeypatch):
    """Shells leave --output=~/x alone."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert OUT_FOLDER.convert("~/made", None, None) == tmp_path / "made"
    assert ModelRef.parse("~/model").name == str(tmp_path / "model")


@pytest.mark.parametrize(
    "call",
    [
        ("run", "FILE", "--temperature", "nan"),
        ("run", "FILE", "--temperature", "inf"),
        ("run", "FILE", "--top-p", "nan"),
        ("run", "FILE", "--min-p", "nan"),
        ("run", "FILE", "--seed", str(2**70)),
        ("plan", "tiny-r1", "--size", "infbpw"),
        ("plan", "tiny-r1", "--size", "1e400GB"),
    ],
)
def test_what_is_no_number_is_refused_by_its_option(call):
    from click.testing import CliRunner

    done = CliRunner().invoke(main, [__file__ if word == "FILE" else word for word in call])
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    said = done.output.splitlines()[-1]
    assert call[2] in said and (call[3] in said or f"{float(call[3]):.1f}" in said), done.output
