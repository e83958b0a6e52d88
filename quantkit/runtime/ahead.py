"""Reading while what was read before is computed with."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], ahead: int = 1) -> Iterator[Result]:
    """read(item) of all items in order, by one thread: while one result is looked at, the next `ahead` are on their
    way. Whoever stops early, or fails, waits only for the read that is under way."""
    with ThreadPoolExecutor(1) as reader:
        waiting = deque(reader.submit(read, item) for item in items[:ahead])
        try:
            for i in range(len(items)):
                result = waiting.popleft().result()
                if i + ahead < len(items):
                    waiting.append(reader.submit(read, items[i + ahead]))
                yield result
        finally:
            for future in waiting:
                future.cancel()
