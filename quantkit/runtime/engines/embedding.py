"""The first step of prompts and tokens: rows of the embedding, which stays in the mapped file, on a GPU."""

import numpy as np
import torch

from quantkit.codecs import registry
from quantkit.ggml.quants import dequantize
from quantkit.models.tokenizer import check_ids
from quantkit.runtime.packed import Packed
from quantkit.runtime.pauses import pause
from quantkit.runtime.sources.gguf import GGUFWeights

ROWS = 256  # sent at once: R1's are 1 MB as Q4_K, and where the CPU dequantizes them a part of some milliseconds


class Embedding:
    """Of a file. Rows travel as quantized bytes, a seventh of float32, and are dequantized there; those of a type
    without a kernel here, before. row_bytes: of a row on its way."""

    def __init__(self, weights: GGUFWeights):
        self.weights, self.config, self.device = weights, weights.config, weights.device
        tensor = weights.file.tensors["token_embd.weight"]
        self.qtype, self.packed = tensor.qtype, registry.in_groups(tensor.qtype)
        self.data = weights.file.data("token_embd.weight")
        self.row_bytes = tensor.row_bytes if self.packed else 4 * self.config.d
        self.host = torch.zeros(ROWS, self.row_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def put(self, tokens: list[int], to: np.ndarray) -> None:
        """Rows of these tokens into memory of the CPU, uint8 [n, row_bytes]. QuantkitError for an id that has none."""
        check_ids((min(tokens), max(tokens)), self.config.n_vocab)
        if self.packed:
            to[:] = self.data[tokens]
        else:
            dequantize(self.qtype, self.data[tokens], self.config.d, to.view(np.float32))

    def decoded(self, rows: torch.Tensor) -> torch.Tensor:
        """What was put, on the device: uint8 [n, row_bytes] -> float32 [n, d]."""
        if not self.packed:
            return rows.view(torch.float32)
        return Packed(self.qtype, rows[None], self.config.d, torch.float32).dense()[0]

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """float32 [n, d] on the device. QuantkitError for an id that has no row."""
        out = torch.empty(len(tokens), self.config.d, device=self.device)
        for begin, to in zip(range(0, len(tokens), ROWS), out.split(ROWS), strict=True):
            self.put(tokens[begin : begin + ROWS], self.host[: len(to)].numpy())
            to.copy_(self.decoded(self.host[: len(to)].to(self.device)))
            pause(self.device, "embedding")
        return out
