"""Which text recovery trains on, in which order, and which it is judged by."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quantkit.calibration.corpus import spread

RETOLD = "dialogue"  # of the bundled mix: passages of the other domains once more
PASSES = 8  # over a text: tiny-r1 at 16,384 tokens does better by 8 than by 4 or 30 (docs/results/encoders.md)
LEAST, MOST = 1 / 20, 1 / 4  # share of the chunks that is held back


@dataclass(frozen=True)
class Split:
    """Numbers of chunks. held: to judge by; train: all others that may be trained on. about: what is held, in words."""

    held: tuple[int, ...]
    train: tuple[int, ...]
    about: str

    @classmethod
    def of(cls, domains: Sequence[str]) -> "Split":
        """domains: of each chunk. Whole domains are held back, from the rarest on: tuning on the others shows there
        when it begins to learn them by heart. Where no domains are that rare, chunks spread over the text."""
        n, counts = len(domains), Counter(domains)
        if n == 1:
            return cls((0,), (0,), "the only chunk, which is trained on too: give more text")
        rarest = sorted((count, name) for name, count in counts.items() if name != RETOLD)
        chosen: list[str] = []
        for _, name in rarest[:-1]:
            if sum(counts[name] for name in chosen) < LEAST * n:
                chosen.append(name)
        held = [i for i in range(n) if domains[i] in chosen]
        if not LEAST * n <= len(held) <= MOST * n:
            held = sorted(spread(n)[: max(1, round(LEAST * n))])
            about = f"{len(held)} chunks spread over the text, of no other domain than it trains on"
        else:
            about = f"{len(held)} chunks of {' and '.join(sorted(chosen))}, on which it does not train"
        return cls(tuple(held), tuple(i for i in range(n) if i not in set(held)), about)

    def batches(self, steps: int, size: int) -> list[torch.Tensor]:
        """Chunks of every step, int64 [size or all]: the text in a random order, then again in another, but no more
        than PASSES times: then fewer steps."""
        size = min(size, len(self.train))
        steps = min(steps, PASSES * len(self.train) // size)
        generator = torch.Generator().manual_seed(0)
        order, n_orders = torch.tensor(self.train), -(-steps * size // len(self.train))
        turns = [order[torch.randperm(len(order), generator=generator)] for _ in range(n_orders)]
        return list(torch.cat(turns)[: steps * size].split(size))
