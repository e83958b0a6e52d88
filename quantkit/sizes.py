"""Sizes as people write them."""

import re

from quantkit.errors import QuantkitError

POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
PATTERN = re.compile(r"(\d{1,15}(?:\.\d{1,9})?(?:E\d{1,2})?) ?([KMGT]?)(I?)B?")


def parse_size(text: str, option: str, unit: int = 1000) -> int:
    """50G, 131GB, 122GiB, 123456, 1.4e11 -> bytes. unit: what K is; with an i it is always 1024."""
    found = PATTERN.fullmatch(text.strip().upper())
    if not found or (found[3] and not found[2]):
        raise QuantkitError(f"{option} {text}: not a size; write 50G, 4096M or 122GiB")
    size = float(found[1]) * (1024 if found[3] else unit) ** POWERS[found[2]]
    if size > 1e18:
        raise QuantkitError(f"{option} {text}: more than any disk holds")
    return int(size)


def parse_memory(text: str, option: str) -> int:
    """As parse_size, but GB is 2^30 bytes, as RAM and VRAM are sold and the published GGUF files are named
    (Unsloth's 131 GB are 140.2e9 bytes)."""
    return parse_size(text, option, 1024)


def gib(n_bytes: int) -> str:
    """Bytes for a table: GiB, or MiB if small."""
    return f"{n_bytes / (1 << 30):.1f} GiB" if n_bytes >= 1 << 27 else f"{n_bytes / (1 << 20):.1f} MiB"
