"""A file larger than the RAM it may take: routed experts are read when a token chooses them, and the ones that have not
been used for longest make room.

The file stays mapped; `madvise` drops pages from this process and `posix_fadvise` from the system's cache, which limits
what counts as "available" memory too. All other tensors are needed for every token and are never dropped.
"""

from collections import OrderedDict
from collections.abc import Iterable

from quantkit.arch.config import DeepseekConfig
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import ADVICE_BYTES, GGUFFile
from quantkit.sizes import gib

PARTS = ("gate", "up", "down")


class Residency:
    """Which routed experts are in memory. `need` is called before a layer's experts are computed.

    limit: bytes that the file's pages may take. read: bytes of experts that were not in memory when needed, so far.
    """

    def __init__(self, file: GGUFFile, config: DeepseekConfig, limit: int):
        self.file, self.limit, self.held, self.read = file, limit, 0, 0
        self.order: OrderedDict[tuple[int, int], None] = OrderedDict()  # the one used longest ago first
        self.names = {layer: [f"blk.{layer}.ffn_{part}_exps.weight" for part in PARTS]
                      for layer in range(config.n_layer) if config.is_moe(layer)}  # fmt: skip
        stacks = [name for names in self.names.values() for name in names]
        self.size = {layer: sum(_bytes(file, name) for name in names) for layer, names in self.names.items()}
        self.n_expert, self.n_used = config.n_expert, config.n_used
        rest = sum(tensor.n_bytes for name, tensor in file.tensors.items() if name not in set(stacks))
        self.rest, self.room = rest, limit - rest
        largest = max(self.size.values(), default=0)
        self.most = self.room // largest if largest else 0  # experts that fit at once
        if self.most < config.n_used:
            raise QuantkitError(f"--ram {gib(limit)} is too little for {file.path.name}: every token needs "
                                f"{gib(rest)} and {gib(config.n_used * largest)} for experts of a layer")  # fmt: skip
        for name in stacks:
            file.random(name)

    def __str__(self) -> str:
        experts = sum(size * self.n_expert for size in self.size.values())
        a_token = self.n_used * sum(self.size.values()) * max(0, 1 - self.room / experts)
        return (f"file {gib(self.file.n_bytes)}, RAM limit {gib(self.limit)}: {gib(self.rest)} stay, "
                f"{100 * min(1, self.room / experts):.0f} % of the experts fit; if all are chosen equally often, "
                f"{gib(int(a_token))} are read from disk for each token")  # fmt: skip

    def need(self, layer: int, experts: Iterable[int]) -> None:
        """These experts (at most `most` different ones) are about to be computed: start to read those that are not in
        memory, after others have made room."""
        wanted = dict.fromkeys((layer, e) for e in experts)
        missing = [key for key in wanted if key not in self.order]
        for key in wanted:
            if key in self.order:
                self.order.move_to_end(key)
        self.held += len(missing) * self.size[layer]
        while self.held > self.room:
            (other, e), _ = self.order.popitem(last=False)
            self.held -= self.size[other]
            for name in self.names[other]:
                self.file.evict(name, e)
        for key in missing:
            self.order[key] = None
            for name in self.names[layer]:
                self.file.prefetch(name, key[1])
        self.read += len(missing) * self.size[layer]


def _bytes(file: GGUFFile, name: str) -> int:
    """Bytes of memory that one matrix of a stack takes at most: whole pages, with neighbours that come with them."""
    tensor = file.tensors[name]
    return tensor.n_bytes // tensor.shape[0] + 2 * ADVICE_BYTES
