"""A GGUF file opened to be run: the bytes of its tensors, and their values."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from quantkit.codecs.unpack import unpack
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml.codec import dequantize
from quantkit.models import family
from quantkit.models import tokenizer as tokenizers
from quantkit.models.config import ModelConfig, mla_of
from quantkit.progress import say
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.residency import Residency
from quantkit.runtime.workers import Workers

EMBEDDED_ROWS = 8192  # embedding rows dequantized at once: 235 MB of R1's as float32


class GGUFWeights:
    """The weights of a file, memory-mapped; `open_gguf` makes it.

    device: where an engine computes what needs no large memory. residency: keeps routed experts within a limit of
    memory; None: the system keeps what it likes. workers: threads for all that is done with the file.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: ModelConfig,
        device: torch.device,
        workers: Workers,
        residency: Residency | None = None,
    ):
        self.file, self.config, self.device = file, config, device
        self.workers, self.residency = workers, residency
        self.name = file.path.name
        self.head_name = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"

    def tokenizer(self) -> Tokenizer:
        """From the file's metadata."""
        return tokenizers.from_gguf(self.file.metadata, family.PRE)

    def data(self, name: str) -> np.ndarray:
        """uint8 [*shape[:-1], row_bytes]; where memory is limited, experts are there only after `needs` was called."""
        stack = self.residency.stacks.get(name) if self.residency else None
        return self.file.data(name) if stack is None else stack

    def dense(self, name: str) -> torch.Tensor:
        """A whole tensor, dequantized to float32 on the CPU in its own shape."""
        return self.values(name, self.file.data(name)).view(*self.file.tensors[name].shape)

    def values(self, name: str, data: np.ndarray) -> torch.Tensor:
        """Packed rows of a tensor -> float32 [rows, n_in] on the CPU, by all threads."""
        tensor = self.file.tensors[name]
        values = torch.from_numpy(np.empty((data.size // tensor.row_bytes, tensor.shape[-1]), np.float32))
        return self.unpack(name, data, values)

    def unpack(self, name: str, data: np.ndarray, out: torch.Tensor, most: int | None = None) -> torch.Tensor:
        """Packed rows of a tensor into `out` [n, n_in] (float32 or bfloat16, on the CPU), by all threads or so many."""
        return unpack(self.file.tensors[name].qtype, data, out, self.workers.pool, most or self.workers.n)

    def embed(self, tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        """tokens int64 [...] -> `out` [..., d]; only the rows that are asked for are dequantized."""
        tensor, data = self.file.tensors["token_embd.weight"], self.file.data("token_embd.weight")
        rows = out.view(-1, self.config.d)
        for to, part in zip(rows.split(EMBEDDED_ROWS), tokens.flatten().cpu().split(EMBEDDED_ROWS), strict=True):
            unique, inverse = np.unique(part.numpy(), return_inverse=True)
            values = dequantize(tensor.qtype, data[unique], tensor.shape[-1])
            to.copy_(torch.from_numpy(values[inverse.reshape(-1)]))
        return out

    def expert_stacks(self, layer: int) -> list[tuple[str, np.ndarray]]:
        """qtype and bytes, uint8 [n_expert, n_out, row_bytes], of gate, up and down of a layer's routed experts."""
        return [(self.file.tensors[name].qtype, self.data(name)) for name in expert_names(layer)]

    def needs(self, layer: int) -> Callable[[Iterable[int]], None]:
        """Call it with the experts of the layer that are about to be computed."""
        return partial(self.residency.need, layer) if self.residency else lambda _: None

    def at_once(self, rows: int, n_used: int) -> int:
        """Of so many rows with n_used experts each, how many may be computed at once."""
        return min(rows, self.residency.most // n_used) if self.residency else rows


def open_gguf(
    path: Path | str, device: torch.device | str = "cpu", n_threads: int | None = None, ram: int | None = None
) -> GGUFWeights:
    """A file to be run on a device. ram: bytes that it may take in memory; None: as many as the system gives.

    QuantkitError if a tensor is missing or has another shape than the file's metadata say, or if `ram` is too little.
    """
    file = GGUFFile.open(path)
    config, device = family.from_gguf(file.metadata), torch.device(device)
    check_tensors(file, config)
    residency = None
    if ram is not None:
        names = {layer: expert_names(layer) for layer in range(config.n_layer) if config.is_moe(layer)}
        residency = Residency(file, names, config.n_used, ram, on_gpu=device.type != "cpu")
        if device.type == "cpu":  # with a GPU the cost depends on what it holds
            say(str(residency))
    return GGUFWeights(file, config, device, Workers(n_threads), residency)


def check_tensors(file: GGUFFile, config: ModelConfig) -> None:
    """QuantkitError naming the first tensor of the model that the file lacks or has in another shape."""
    tied = "output.weight" not in file.tensors
    for spec in family.specs(config, mla_of(file.tensors)):
        found = file.tensors.get(spec.name)
        if found is None and not (tied and spec.name == "output.weight"):
            raise QuantkitError(f"{file.path.name}: tensor {spec.name} is missing")
        if found is not None and tuple(found.shape) != spec.shape:
            shape = tuple(found.shape)
            raise QuantkitError(f"{file.path.name}: tensor {spec.name} has shape {shape}, not {spec.shape}")
