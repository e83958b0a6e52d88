"""A file larger than the RAM it may take: routed experts are read when a token chooses them, and the ones that have not
been used for longest make room.

Experts are copied to memory of our own, which is as large as all of them but of which only the pages in use exist. A
mapping would not do: Linux maps what lies around a page as well, up to megabytes of it. All other tensors stay mapped,
since every token needs them, or are moved to a GPU.
"""

import mmap
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Protocol

import numpy as np

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.sizes import both_units

READERS = 8  # reads under way at once
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class ExpertFile(Protocol):
    """What is asked of a `GGUFFile`."""

    path: Path
    tensors: dict[str, GGUFTensor]

    @property
    def n_bytes(self) -> int:
        """Size in bytes."""

    def set_apart(self, name: str) -> None:
        """The tensor will not be read through the mapping."""

    def read_into(self, name: str, index: int, out: np.ndarray) -> None:
        """Copy one matrix of a tensor to `out`, from any thread."""


class Residency:
    """Which routed experts are in memory. `need` is called before a layer's experts are computed.

    names: the stacks of experts of each layer that has any. limit: bytes that the file may take in memory. on_gpu: of
    all tensors but routed experts only the embedding is still needed once the engine is made. stacks: uint8
    [n_expert, n_out, row_bytes] by tensor, valid where `need` has put experts. most: experts that fit at once. read:
    bytes of experts read so far.
    """

    def __init__(self, file: ExpertFile, names: Mapping[int, list[str]], n_used: int, limit: int, on_gpu: bool = False):
        self.file, self.names, self.n_used, self.limit = file, names, n_used, limit
        self.held = self.read = 0
        self.order: OrderedDict[tuple[int, int], None] = OrderedDict()  # the one used longest ago first
        self.layer = {name: layer for layer, stacks in names.items() for name in stacks}
        self.elsewhere: set[int] = set()
        self.changing = threading.Condition()
        self.copying = 0  # copies out of memory that are under way: nothing is dropped then
        self.memory: dict[str, mmap.mmap] = {}
        self.stacks: dict[str, np.ndarray] = {}
        for name in self.layer:
            file.set_apart(name)
            tensor = file.tensors[name]
            kind = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
            self.memory[name] = mmap.mmap(-1, tensor.n_bytes, flags=kind)
            flat = np.frombuffer(self.memory[name], np.uint8)
            self.stacks[name] = flat.reshape(*tensor.shape[:-1], tensor.row_bytes)
        self.size = {layer: sum(self.stacks[name][0].nbytes for name in stacks) for layer, stacks in names.items()}
        # Pages that two experts share are never given back.
        seams = mmap.PAGESIZE * sum(len(s) for s in self.stacks.values() if s[0].nbytes % mmap.PAGESIZE)
        stay = ["token_embd.weight"] if on_gpu else [name for name in file.tensors if name not in self.stacks]
        self.rest = seams + sum(file.tensors[name].n_bytes for name in stay)
        self.room = limit - self.rest
        largest = max(self.size.values(), default=0)
        self.most = self.room // largest if largest else sys.maxsize
        fewest = max(2, self.n_used)  # prompts read one while another is computed
        if self.room < fewest * largest:
            least = f"{both_units(self.rest)} and {both_units(fewest * largest)} for experts of a layer"
            raise QuantkitError(
                f"--ram {both_units(limit)} is too little for {file.path.name}: every token needs {least}"
            )
        self.pool = ThreadPoolExecutor(READERS)

    def __str__(self) -> str:
        here = [layer for layer in self.names if layer not in self.elsewhere]
        n_bytes = sum(self.stacks[name].nbytes for layer in here for name in self.names[layer])
        share = min(1, self.room / n_bytes) if here else 1
        a_token = self.n_used * sum(self.size[layer] for layer in here) * (1 - share)
        fits = f"{both_units(self.rest)} stay, {100 * share:.0f} % of the experts fit"
        cost = f"if all are chosen equally often, {both_units(int(a_token))} are read for each token"
        return f"file {both_units(self.file.n_bytes)}, RAM limit {both_units(self.limit)}: {fits}; {cost}"

    def leave_out(self, layers: Iterable[int]) -> None:
        """The experts of these layers are elsewhere, and will not be needed."""
        self.elsewhere = set(layers)

    def copy(self, name: str, e: int, out: np.ndarray) -> None:
        """An expert's matrix to `out`, uint8 [n_bytes]: from memory if it is there, else from the file; nothing makes
        room for it. May be called from several threads, also beside `need`."""
        with self.changing:
            here = (self.layer[name], e) in self.order
            self.copying += here
        if not here:
            self.file.read_into(name, e, out)
            return
        try:
            np.copyto(out, self.stacks[name][e].reshape(-1))
        finally:
            with self.changing:
                self.copying -= 1
                self.changing.notify()

    def need(self, layer: int, experts: Iterable[int]) -> None:
        """These experts (at most `most` different ones) are about to be computed: read those that are not in memory,
        after others have made room. If that fails, none of the missing ones is there."""
        with self.changing:
            self.changing.wait_for(lambda: not self.copying)
            self._need(layer, experts)

    def _need(self, layer: int, experts: Iterable[int]) -> None:
        wanted = dict.fromkeys((layer, e) for e in experts)
        missing = [key for key in wanted if key not in self.order]
        for key in wanted:
            if key in self.order:
                self.order.move_to_end(key)
        size = len(missing) * self.size[layer]
        while self.held + size > self.room:
            (other, e), _ = self.order.popitem(last=False)
            self.held -= self.size[other]
            for name in self.names[other]:
                self._drop(name, e)
        reads = [self.pool.submit(self._read, name, e) for _, e in missing for name in self.names[layer]]
        wait(reads)
        try:
            for read in reads:
                read.result()
        except BaseException:
            for _, e in missing:
                for name in self.names[layer]:
                    self._drop(name, e)
            raise
        self.order |= dict.fromkeys(missing)
        self.held += size
        self.read += size

    def _read(self, name: str, e: int) -> None:
        self.file.read_into(name, e, self.stacks[name][e])

    def _drop(self, name: str, e: int) -> None:
        """Give back the pages that hold nothing but this matrix."""
        size = self.stacks[name][e].nbytes
        begin, end = -(-e * size // mmap.PAGESIZE), (e + 1) * size // mmap.PAGESIZE
        if end > begin:
            self.memory[name].madvise(mmap.MADV_DONTNEED, begin * mmap.PAGESIZE, (end - begin) * mmap.PAGESIZE)
