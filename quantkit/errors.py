"""The one exception that reaches a person as a single line."""


class QuantkitError(Exception):
    """Bad input or an impossible request. The message names the file, tensor or option and says what to do."""
