"""What a sequence of DeepSeek-V4 keeps of its tokens, so that later ones need not compute them again.

Keys, of which a window is looked at; entries of all whole blocks; and what the next entries will be made of: the rows
of the block that is not whole, and of the block before where an entry reaches into it. Some keys behind the window are
kept so that a sequence can be taken back to an earlier token.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quantkit.models.config import ModelConfig
from quantkit.runtime.rotation import Angles

KEPT = 1 << 16  # positions behind the window: as far as a text is taken back without computing all of it again
OVERLAPPING = 4  # the ratio whose entries reach into the block before


@dataclass
class Blocks:
    """What a layer's compressor made, and rows that it will make more of. entries [1, capacity / ratio, width], of
    which the first n are there; kv, gate float32 [1, k, m]: rows of the tokens from `start` on."""

    ratio: int
    entries: torch.Tensor
    n: int = 0
    start: int = 0
    rows: tuple[torch.Tensor, torch.Tensor] | None = None

    def take(self, kv: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Rows [1, t, m] of the next tokens are there: those of all blocks that became whole, [1, (lead + n) ratio, m],
        and how many blocks before them lead, of which entries are known already."""
        if self.rows is not None:
            kv, gate = (torch.cat(both, dim=1) for both in zip(self.rows, (kv, gate), strict=True))
        whole = max(self.n, (self.start + kv.shape[1]) // self.ratio)
        first = self._first(self.n)
        found = slice(first * self.ratio - self.start, whole * self.ratio - self.start)
        if whole == self.n:
            found = slice(0, 0)
        kept = min(max(0, self._first(whole) * self.ratio - self.start), kv.shape[1])
        self.rows = kv[:, kept:].clone(), gate[:, kept:].clone()
        self.start += kept
        return kv[:, found], gate[:, found], self.n - first

    def add(self, entries: torch.Tensor) -> torch.Tensor:
        """The next entries [1, n, width]; all so far."""
        end = self.n + entries.shape[1]
        self.entries[:, self.n : end] = entries
        self.n = end
        return self.entries[:, :end]

    def back(self, block: int, start: int) -> None:
        """Forget entries of the tokens from `block` on, and all rows: those from `start` on will come again."""
        self.n, self.start, self.rows = block // self.ratio, start, None

    def _first(self, n: int) -> int:
        """The first block that entry n is made of."""
        return max(0, n - 1) if self.ratio == OVERLAPPING else n


@dataclass
class CompressedCache:
    """Of one layer and one sequence: keys [1, n, width], that of position p in row p % n, of the last of `length`
    positions; written: the most that it had since it was empty. window: positions that attention looks at. blocks: of
    a layer that compresses; index: of one whose indexer chooses among the entries, where a context can have more than
    its top-k. upto: angles of at least so many positions from 0 on."""

    keys: torch.Tensor
    upto: Callable[[int], Angles]
    window: int
    blocks: Blocks | None = None
    index: Blocks | None = None
    length: int = 0
    written: int = 0

    @classmethod
    def empty(
        cls,
        config: ModelConfig,
        layer: int,
        capacity: int,
        upto: Callable[[int], Angles],
        like: torch.Tensor,
    ) -> "CompressedCache":
        """Of a layer, for up to so many tokens. like: of its device and dtype."""
        assert config.compression and config.indexer
        ratio, window = config.compression.ratios[layer], config.compression.window

        def room(n: int, width: int) -> torch.Tensor:
            return like.new_zeros((1, n, width))

        made = cls(room(min(capacity, window + KEPT), config.qk_head), upto, window)
        if ratio:
            n = capacity // ratio
            made.blocks = Blocks(ratio, room(n, config.qk_head))
            if config.indexer.full[layer] and n > config.indexer.top_k:
                made.index = Blocks(ratio, room(n, config.indexer.width))
        return made

    def append(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys [1, t, width] of the next tokens; these behind those before them that the first one's window has."""
        n, end = self.keys.shape[1], self.length + keys.shape[1]
        seen = self.keys[:, self._rows(self.length - self.window + 1, self.length)]
        self.keys[:, self._rows(end - n, end, self.length)] = keys[:, -n:]
        self.length, self.written = end, max(self.written, end)
        return torch.cat((seen, keys), dim=1)

    def _rows(self, begin: int, end: int, least: int = 0) -> torch.Tensor:
        """Of positions from `begin`, or `least`, to the one before `end`."""
        return torch.arange(max(begin, least), end, device=self.keys.device) % self.keys.shape[1]

    def reaches(self, block: int, start: int) -> bool:
        """Whether `back` can go there: the first `block` tokens went through, and keys of the window before position
        `start` were not written over since."""
        return not start or block <= self.written <= max(0, start - self.window + 1) + self.keys.shape[1]

    def back(self, block: int, start: int) -> None:
        """To the first `start` tokens, which it `reaches`. block: from there on nothing is true any more, a multiple of
        all ratios; what lies between is computed again, for its rows."""
        self.length = start
        if not start:
            self.written = 0
        for blocks in (self.blocks, self.index):
            if blocks is not None:
                blocks.back(block, start)
