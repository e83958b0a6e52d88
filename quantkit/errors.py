"""The one exception that reaches a person as a single line."""

MAX_MESSAGE = 2000


class QuantkitError(Exception):
    """Bad input or an impossible request. The message names the file, tensor or option and says what to do.

    Whatever a hostile file put into it, it is one line of bounded length without control characters.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MAX_MESSAGE:
            half = MAX_MESSAGE // 2
            message = f"{message[:half]} [{len(message) - 2 * half:,} characters] {message[-half:]}"
        if not message.isprintable():
            message = "".join(c if c.isprintable() else " " if c in "\n\t" else repr(c)[1:-1] for c in message)
        super().__init__(message)
