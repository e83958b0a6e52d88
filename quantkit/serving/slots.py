"""Which slot a sequence gets: the one whose cache holds most of its beginning, as the next turn of a chat finds it."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from quantkit.serving.jobs import Job

LEAST = 64  # tokens: fewer are not worth keeping; every chat begins with some that are alike


class Held(NamedTuple):
    """The tokens in a slot's cache, int64 [n], and how many of them came from a prompt: answers are rarely sent again
    as they were, R1's reasoning never."""

    tokens: np.ndarray
    n_prompt: int

    def shared(self, prompt: np.ndarray) -> int:
        """How many tokens a prompt, int64 [n], has in common with its beginning, all but the prompt's last: that one's
        logits are wanted."""
        most = min(len(self.tokens), len(prompt) - 1)
        differ = self.tokens[:most] != prompt[:most]
        return int(differ.argmax()) if differ.any() else most

    @property
    def worth(self) -> bool:
        """Whether it should stay as long as there is other room."""
        return len(self.tokens) >= LEAST


NOTHING = Held(np.empty(0, np.int64), 0)


class Slots:
    """The free slots of an engine, used longest ago first, and what the caches of all of them hold."""

    def __init__(self, n: int) -> None:
        self.free = list(range(n))
        self.held = [NOTHING] * n

    def give(self, job: "Job") -> None:
        """A free slot for a job; one that reuses begins behind the tokens that are there already.

        What another conversation left is cut off only if at least half of its prompt is shared, or if its turn has
        come: a system's message in common must not cost a long conversation its place."""
        slot, n = self._oldest(), 0
        if job.reuses:
            prompt = np.array(job.prompt, np.int64)
            shared = {each: self.held[each].shared(prompt) for each in self.free}
            fits = [each for each in self.free if 2 * shared[each] >= max(2 * LEAST, self.held[each].n_prompt)]
            slot = max(fits, key=shared.__getitem__, default=slot)
            n = shared[slot] if shared[slot] >= LEAST else 0
        self.free.remove(slot)
        self.held[slot] = NOTHING
        job.slot, job.done, job.reused = slot, n, n

    def take_back(self, job: "Job", sound: bool) -> None:
        """The slot is free again. sound: its cache holds what was computed; after an error nobody knows. Who may not
        reuse what others left leaves them nothing either."""
        tokens = job.prompt[: job.done] if job.left else job.prompt + job.made[:-1]  # the last one has been no input
        self.held[job.slot] = Held(np.array(tokens, np.int64), job.done) if sound and job.reuse else NOTHING
        self.free.append(job.slot)

    def _oldest(self) -> int:
        """The lowest that holds nothing worth keeping (neighbours in memory are cheaper to batch), else the one that
        was used longest ago."""
        return min((slot for slot in self.free if not self.held[slot].worth), default=self.free[0])
