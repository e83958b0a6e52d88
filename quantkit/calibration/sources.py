"""What `--data` may name: files, folders, datasets of a Hub; judged before anything heavy is loaded."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from quantkit.errors import QuantkitError

Domain = Literal["prose", "code", "math", "chinese", "dialogue", "text"]

DATASET = re.compile(r"(?P<place>[^:]+(?::[^:{}\s]*:[^:{}\s]*)?)(?::(?P<column>.+))?", re.DOTALL)
TEXT_SUFFIXES = (".txt", ".md", ".text", ".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Source:
    """place: a file, a folder, or `user/name:config:split`; column: with the text, or a template of columns."""

    domain: Domain
    place: str
    column: str

    @property
    def is_here(self) -> bool:
        """Whether it is a file or a folder; else a dataset."""
        return _exists(self.place)

    def files(self) -> list[Path]:
        """Those to read, sorted; none of a dataset. QuantkitError for a folder without text, and for a name that is
        nothing here and no dataset's."""
        path = Path(self.place)
        if not self.is_here:
            if self.place.count("/") != 1 or self.place.startswith((".", "/")) or path.suffix in TEXT_SUFFIXES:
                raise QuantkitError(f"--data {self.place}: no such file or folder (a dataset is user/name)")
            return []
        found = [p for p in sorted(path.rglob("*")) if p.suffix in TEXT_SUFFIXES] if path.is_dir() else [path]
        if not found:
            raise QuantkitError(f"{path}: no {' '.join(TEXT_SUFFIXES)} file in this folder")
        return found


def parse(given: str) -> Source:
    """`math=FILE:column` taken apart. A name that exists as it stands has no column in it."""
    domain, source = _domain(given)
    ends = [len(source), *(i for i in range(len(source) - 1, 0, -1) if source[i] == ":")]
    end = next((i for i in ends if _exists(source[:i])), None)
    if end is not None:
        place, column = source[:end], source[end + 1 :]
    else:
        found = DATASET.fullmatch(source)
        place, column = (found["place"], found["column"] or "") if found else (source, "")
    return Source(domain, place, column.replace("\\n", "\n") or "text")


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # a template may be too long for a name
        return False


def _domain(source: str) -> tuple[Domain, str]:
    """`math=FILE` -> math, FILE. A name that is no domain belongs to the path."""
    before, equals, after = source.partition("=")
    known = {name: name for name in get_args(Domain)}
    return (known[before], after) if equals and after and before in known else ("text", source)
