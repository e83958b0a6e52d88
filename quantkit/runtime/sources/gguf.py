"""Layers of a GGUF file. Which tensors make a layer is the file's; how they are multiplied is a `Products`."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns, expert_names
from quantkit.runtime.layers import Feed, LayerExperts, LayerWeights, Linear, Router
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.sources.weights import GGUFWeights, open_gguf
from quantkit.runtime.watch import Projections

Query = tuple[Linear, torch.Tensor, Linear] | Linear


class Products(Protocol):
    """A way to multiply the matrices of a file: `Dequantized` here, `quantized.Quantized` as a person runs it,
    `tiled.Tiled` for long prompts. device, dtype: of the products."""

    device: torch.device
    dtype: torch.dtype

    def vector(self, name: str) -> torch.Tensor:
        """A small tensor (norm, bias, router), float32 on the device."""

    def matrix(self, name: str) -> torch.Tensor:
        """A tensor of any shape, dequantized to `dtype` on the device."""

    def linear(self, name: str) -> Linear:
        """Multiplies rows by a matrix: x [n, n_in] -> [n, n_out]."""

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """The routed experts of a layer. turns: how ranks share those that are streamed."""


class GGUFSource:
    """`stream.Source` of a file whose matrices are multiplied by `products`."""

    def __init__(self, weights: GGUFWeights, products: Products):
        self.weights, self.products = weights, products
        self.file, self.name, self.config = weights.file, weights.name, weights.config
        self.device, self.dtype = products.device, products.dtype

    def tokenizer(self) -> Tokenizer:
        """From the file's metadata."""
        return self.weights.tokenizer()

    def fingerprint(self) -> str:
        """Changes if the file does."""
        return self.file.fingerprint()

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32)."""
        out = torch.empty((*tokens.shape, self.config.d), device=self.device) if out is None else out
        return self.weights.embed(tokens, out)

    def layer(self, layer: int, turns: Turns = ALONE) -> LayerWeights:
        """A layer's weights, as far as its products hold them. turns: how ranks share experts that are streamed."""
        p, products = f"blk.{layer}.", self.products
        k_b, v_b = self._kv_b(p)
        feed, router, experts = self.feed_forward(layer, turns)
        return LayerWeights(
            attn_norm=products.vector(p + "attn_norm.weight"),
            q=self._query(p),
            kv_a=products.linear(p + "attn_kv_a_mqa.weight"),
            kv_a_norm=products.vector(p + "attn_kv_a_norm.weight"),
            k_b=k_b,
            v_b=v_b,
            output=products.linear(p + "attn_output.weight"),
            ffn_norm=products.vector(p + "ffn_norm.weight"),
            feed=feed,
            router=router,
            experts=experts,
        )

    def feed_forward(self, layer: int, turns: Turns = ALONE) -> tuple[Feed | None, Router | None, LayerExperts | None]:
        """Dense layer or shared expert, router and routed experts of a layer, as far as it has them."""
        c, p = self.config, f"blk.{layer}."
        moe = c.is_moe(layer)
        feed = self._feed(p, "_shexp" if moe else "") if not moe or c.n_shared else None
        return (feed, self._router(p), self.products.experts(layer, turns)) if moe else (feed, None, None)

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm and output matrix."""
        return self.output_norm(), self.products.linear(self.weights.head_name)

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""
        return self.products.vector("output_norm.weight")

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, dequantized: [stop - start, d] in the compute dtype."""
        name = self.weights.head_name
        return self.weights.values(name, self.file.data(name)[start:stop]).to(self.device, self.dtype)

    def _query(self, p: str) -> Query:
        linear = self.products.linear
        if self.config.q_lora is None:
            return linear(p + "attn_q.weight")
        norm = self.products.vector(p + "attn_q_a_norm.weight")
        return linear(p + "attn_q_a.weight"), norm, linear(p + "attn_q_b.weight")

    def _kv_b(self, p: str) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = self.products.matrix
        if p + "attn_kv_b.weight" in self.file.tensors:
            return split_kv_b(matrix(p + "attn_kv_b.weight"), self.config)
        return matrix(p + "attn_k_b.weight"), matrix(p + "attn_v_b.weight")

    def _feed(self, prefix: str, suffix: str) -> Feed:
        linear = self.products.linear
        return Feed(*(linear(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down")))

    def _router(self, prefix: str) -> Router:
        bias, vector = prefix + "exp_probs_b.bias", self.products.vector
        weight = vector(prefix + "ffn_gate_inp.weight")
        return Router(weight, vector(bias) if bias in self.file.tensors else None)


class Dequantized:
    """Every matrix is dequantized when its layer's turn comes, a routed expert when its own does, and multiplied on any
    device: right for many tokens at once, when each layer is visited once."""

    def __init__(self, weights: GGUFWeights, device: torch.device, dtype: torch.dtype):
        self.weights, self.device, self.dtype = weights, device, dtype

    def vector(self, name: str) -> torch.Tensor:
        """As `Products`."""
        return self.weights.dense(name).to(self.device)

    def matrix(self, name: str) -> torch.Tensor:
        """As `Products`."""
        file = self.weights.file
        if self.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(file.tensors[name].shape, dtype=self.dtype)
            return self.weights.unpack(name, file.data(name), out)
        return self.weights.dense(name).to(self.device, self.dtype)

    def linear(self, name: str) -> Linear:
        """As `Products`."""
        weight = self.matrix(name)
        return lambda x: x @ weight.T

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`."""
        file, names = self.weights.file, expert_names(layer)

        def read(e: int) -> Projections:
            gate, up, down = (self._expert(name, file.matrix(name, e)) for name in names)
            return gate, up, down

        return StreamedExperts(read, self.weights.config.n_expert, turns)

    def _expert(self, name: str, data: np.ndarray) -> torch.Tensor:
        return self.weights.values(name, data).to(self.device, self.dtype)


def open_source(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GGUFSource:
    """A file whose layers are dequantized, one at a time, to `dtype`: default float32 on the CPU, else bfloat16."""
    weights = open_gguf(path, device)
    dtype = dtype or (torch.float32 if weights.device.type == "cpu" else torch.bfloat16)
    return GGUFSource(weights, Dequantized(weights, weights.device, dtype))
