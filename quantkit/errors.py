"""The one exception that reaches a person as a single line, and what counts as too little memory."""

from collections.abc import Iterator
from contextlib import contextmanager

MAX_MESSAGE = 2000


class QuantkitError(Exception):
    """Bad input or an impossible request. The message names the file, tensor or option and says what to do.

    Whatever a hostile file put into it, it is one line of bounded length without control characters.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            half = MAX_MESSAGE // 2
            message = f"{message[:half]} [{len(message) - 2 * half:,} characters] {message[-half:]}"
        super().__init__(printable(message))


def printable(text: str) -> str:
    """One line that a terminal only shows: its control characters as escapes. What strangers' files say goes through
    this."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in text)


def shown(text: str) -> str:
    """Lines that a terminal only shows: everything that is printed and may have come from a file goes through this."""
    return "\n".join(map(printable, text.split("\n")))


def out_of_memory(error: BaseException) -> str | None:
    """ "memory" or "GPU memory" if an error means that it ran out, else None: torch raises RuntimeErrors for both."""
    if type(error).__name__ == "OutOfMemoryError" or "CUDA out of memory" in str(error):
        return "GPU memory"
    return "memory" if isinstance(error, MemoryError) or "DefaultCPUAllocator: can't allocate" in str(error) else None


@contextmanager
def needs(extra: str) -> Iterator[None]:
    """Around imports of what an extra installs: if it is missing, the error says which command brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if str(error.name).split(".")[0] == "quantkit":
            raise
        raise QuantkitError(f"this needs {error.name}: pip install 'quantkit[{extra}]'") from None
