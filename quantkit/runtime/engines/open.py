"""Several sequences over one model: each has a slot with its own cache and length; decoding takes all in one step."""

from collections.abc import Iterator
from typing import Protocol

import torch

from quantkit.errors import QuantkitError
from quantkit.ggml import graph as ggml
from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.gpu import GpuEngine, GpuLayers
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.generate import Model, Sampling, sample
from quantkit.runtime.layers import KVCache
from quantkit.runtime.sources import GGUFSource

PROMPT_TOKENS = 512  # of one prompt computed at once in torch


class Engine(Protocol):
    """A model with n_slots caches of `capacity` tokens. Calls come from one thread at a time.

    `prefill` puts tokens (at most `piece`) at positions begin, begin + 1, ... of a slot, forgetting what stood
    from there on, and returns the last one's float32 logits [v]. `decode` adds one token to each of several slots and
    returns float32 logits [n, v]; they are valid until the next call.
    """

    config: ModelConfig
    n_slots: int
    capacity: int
    piece: int

    def prefill(self, slot: int, tokens: list[int], begin: int) -> torch.Tensor: ...
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor: ...


class TorchEngine:
    """Layers computed one call after the other in torch: every device and every source."""

    piece = PROMPT_TOKENS

    def __init__(self, model: Model, n_slots: int, capacity: int):
        self.model, self.config, self.n_slots, self.capacity = model, model.config, n_slots, capacity
        self.caches: list[list[KVCache] | None] = [None] * n_slots

    def _caches(self, slot: int) -> list[KVCache]:
        if (caches := self.caches[slot]) is None:
            self.caches[slot] = caches = self.model.caches(self.capacity)
        return caches

    def prefill(self, slot: int, tokens: list[int], begin: int) -> torch.Tensor:
        caches = self._caches(slot)
        for cache in caches:
            cache.length = begin
        return self.model.forward(torch.tensor([tokens]), caches)[0, -1]

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        return self.model.step(torch.tensor(tokens), [self._caches(slot) for slot in slots])


def open_engine(source: GGUFSource, n_slots: int, capacity: int, gpu_layers: GpuLayers = "auto") -> Engine:
    """An engine for n_slots sequences of at most `capacity` tokens (bounded by what the model was made for): one ggml
    graph if all is computed on the CPU by ggml, else layer by layer; on a GPU CUDA graphs and, for experts that are not
    there, the CPU's engine."""
    capacity = min(capacity, source.config.n_context)
    if source.device.type == "cuda":
        return GpuEngine(source, n_slots, capacity, gpu_layers)
    if gpu_layers not in ("auto", 0):
        raise QuantkitError(f"--gpu-layers {gpu_layers}: needs a GPU and --device cuda")
    if source.quantized_products and source.make_experts is ggml.Experts:
        return GraphEngine(source, n_slots, capacity)
    return TorchEngine(Model(source), n_slots, capacity)


def generate(engine: Engine, prompt: list[int], n_tokens: int, how: Sampling, begin: int = 0) -> Iterator[int]:
    """Up to n_tokens new tokens after the prompt (BOS included in it), ending at EOS; in slot 0, whose cache already
    holds the first `begin` tokens of the prompt. QuantkitError if the prompt and one more do not fit the context."""
    if len(prompt) >= engine.capacity:
        raise QuantkitError(f"{len(prompt)} prompt tokens do not fit a context of {engine.capacity}")
    generator = torch.Generator().manual_seed(how.seed)
    for at in range(begin, len(prompt), engine.piece):
        logits = engine.prefill(0, prompt[at : at + engine.piece], at)
    for left in reversed(range(min(n_tokens, engine.capacity - len(prompt)))):
        token = sample(logits, how, generator)
        if token == engine.config.eos:
            return
        yield token
        if left:
            logits = engine.decode([0], [token])[0]
