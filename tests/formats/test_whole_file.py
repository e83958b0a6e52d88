"""Small files: whole or not at all."""

import os
import resource
import signal
from pathlib import Path

import pytest

from quantkit.errors import QuantkitError
from quantkit.formats.whole_file import check_writable, write_whole


def test_replaces_what_was_there_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "scores.json"
    write_whole(path, b"old")
    write_whole(path, b"new")
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == [path.name]


def test_a_full_disk_keeps_the_old_file_and_is_named(tmp_path):
    path = tmp_path / "scores.json"
    write_whole(path, b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            write_whole(path, bytes(1 << 17))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == [path.name]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_whole(tmp_path / "none" / "scores.json", b"new")
    assert caught.value.filename == str(tmp_path / "none" / "scores.json")


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    """A new folder will be made, by whoever writes; nothing that asking makes is left."""
    check_writable(tmp_path / "new" / "folder" / "scores.json")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").write_text("old")
    check_writable(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "old" and os.listdir(tmp_path) == ["file"]
    long = "x" * 300
    places = {tmp_path: "Is a directory", tmp_path / "file" / "a" / "scores.json": "Not a directory"}
    places |= {tmp_path / "new" / long: "File name too long", Path("/proc/none/scores.json"): "No such file"}
    for path, why in places.items():  # the last where the permissions of root, and of the folder, allow everything
        with pytest.raises(QuantkitError, match=rf"cannot write here \({why}.*; choose another place"):
            check_writable(path)
    assert os.listdir(tmp_path) == ["file"]
