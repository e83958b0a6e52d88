"""Small files, written whole and durably or not at all."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from quantkit.errors import QuantkitError


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the `with` block ends without an error.

    Whatever ends the process, `path` holds its old bytes or the new ones; several processes may write it at once.
    OSError, naming `path`, if it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)


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
