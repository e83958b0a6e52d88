"""Sizes as people write them and as they read them: GB is 10^9 bytes everywhere, GiB is 2^30."""

import re

from quantkit.errors import QuantkitError

POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
PATTERN = re.compile(r"(\d{1,15}(?:\.\d{1,9})?(?:E\d{1,2})?) ?([KMGT]?)(I?)B?")


def parse_size(text: str, option: str) -> int:
    """50G, 131GB, 122GiB, 123456, 1.4e11 -> bytes. QuantkitError, naming the option, for anything else."""
    found = PATTERN.fullmatch(text.strip().upper())
    if not found or (found[3] and not found[2]):
        raise QuantkitError(f"{option} {text}: not a size; write 50GB, 4096M or 122GiB")
    size = float(found[1]) * (1024 if found[3] else 1000) ** POWERS[found[2]]
    if size > 1e18:
        raise QuantkitError(f"{option} {text}: more than any disk holds")
    return int(size)


def gib(n_bytes: int) -> str:
    """Bytes for a table: GiB, or MiB or KiB if small."""
    if n_bytes < 1 << 17:
        return f"{n_bytes / 1024:.1f} KiB"
    return f"{n_bytes / (1 << 30):.1f} GiB" if n_bytes >= 1 << 27 else f"{n_bytes / (1 << 20):.1f} MiB"


def gb(n_bytes: float) -> str:
    """Bytes for a sentence: GB, or MB or kB if small."""
    if n_bytes < 1 << 17:
        return f"{n_bytes / 1e3:.1f} kB"
    return f"{n_bytes / 1e9:,.1f} GB" if n_bytes >= 1 << 27 else f"{n_bytes / 1e6:.1f} MB"


def both_units(n_bytes: int) -> str:
    """Bytes for a sentence, in the unit of shops and in that of programs: `140.2 GB, 130.6 GiB`."""
    return f"{gb(n_bytes)}, {gib(n_bytes)}"
