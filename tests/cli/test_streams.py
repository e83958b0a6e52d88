"""Terminals, services and containers as they are: streams that are closed, full or in another encoding, names that are
no text."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.cli.streams import text_of
from quantkit.errors import QuantkitError


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    """quantkit as `$Q`."""
    around = os.environ | {"Q": f"{sys.executable} -m quantkit"} | environment
    return subprocess.run(["bash", "-c", line], capture_output=True, env=around)


def test_an_encoding_that_lacks_characters():
    done = shell("$Q plan tiny-r1", PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and b"\\u" in done.stdout and not done.stderr, done
    assert "·".encode("latin-1") in done.stdout


@pytest.mark.parametrize(
    ("closed", "call"),
    [("<&-", "recipes"), (">&-", "recipes"), ("2>&-", "recipes"), ("<&- >&- 2>&-", "inspect tiny-r1")],
)  # the last opens files, and loads torch
def test_closed_streams(closed, call):
    done = shell(f"$Q {call} {closed}")
    assert done.returncode == 0 and b"Traceback" not in done.stderr
    assert (b"Bundled" in done.stdout) == (closed in ("<&-", "2>&-"))


def test_what_is_printed_to_a_closed_stream_lands_in_no_file(tmp_path):
    """The next file that is opened would have its number."""
    program = (
        "from quantkit.cli import streams\nstreams.make_usable()\nimport os\n"
        f"file = open({str(tmp_path / 'file')!r}, 'wb')\nos.write(1, b'x')\nos.write(2, b'y')\nassert file.fileno() > 2"
    )
    line = f'{sys.executable} -c "$P" <&- >&- 2>&-'
    assert subprocess.run(["bash", "-c", line], env=os.environ | {"P": program}).returncode == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_who_stops_reading_gets_no_traceback():
    done = shell("set -o pipefail; $Q plan deepseek-r1 --recipe unsloth-1.58bit | head -1")
    assert done.returncode in (0, 141) and done.stdout.startswith(b"deepseek-r1") and done.stderr == b""
    for call in ("recipes", "--help"):
        done = shell(f"$Q {call} > /dev/full")
        assert done.returncode == 1 and done.stderr == b"quantkit: No space left on device\n", done.stderr


def test_names_and_prompts_that_are_not_utf_8(made, tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/d\xff"))
    shutil.copytree(made, folder)
    file = next(folder.glob("tiny-r1-*.gguf"))
    shell_name = f"$'{os.fsencode(folder).decode('latin-1')}'".encode("latin-1")  # as typed, bytes and all
    for call in (b"run %s/*-r1*.gguf -p The -n 2", b"report %s", b"certify %s/*-r1*.gguf --no-oracle --no-values"):
        done = subprocess.run(
            [b"bash", b"-c", b"$Q " + call % shell_name],
            capture_output=True,
            env=os.environ | {"Q": f"{sys.executable} -m quantkit"},
        )
        assert done.returncode == 0 and b"Traceback" not in done.stderr, done.stderr
    assert (folder / "certify.json").exists() and file.exists()
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"quantkit", b"run", os.fsencode(file), b"-p", b"a\xff"], capture_output=True
    )
    assert done.stderr == b"quantkit: --prompt: this is not text: its bytes are not UTF-8\n"


def test_bytes_that_a_locale_could_not_decode_are_utf_8():
    typed = "naïve 你好".encode().decode("ascii", "surrogateescape")
    assert text_of(typed, "--prompt") == "naïve 你好" == text_of("naïve 你好", "--prompt")
    with pytest.raises(QuantkitError, match="--prompt: this is not text"):
        text_of("a\udcff", "--prompt")
