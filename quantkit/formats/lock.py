"""One lock of a folder, taken before anything is written there, so that a second process does not harm the first.

A flock on `.quantkit.lock` in the folder, which the system lets go of however the process ends. The file says who holds
it, and goes with the lock; one that a kill left behind means nothing. Ranks of one job share it: the first takes it.
"""

import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from quantkit import ranks
from quantkit.errors import QuantkitError
from quantkit.formats.whole_file import TEMPORARY
from quantkit.progress import say_once

NAME = ".quantkit.lock"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
MOST_COMMAND = 300  # characters of a command line that are told
PAUSE, TRIES = 0.05, 10  # while whoever has just taken it says who it is

_held: set[tuple[int, int]] = set()
"""Folders (device, inode) that this process has alone."""


@contextmanager
def locked(folder: Path, shared: bool = False) -> Iterator[None]:
    """Have the folder, which is made if need be, until the `with` block ends; within it the same process may ask again.

    shared: for who writes one small file and replaces it whole; they go together, but not with a job, which has the
    folder alone. If there is no folder, nothing is locked then. All ranks come here together.

    QuantkitError, naming who has it, if another process does. On a file system without locks only the note in the file
    stands between two processes, and that is said.
    """
    taken: list[_Lock] = []
    if ranks.count() == 1 or not shared:
        ranks.agree(lambda: taken.extend(_take(folder, shared)))
    try:
        yield
    finally:
        for lock in taken:
            lock.release()


def _take(folder: Path, shared: bool) -> "list[_Lock]":
    if shared and not folder.is_dir():
        return []
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        about = folder.stat()
        if (about.st_dev, about.st_ino) in _held:
            return []
        return [_Lock(folder, shared, made)]
    except OSError as error:
        if shared and error.errno in (errno.EROFS, errno.EACCES):
            return []  # whoever only reads there may; whoever writes will hear of it
        raise QuantkitError(f"{folder}: cannot write here ({error.strerror})") from None


class _Lock:
    """Taken when it is made."""

    def __init__(self, folder: Path, shared: bool, made: list[Path]):
        self.folder, self.path, self.shared, self.made = folder, folder / NAME, shared, made
        self.fd = self._open()
        about = folder.stat()
        self.key = about.st_dev, about.st_ino
        if not shared:
            _held.add(self.key)
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, _myself().encode(errors="backslashreplace"), 0)

    def _open(self) -> int:
        while True:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                self._flock(fd)
            except BlockingIOError:
                holder = _holder(fd)
                os.close(fd)
                raise _refused(self.folder, holder) from None
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    os.close(fd)
                    raise
                self._by_note(fd)
                return fd
            if self._is_there(fd):
                return fd
            os.close(fd)  # whoever had it has removed it in between

    def _flock(self, fd: int) -> None:
        """With nobody else there, what those left that were killed while they wrote is removed."""
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not self.shared:
                raise
        else:
            for left in self.folder.glob("*.tmp"):
                if TEMPORARY.fullmatch(left.name):
                    left.unlink(missing_ok=True)
        for more in reversed(range(TRIES if self.shared else 0)):  # another may be about to share it, as above
            try:
                return fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if not more:
                    raise
                time.sleep(PAUSE / TRIES)

    def _is_there(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self.path.stat())
        except FileNotFoundError:
            return False

    def _by_note(self, fd: int) -> None:
        """Without locks: refused if the file says that somebody has it who may be alive."""
        note = _read(fd)
        pid, host = _parts(note)
        if host and pid != os.getpid() and (host != socket.gethostname() or _alive(pid)):
            os.close(fd)
            hint = "" if host == socket.gethostname() else f"; if that has ended, remove {self.path}"
            raise QuantkitError(f"{_refused(self.folder, note)}{hint}")
        say_once(
            f"warning: {self.folder}: this file system has no locks: a second process that starts at the same moment "
            "is not noticed"
        )

    def release(self) -> None:
        """Let go. The file goes too, unless others share it; and folders that were made for it, if nothing came to
        be in them."""
        _held.discard(self.key)
        with suppress(OSError):
            if self.shared:
                with suppress(OSError):
                    fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.path.unlink()
            else:
                self.path.unlink()
        os.close(self.fd)
        with suppress(OSError):
            for folder in self.made:
                folder.rmdir()


def at_work(folder: Path) -> str:
    """Who has the folder, as the lock's file says: `process 4711 on ws1 (quantkit make)`; empty if nobody does who may
    be alive. Takes no lock, so that whoever only looks is in nobody's way."""
    try:
        fd = os.open(folder / NAME, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        note = _read(fd)
    finally:
        os.close(fd)
    pid, host = _parts(note)
    return note if host and (host != socket.gethostname() or _alive(pid)) else ""


def _refused(folder: Path, holder: str) -> QuantkitError:
    return QuantkitError(
        f"{folder}: {holder or 'another process'} is at work here; wait for it, or choose another folder"
    )


def _myself() -> str:
    command = " ".join(["quantkit", *map(shlex.quote, sys.argv[1:])])
    return f"process {os.getpid()} on {socket.gethostname()} ({command[:MOST_COMMAND]})"


def _holder(fd: int) -> str:
    """Who says in the file that it has it; a moment is given to somebody who has only just taken it."""
    note = ""
    for _ in range(TRIES):
        note = _read(fd)
        pid, host = _parts(note)
        if host and (host != socket.gethostname() or _alive(pid)):
            break
        time.sleep(PAUSE)
    return note


def _read(fd: int) -> str:
    return os.pread(fd, 4 * MOST_COMMAND, 0).decode(errors="replace").strip("\0\n ")


def _parts(note: str) -> tuple[int, str]:
    """Process and host of a note; (0, "") if it says nothing of the kind."""
    words = note.split(" ")
    if len(words) < 4 or words[0] != "process" or not words[1].isdecimal():
        return 0, ""
    return int(words[1]), words[3]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
