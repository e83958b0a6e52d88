"""One process at a time works in a folder; a second one hears who is there; nothing outlives a kill."""

import errno
import fcntl
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.lock import NAME, locked
from quantkit.progress import say_once

HOLD = (
    "import sys, time; from pathlib import Path; from quantkit.formats.lock import locked\n"
    "with locked(Path(sys.argv[1]), shared=sys.argv[2] == 'shared'):\n"
    "    print('here', flush=True); time.sleep(60)"
)


@pytest.fixture
def hold():
    """Another process that has a folder."""
    running: list[subprocess.Popen] = []

    def begin(folder: Path, how: str = "alone") -> subprocess.Popen:
        running.append(
            subprocess.Popen([sys.executable, "-c", HOLD, str(folder), how], stdout=subprocess.PIPE, text=True)
        )
        assert running[-1].stdout.readline() == "here\n"
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.wait()


def test_a_second_process_hears_who_is_there(tmp_path, hold):
    other = hold(tmp_path)
    says = f"process {other.pid} on {socket.gethostname()} .*is at work here"
    for shared in (False, True):
        with pytest.raises(QuantkitError, match=says), locked(tmp_path, shared):
            pass
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    with locked(tmp_path), locked(tmp_path):  # within one process it may be asked for again
        assert f"process {os.getpid()} on" in (tmp_path / NAME).read_text()
    assert not list(tmp_path.iterdir())


def test_writers_of_one_small_file_go_together(tmp_path, hold):
    hold(tmp_path, "shared")
    with locked(tmp_path, shared=True):
        pass
    with pytest.raises(QuantkitError, match="at work here"), locked(tmp_path):
        pass


def test_a_folder_in_which_nothing_came_to_be_goes(tmp_path):
    with pytest.raises(ZeroDivisionError), locked(tmp_path / "new" / "job"):
        raise ZeroDivisionError
    assert not (tmp_path / "new" / "job").exists()
    with locked(tmp_path / "none", shared=True):
        assert not (tmp_path / "none").exists()


def test_what_killed_writers_left_is_removed(tmp_path):
    for name in ("plan.json.123.tmp", "mine.tmp", "plan.json"):
        (tmp_path / name).touch()
    with locked(tmp_path, shared=True):
        assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "mine.tmp", "plan.json"]


@pytest.mark.parametrize("host", ["this", "another"])
def test_without_locks_the_note_decides_and_that_is_said(tmp_path, hold, monkeypatch, capsys, host):
    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    say_once.cache_clear()
    other = hold(tmp_path)
    if host == "another":
        (tmp_path / NAME).write_text("process 1 on elsewhere (quantkit make)")
    says = "process 1 on elsewhere .* if that has ended, remove" if host == "another" else f"process {other.pid}"
    with pytest.raises(QuantkitError, match=says), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    if host == "this":
        with locked(tmp_path):
            assert "has no locks" in capsys.readouterr().err
