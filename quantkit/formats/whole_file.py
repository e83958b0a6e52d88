"""Small files, written whole and durably or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, data: bytes) -> None:
    """Whatever ends the process, `path` holds its old bytes or these; several processes may write it at once.

    OSError, naming `path`, if it cannot be written.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        part.unlink(missing_ok=True)
