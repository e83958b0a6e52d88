"""What is wrong with one continuation. All of them are judged alike, the original's and the file's."""

import ast
import json
import re
import warnings
from collections.abc import Sequence

from quantkit.serving.spoken import BEGIN, END

GRAMS = (4, 8, 16)
MOST_REPEATED = 0.5  # share of a text's n-grams that came before in it
CUT_LINES = 4  # at the end of code that was cut off, that may belong to one statement
INDENTED = re.compile(r"^(\s|$|[)\]}])")


def repeated(tokens: Sequence[int], n: int) -> float:
    """Share of n-grams that came before in the same text."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def thinks_without_end(text: str, begun: bool) -> bool:
    """Whether reasoning began and did not end. begun: the template began it."""
    return (begun or text.lstrip().startswith(BEGIN)) and END not in text


def parses(prompt: str, text: str, cut: bool) -> bool:
    """Whether the prompt and what was written is Python, up to where the text leaves the code that was asked for: a
    line at the margin that no other statement could be. cut: the text ended at the length limit."""
    lines = (prompt + text.partition("```")[0]).split("\n")
    first = prompt.count("\n") + 1
    end = next((i for i in range(first, len(lines)) if _leaves(lines[i])), len(lines))
    fewest = max(first, end - CUT_LINES) if cut and end == len(lines) else end
    return any(_is_python(code) for n in range(end, fewest - 1, -1) for code in _closed(lines[:n], cut))


def _closed(lines: list[str], cut: bool) -> list[str]:
    """The code, and as it would be with a body where it was cut off before one."""
    last = next((line for line in reversed(lines) if line.strip()), "")
    code = "\n".join(lines)
    indent = len(last) - len(last.lstrip()) + 4
    return [code, f"{code}\n{' ' * indent}pass"] if cut and last.rstrip().endswith(":") else [code]


def _leaves(line: str) -> bool:
    return not INDENTED.match(line) and not re.match(r"(def|class|if|for|while|import|from|@|#|\w+ ?[=(])", line)


def _is_python(code: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


def number(text: str) -> str | None:
    """The first one."""
    found = re.search(r"-?\d+", text)
    return found[0] if found else None


def is_call(text: str) -> bool:
    """Whether the first line is a call as JSON: a name, and arguments by name."""
    line = text.strip().partition("\n")[0]
    try:
        made = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(made, dict) and isinstance(made.get("name"), str) and isinstance(made.get("arguments"), dict)
