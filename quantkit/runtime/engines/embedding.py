"""A prompt's first step: rows of the embedding, which stays in the mapped file, on a GPU."""

import torch

from quantkit.codecs import registry
from quantkit.models.tokenizer import check_ids
from quantkit.runtime.packed import Packed
from quantkit.runtime.pauses import pause
from quantkit.runtime.sources.gguf import GGUFWeights

ROWS = 256  # sent at once: R1's are 1 MB as Q4_K, and where the CPU dequantizes them a part of some milliseconds


class Embedding:
    """Of a file. Rows travel as quantized bytes, a seventh of float32, and are dequantized there; those of a type
    without a kernel here, before."""

    def __init__(self, weights: GGUFWeights):
        self.weights, self.config, self.device = weights, weights.config, weights.device
        tensor = weights.file.tensors["token_embd.weight"]
        self.qtype, self.packed = tensor.qtype, registry.in_groups(tensor.qtype)
        width, dtype = (tensor.row_bytes, torch.uint8) if self.packed else (self.config.d, torch.float32)
        self.host = torch.zeros(ROWS, width, dtype=dtype, pin_memory=self.device.type == "cuda")

    def __call__(self, tokens: list[int]) -> torch.Tensor:
        """float32 [1, n, d] on the device. QuantkitError for an id that has no row."""
        check_ids((min(tokens), max(tokens)), self.config.n_vocab)
        out = torch.empty(1, len(tokens), self.config.d, device=self.device)
        for to, ids in zip(out[0].split(ROWS), torch.tensor(tokens).split(ROWS), strict=True):
            host = self.host[: len(ids)]
            if self.packed:
                host.copy_(torch.from_numpy(self.weights.file.data("token_embd.weight")[ids.numpy()]))
                every = self.host.to(self.device)[None]  # or kernels would be compiled for other numbers of rows
                to.copy_(Packed(self.qtype, every, self.config.d, to.dtype).dense()[0, : len(ids)])
            else:
                to.copy_(self.weights.embed(ids, host))
            pause(self.device, "embedding")
        return out
