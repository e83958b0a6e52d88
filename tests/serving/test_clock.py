"""When tokens come beside a prompt, by a clock that only moves when it is told."""

from collections.abc import Iterator
from itertools import cycle, islice

import pytest

from quantkit import progress
from quantkit.serving.clock import TOLD, Clock


class Watch:
    """A clock, and sequences that are decoding while a prompt is read: gaps between their tokens, in seconds."""

    def __init__(self) -> None:
        self.time, self.gaps = 0.0, list[float]()
        self.clock = Clock(lambda: self.time)

    def read(self, parts: Iterator[tuple[str, float]], step: float) -> None:
        """Parts of one piece, and steps of decoding where they are due, and at its end."""
        self.clock.begin()
        for what, seconds in parts:
            self.time += seconds
            if self.clock.due(what):
                self.decode(step)
        self.decode(step)

    def decode(self, step: float) -> None:
        begun = self.time
        self.time += step
        self.gaps.append(self.time - self.clock.tokens)
        self.clock.decoded(begun)


def parts(*kinds: tuple[str, float], n: int = 400) -> Iterator[tuple[str, float]]:
    return islice(cycle(kinds), n)


@pytest.mark.parametrize(
    "step, part, gap",
    [
        (0.002, 0.004, 0.06),  # a step that costs little: prompts are read until the aim
        (0.012, 0.004, 0.06),
        (0.016, 0.004, 0.08),  # four times as long as a step
        (0.03, 0.005, 0.08),  # as far as the gap allows it, less what is not foreseen
        (0.046, 0.002, 0.0828),  # prompts get nearly as long as a step, if that is more
        (0.06, 0.01, 0.108),
        (0.2, 0.005, 0.28),  # and no longer than the gap
        (0.01, 0.3, 0.31),  # a part that is longer than the gap: tokens after each
    ],
)
def test_how_far_apart_tokens_are(step, part, gap):
    watch = Watch()
    watch.read(parts(("experts", part)), step)
    later = watch.gaps[1:-1]  # nothing is known at the first
    assert max(later) <= gap + 1e-9
    assert min(later) > gap - part - 1e-9


def test_a_long_part_is_foreseen_by_what_comes_before_it():
    """Attention of a layer in many tiles, its experts in one launch; and a part that comes once."""
    layer = [*[("a tile of attention", 0.003)] * 9, ("attention", 0.006), ("feed-forward", 0.03)]
    watch = Watch()
    for _ in range(3):
        watch.read(parts(*layer), 0.012)
    assert max(watch.gaps[5:]) <= 0.06 + 0.006 and sorted(watch.gaps)[len(watch.gaps) // 2] > 0.04
    watch.gaps.clear()
    watch.read(iter([*layer[:3], ("a tile of attention", 0.1), *layer[3:], *layer]), 0.012)
    assert max(watch.gaps) == pytest.approx(0.009 + 0.1 + 0.012)


def test_most_of_the_time_is_the_prompts():
    """A step takes a fifth at most, until the gap is what counts."""
    for step in (0.001, 0.005, 0.012, 0.016):
        watch = Watch()
        watch.read(parts(("experts", 0.001), n=2000), step)
        assert len(watch.gaps) * step < 0.22 * watch.time


def test_the_longest_gaps_are_told(monkeypatch):
    watch = Watch()
    watch.read(iter([("embedding", 0.01), *parts(("experts", 0.004), n=3), ("attention", 0.2)]), 0.012)
    watch.read(parts(("experts", 0.004)), 0.012)
    assert len(watch.gaps) > TOLD and len(watch.clock.gaps.longest) == 1  # the others are as short as they should be
    watch.read(parts(("experts", 0.004)), 0.06)
    assert len(watch.clock.gaps.longest) == TOLD
    said = list[str]()
    watch.clock.gaps.tell(said.append)
    assert not said and not watch.clock.gaps.longest
    monkeypatch.setattr(progress, "_level", "verbose")
    watch.read(iter([("embedding", 0.01), *parts(("experts", 0.004), n=3), ("attention", 0.2)]), 0.012)
    watch.decode(0.5)  # without a prompt beside it: not a gap that anybody asks about
    watch.clock.gaps.tell(said.append)
    parts_of_it = "embedding 10, experts 12 (3, the longest 4), attention 200, the step 12"
    assert said == [f"tokens after 234 ms beside a prompt: {parts_of_it}"]
