"""What a reader will want of a repository's files, cut into downloads and kept in the order of their use."""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PIECE = 32 << 20  # bytes of one download

Extents = Sequence[tuple[str, int, int]]
"""(file, begin, end) of tensors, as `formats.byte_source` has them."""


@dataclass(frozen=True, order=True)
class Range:
    """Bytes begin:end of the file with this ETag."""

    etag: str
    begin: int
    end: int

    @property
    def length(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Piece:
    """One download. layer: its place in the order of use, None if it is wanted at any time."""

    order: int
    layer: int | None
    file: str
    key: Range


class Schedule:
    """All pieces, in the order of their use. The empty one schedules nothing.

    etags: of each file. pieces: by `order`. n_layer: layers of one pass, at least 1.
    """

    def __init__(self, kept: Extents = (), layers: Sequence[Extents] = (), etags: Mapping[str, str] | None = None):
        self.n_layer, self.pieces = max(1, len(layers)), list[Piece]()
        for layer, extents in [(None, kept), *enumerate(layers)]:
            for file, begin, end in cut(extents):
                if etags and file in etags:
                    key = Range(etags[file], begin, end)
                    self.pieces.append(Piece(len(self.pieces), layer, file, key))
        self.by_key = {piece.key: piece for piece in self.pieces}
        self._by_file: dict[str, list[Piece]] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.key.begin):
            self._by_file.setdefault(piece.file, []).append(piece)
        self._starts = {file: [piece.key.begin for piece in mine] for file, mine in self._by_file.items()}

    def covering(self, file: str, begin: int, end: int) -> list[Piece]:
        """Pieces that have bytes of begin:end of a file, in order."""
        starts, pieces = self._starts.get(file, []), self._by_file.get(file, [])
        first = max(0, bisect.bisect_right(starts, begin) - 1)
        return [piece for piece in pieces[first : bisect.bisect_left(starts, end)] if piece.key.end > begin]

    def comfortable_bytes(self) -> int:
        """What a cache must hold so that nothing is downloaded twice in a pass: two layers, and what is always kept."""
        layers, kept = [0] * self.n_layer, 0
        for piece in self.pieces:
            if piece.layer is None:
                kept += piece.key.length
            else:
                layers[piece.layer] += piece.key.length
        return min(sum(layers), 2 * max(layers)) + kept


def cut(extents: Extents) -> list[tuple[str, int, int]]:
    """Tensors as downloads, in order of use: neighbours in a file together up to PIECE bytes, larger ones in parts.

    Nothing between two tensors is taken along.
    """
    rank = {extent: index for index, extent in reversed(list(enumerate(extents)))}
    out: list[tuple[int, str, int, int]] = []
    for file, begin, end in sorted(rank):
        if out and out[-1][1] == file and out[-1][3] == begin and end - out[-1][2] <= PIECE:
            first, _, start, _ = out.pop()
            out.append((min(first, rank[file, begin, end]), file, start, end))
            continue
        for start in range(begin, end, PIECE):
            out.append((rank[file, begin, end], file, start, min(start + PIECE, end)))
    return [(file, begin, end) for _, file, begin, end in sorted(out)]
