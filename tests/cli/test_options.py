"""The command line only translates: how many options it has, and what they are handed on as."""

import json

import click
import pytest
from click.testing import CliRunner

from quantkit.__main__ import main
from quantkit.cli.options import Shared
from quantkit.cli.values import OUT_FOLDER, FileSize, SizeOrBits, Tokens
from quantkit.errors import QuantkitError, needs
from quantkit.models.open import ModelRef
from quantkit.runtime.generate import Sampling

# 20 and 112; `make --dry-run`: what a job of hours takes is asked for before it begins; `run --system` and `-f`, which
# every program that runs GGUF files has; `hardware --gpu` and `--cpu`, of a machine that is still to be bought; `make
# --baseline`: how much better than ggml's encoder, a report says first; --no-mtp of `make` and `plan`, as llama.cpp's
# converter has it; our encoder in stages (`calibrate --moments`, and of `quantize --moments --encoder --effort
# --device`); `--json` of `inspect`, `plan` and `hardware`; `serve --alias`, `--cors`, `--reasoning-content`: what
# clients cannot be told otherwise; `evaluate`: how much is written, and where both run; the 8 of `compare`: which
# original, which text and how much of it, memory, where results lie, --json, and --device and --threads as of `verify`.
MOST, MOST_OF_ALL = 23, 149


def test_no_command_has_more_options_than_a_person_reads():
    counts = {
        name: sum(isinstance(parameter, click.Option) for parameter in command.params) - len(("--quiet", "--verbose"))
        for name, command in main.commands.items()
    }
    assert max(counts.values()) <= MOST and sum(counts.values()) <= MOST_OF_ALL, counts


def test_options_become_one_noun():
    @click.command()
    @Shared((click.option("--a"), Shared((click.option("--b"),), "inner", lambda b: f"<{b}>")), "both", dict)
    @click.option("--c")
    def command(both: dict[str, str], c: str) -> None:
        click.echo(f"{both} {c}")

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
        ("run", "FILE", "--seed", str(2**70)),
        ("plan", "tiny-r1", "--size", "infbpw"),
        ("plan", "tiny-r1", "--size", "1e400GB"),
    ],
)
def test_what_is_no_number_is_refused_by_its_option(call, tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(main, [str(tmp_path / "x.gguf") if word == "FILE" else word for word in call])
    assert done.exit_code in (1, 2) and isinstance(done.exception, SystemExit)
    said = done.output.splitlines()[-1]
    assert call[2] in said and (call[3] in said or f"{float(call[3]):.1f}" in said), done.output


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "-0.01", "100.5", "1e300", "hot"])
@pytest.mark.parametrize(("option", "most"), [("--temperature", 100), ("--top-p", 1), ("--min-p", 1)])
def test_how_tokens_are_drawn_has_bounds(option, most, value, tmp_path):
    """In one line, before the file is opened; and from Python."""
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    done = CliRunner().invoke(main, ["run", str(tmp_path / "x.gguf"), f"{option}={value}"])
    assert (done.exit_code, done.output) == (1, f"quantkit: {option} {value}: not a number from 0 to {most}\n")
    if value != "hot":
        with pytest.raises(QuantkitError, match=f"^{option[2:].replace('-', '_')} .*: not a number from 0 to {most}$"):
            Sampling(**{option[2:].replace("-", "_"): float(value)})


def test_tokens_may_be_thousands():
    kind = Tokens()
    assert kind.convert("32k", None, None) == 32768 and kind.convert("16384", None, None) == 16384
    for name in ("make", "calibrate", "sensitivity", "verify"):
        assert any(isinstance(p.type, Tokens) and p.name == "tokens" for p in main.commands[name].params), name


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (["inspect", "tiny-r1"], {"kind", "name", "model", "bytes", "types", "tensors"}),
        (["plan", "tiny-r1"], {"recipe", "file_bytes", "predicted_kld", "classes"}),
        (
            ["hardware", "tiny-r1", "--recipe", "Q4_K_M", "--ram", "1GB", "--vram", "0", "--bandwidth", "ram=10"],
            {"machine", "context", "plans"},
        ),
        (["hardware", "tiny-r1", "--ram", "1GB", "--vram", "0", "--bandwidth", "ram=10"], {"machine", "plans"}),
    ],
)
def test_programs_read_json(arguments, keys):
    done = CliRunner().invoke(main, [*arguments, "--json"])
    assert done.exit_code == 0 and keys <= json.loads(done.stdout).keys()


def test_a_folder_with_a_gguf_is_told_apart_from_a_checkpoint(tmp_path):
    for name in ("imatrix.gguf", "r1-00002-of-00002.gguf", "r1-00001-of-00002.gguf"):
        (tmp_path / name).touch()
    done = CliRunner().invoke(main, ["plan", str(tmp_path)])
    assert done.exit_code == 1 and f"for the model in {tmp_path}/r1-00001-of-00002.gguf give that file" in done.stderr


def test_a_refused_job_leaves_nothing(tmp_path, monkeypatch):
    imatrix = tmp_path / "begins.gguf"
    imatrix.write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    for arguments in (
        ["make", "-o", "a/b", "--memory", "1MB"],
        ["calibrate", "-o", "c/d/i.gguf", "--memory", "1MB", "--moments", "e/f"],
        ["sensitivity", "--imatrix", str(imatrix), "-o", "g/h"],
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1, done.output
        assert [path.name for path in tmp_path.iterdir()] == ["begins.gguf"], arguments
