"""Files written whole and durably or not at all, and names that they get for good."""

import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import QuantkitError

TEMPORARY = re.compile(r".+\.\d+\.tmp")  # names that `replacing` writes under


def rename(part: Path, path: Path) -> None:
    """`part`, a file or link, takes the name `path`, in the same folder or another: its bytes first, then the name are
    on disk when this returns. Every file that a later run trusts gets its name here. OSError if that fails."""
    sync_file(part)
    os.replace(part, path)
    sync_folder(path.parent)
    if part.parent != path.parent:
        sync_folder(part.parent)


def rename_folder(part: Path, path: Path) -> None:
    """As `rename`, of a folder with all that is in it, under a name that is free or of an empty folder."""
    for inner, _, files in os.walk(part, topdown=False):
        for name in files:
            if not os.path.islink(os.path.join(inner, name)):
                sync_file(Path(inner, name))
        sync_folder(Path(inner))
    part.rename(path)
    sync_folder(path.parent)


def sync_file(path: Path) -> None:
    """Return when the file's bytes are on disk, whoever wrote them. OSError if they do not get there."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # as some network file systems answer
            raise
    finally:
        os.close(fd)


def make_folders(folder: Path) -> None:
    """The folder and its parents, durably. OSError if they cannot be made."""
    if folder.is_dir():
        return
    make_folders(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the `with` block ends without an error.

    Whatever ends the process or the machine, `path` holds its old bytes or the new ones; several processes may write
    it at once. OSError, naming `path`, if it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
        rename(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):  # what could not be made cannot be removed either
            part.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """QuantkitError if no file can be written under that name: heard before the work whose result it will be. It is
    tried, for permissions say little to root and nothing of the file system; what was made for that is removed."""
    new = [each for each in path.absolute().parents if not os.path.lexists(each)]
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666))
        part.unlink()
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write here ({error.strerror}); choose another place") from None
    finally:
        with suppress(OSError):
            for folder in new:
                folder.rmdir()


def write_whole(path: Path, data: bytes) -> None:
    """`data` as the file `path`, as `replacing` has it."""
    with replacing(path) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """As `write_whole`, in UTF-8. QuantkitError, naming `path`, if it cannot be written."""
    try:
        write_whole(path, text.encode(errors="backslashreplace"))
    except OSError as error:
        raise QuantkitError(f"{path}: cannot write ({error.strerror})") from None


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object for people and programs, as `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
