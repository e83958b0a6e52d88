"""Shards of a Hub repository as a ByteSource: ranges are downloaded ahead of their use and kept on disk while wanted.

The checkpoint says which tensors are read in which order (`schedule`); neighbouring ones become pieces of about PIECE
bytes, and a tensor that nobody asks for (R1's multi-token prediction) belongs to none. Several connections fetch pieces
in that order as far as the cache has room. Room is made by dropping what is needed last, going round the layers: the
layer just finished is wanted again only in the next pass, if there is one, and later than any other.
"""

import atexit
import os
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.byte_source import Extents, FolderSource
from quantkit.formats.safetensors_header import header_length
from quantkit.progress import say
from quantkit.remote.cache import RangeCache, Store, copy_range, is_sound
from quantkit.remote.client import RangeReader, Repo
from quantkit.remote.pieces import Piece, Range, Schedule
from quantkit.sizes import both_units

CONNECTIONS = 8
HEADER_CONNECTIONS = 16
MOST_HEADERS = 1 << 29  # bytes of all shards, held in memory; R1's have 11 MB


class HubSource:
    """Files of one repository at one commit.

    files: name -> (ETag, bytes). local: shards that lie in huggingface_hub's own cache already, which are read there.
    store: of headers; its folder holds the ranges too, and its limit is for all of them.
    """

    def __init__(
        self,
        repo: Repo,
        files: Mapping[str, tuple[str, int]],
        store: Store,
        local: FolderSource | None = None,
        connections: int = CONNECTIONS,
    ) -> None:
        self.repo, self.files, self.store, self.local = repo, files, store, local
        self.folder, self.limit = store.folder, store.limit
        self.reader = RangeReader(repo, files)
        self.connections = connections
        self._here = set(local.names()) if local else set()
        self._headers: dict[str, bytes] = {}
        self._header_bytes = 0  # that were asked for
        self._plan = Schedule()
        self._cache = self._new_cache()
        self._change = threading.Condition()
        self._loading: set[Piece] = set()
        self._wanted: dict[Piece, int] = {}  # readers that wait for it
        self._front, self._next = -1, 0  # furthest layer being read; first piece not yet considered for reading ahead
        self._blocked = False  # no room to read further ahead
        self._error: BaseException | None = None
        self._workers: list[threading.Thread] = []
        self._closed = False

    # What every ByteSource does.

    def names(self) -> list[str]:
        """File names, sorted."""
        return sorted(self.files)

    def size(self, file: str) -> int:
        """Bytes of a file; QuantkitError if there is no such file."""
        if file not in self.files:
            raise QuantkitError(f"{self.repo}: no file {file}")
        return self.files[file][1]

    def read(self, file: str, offset: int, length: int, what: str) -> np.ndarray:
        """uint8 [length]: of a header, from the cache, or downloaded now. QuantkitError naming `file` and `what`."""
        if self.local is not None and file in self._here:
            return self.local.read(file, offset, length, what)
        size, end = self.size(file), offset + length
        if end > size:
            raise QuantkitError(f"{self.repo}/{file}: truncated: {what} ends {end - size} bytes too early")
        out = np.empty(length, np.uint8)
        header = self._headers.get(file, b"")
        if end <= len(header):
            out[:] = memoryview(header)[offset:end]
            return out
        pieces = self._plan.covering(file, offset, end)
        with self._wanting(pieces):
            position = offset
            for piece in [*pieces, None]:
                begin = min(end, piece.key.begin) if piece else end
                if position < begin:  # scheduled by nobody
                    self._read_directly(file, position, begin, out[position - offset : begin - offset], what)
                    position = begin
                if piece:
                    stop = min(end, piece.key.end)
                    part = out[position - offset : stop - offset]
                    if not self._read_cached(piece, position, part):
                        self._read_directly(file, position, stop, part, what)
                    position = stop
        return out

    def schedule(self, kept: Extents, layers: Sequence[Extents]) -> None:
        """What is read ahead from now on, and in which order."""
        elsewhere = {file: etag for file, (etag, _) in self.files.items() if file not in self._here}
        with self._change:
            self._plan = Schedule(kept, layers, elsewhere)
        if (need := self._plan.comfortable_bytes()) > self.limit:
            say(
                f"warning: $QUANTKIT_CACHE_SIZE, {both_units(self.limit)}, does not hold two layers and the embeddings "
                f"({both_units(need)}): some ranges will be downloaded more than once"
            )

    def close(self) -> None:
        """End the connections; what is whole stays in the cache. A later read begins again."""
        with self._change:
            self._closed = True
            self.reader.stop.set()
            self._change.notify_all()
        for worker in self._workers:
            worker.join(2)
        if self._workers and self.reader.received:
            say(f"{self.repo}: {self.reader.received / 1e9:,.3f} GB downloaded")
            self.reader.received = 0
        with self._change:
            self._workers, self._closed = [], False
            self.reader.stop.clear()
            self._cache.close()
            self._cache = self._new_cache()
        if self.local:
            self.local.close()

    # Headers.

    def load_headers(self, shards: Sequence[str]) -> None:
        """The headers of all shards, each in two small requests, many at a time; kept on disk for good."""
        self._headers, missing = {}, [shard for shard in shards if shard not in self._here]
        pool = ThreadPoolExecutor(HEADER_CONNECTIONS)
        try:
            for shard, header in zip(missing, pool.map(self._header, missing), strict=True):
                self._headers[shard] = header
        finally:
            pool.shutdown(cancel_futures=True)

    def _header(self, file: str) -> bytes:
        etag, size = self.files[file]
        for path in (self.folder / "headers").glob(f"{etag}-*"):
            name = path.name
            known = self.store.find(f"headers/{name}", lambda data: name == f"{etag}-{zlib.crc32(data):08x}")  # noqa: B023
            if known is not None:
                return known
        data = bytearray()
        self.reader.fetch(file, 0, min(8, size), data.extend, "the header length")
        length = header_length(bytes(data), size, f"{self.repo}/{file}")
        with self._change:
            self._header_bytes += length
            if self._header_bytes > MOST_HEADERS:
                raise QuantkitError(f"{self.repo}: its shards' headers are larger than {MOST_HEADERS:,} bytes together")
        self.reader.fetch(file, 8, 8 + length, data.extend, "the header")
        self.store.put(f"headers/{etag}-{zlib.crc32(data):08x}", bytes(data))
        return bytes(data)

    # Reading through the cache.

    @contextmanager
    def _wanting(self, pieces: Sequence[Piece]) -> Iterator[None]:
        """While a reader is at these pieces, they go before others and are not dropped."""
        if not pieces:
            yield
            return
        with self._change:
            self._start()
            for piece in pieces:
                self._visit(piece)
                self._wanted[piece] = self._wanted.get(piece, 0) + 1
        try:
            yield
        finally:
            with self._change:
                for piece in pieces:
                    self._wanted[piece] -= 1
                    if not self._wanted[piece]:
                        del self._wanted[piece]

    def _read_directly(self, file: str, begin: int, end: int, out: np.ndarray, what: str) -> None:
        done = 0

        def pour(data: bytes) -> None:
            nonlocal done
            out[done : done + len(data)] = memoryview(data)
            done += len(data)

        self.reader.fetch(file, begin, end, pour, what)

    def _read_cached(self, piece: Piece, position: int, out: np.ndarray) -> bool:
        """False if the cache has no room for the piece, not even by dropping others."""
        while True:
            opened = self._open_piece(piece)
            if opened is None:
                return False
            fd, crc = opened
            try:
                if crc is not None:
                    sound = is_sound(fd, piece.key, crc)
                    with self._change:
                        if sound:
                            self._cache.trust(piece.key)
                        elif self._cache.has(piece.key):
                            say(f"{self.repo}/{piece.file}: a cached range is damaged; downloading it again")
                            self._cache.forget(piece.key)
                    if not sound:
                        continue
                copy_range(fd, position - piece.key.begin, out)
                return True
            finally:
                os.close(fd)

    def _open_piece(self, piece: Piece) -> tuple[int, str | None] | None:
        """Wait until the piece is in the cache and open it."""
        with self._change:
            while not self._cache.has(piece.key):
                if self._error:
                    raise self._error
                if not self._loading and self._victims(piece) is None:
                    return None
                self._change.notify_all()
                self._change.wait(1.0)
            return self._cache.open_range(piece.key)

    def _visit(self, piece: Piece) -> None:
        """Note where the reader is. Readers look one layer ahead, so one step back is the same visit."""
        layer, front = piece.layer, self._front
        if layer is None or front - 1 <= layer <= front:
            return
        if layer < front:  # the next pass
            self._next = 0
        self._front, self._blocked = layer, False
        self._change.notify_all()

    # Making room.

    def _distance(self, layer: int) -> int:
        """Layers until this one is read, going round."""
        return (layer - max(0, self._front - 1)) % self._plan.n_layer  # the layer before the front is still being read

    def _victims(self, piece: Piece) -> list[Range] | None:
        """What to drop so that the piece fits; None if what may be dropped for it is not enough.

        A reader that waits goes before all that nobody waits for; reading ahead only before what is read later.
        """
        lacking = piece.key.length - (self._cache.limit - self._cache.used)
        if lacking <= 0:
            return []
        demanded = piece in self._wanted
        mine = -1.0 if demanded else float(self._distance(piece.layer or 0))
        candidates: list[tuple[float, int, Range]] = []
        for age, key in enumerate(self._cache.ranges()):
            other = self._plan.by_key.get(key)
            if other is None:
                candidates.append((float("inf"), -age, key))  # of other weights: the oldest first
            elif other not in self._wanted:
                when = -0.5 if other.layer is None else float(self._distance(other.layer))
                if when > mine:  # of the layer being read, what was read first; of others, what comes last
                    candidates.append((when, other.order if when else -other.order, key))
        chosen = []
        for _, _, key in sorted(candidates, reverse=True):
            chosen.append(key)
            lacking -= key.length
            if lacking <= 0:
                return chosen
        return None

    def _make_room(self, piece: Piece) -> bool:
        """Reserve room for the piece. Called with the lock held."""
        victims = self._victims(piece)
        for key in victims or ():
            self._cache.forget(key)
        return victims is not None and self._cache.reserve(piece.key.length)

    # Connections.

    def _new_cache(self) -> RangeCache:
        return RangeCache(self.folder / "ranges", self.limit)

    def _start(self) -> None:
        if not self._cache.is_open:
            self._cache.open(overhead=self.store.used)
            self._trim()
        if not self._workers:
            self._workers = [threading.Thread(target=self._work, daemon=True) for _ in range(self.connections)]
            for worker in self._workers:
                worker.start()
            atexit.register(self.close)

    def _trim(self) -> None:
        """An earlier run may have had a larger limit."""
        for key in self._cache.ranges():
            if self._cache.used <= self.limit:
                return
            self._cache.forget(key)

    def _work(self) -> None:
        cache = self._cache
        while True:
            with self._change:
                piece = None
                while piece is None:
                    if self._closed or self._cache is not cache:
                        return
                    piece = self._take()
                    if piece is None:
                        self._change.wait()
                self._loading.add(piece)
            got: Path | BaseException
            try:
                got = cache.write(piece.key, partial(self._download, piece))
            except BaseException as error:
                got = error
            with self._change:
                self._loading.discard(piece)
                if isinstance(got, Path):
                    cache.publish(piece.key, got)
                else:
                    cache.give_back(piece.key.length)
                    if not self._closed:
                        self._error = self._error or got
                self._change.notify_all()

    def _download(self, piece: Piece, sink: Callable[[bytes], None]) -> None:
        self.reader.fetch(piece.file, piece.key.begin, piece.key.end, sink, "weights")

    def _take(self) -> Piece | None:
        """The next piece to download, its room reserved: one that is waited for, else the first one ahead."""
        if self._closed or self._error:
            return None
        for piece in self._wanted:
            if piece not in self._loading and not self._cache.has(piece.key) and self._make_room(piece):
                return piece
        while self._front >= 0 and not self._blocked and self._next < len(self._plan.pieces):
            piece = self._plan.pieces[self._next]
            ahead = piece.layer is not None and piece.layer >= self._front - 1
            if ahead and piece not in self._loading and not self._cache.has(piece.key):
                if not self._make_room(piece):
                    self._blocked = True  # until the reader moves on
                    return None
                self._next += 1
                return piece
            self._next += 1
        return None
