"""A GGUF file as a source of layers: which tensors make a layer is the file's, how they are multiplied a `Products`."""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from tokenizers import Tokenizer

from quantkit.codecs.unpack import unpack
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml.quants import dequantize
from quantkit.models import family
from quantkit.models.config import ModelConfig, mla_of
from quantkit.models.other_layouts import as_ours
from quantkit.models.tokenizer import check_ids, tokenizer_of_gguf
from quantkit.progress import say, say_once
from quantkit.runtime.compressed import CompressedLayer, Layer, Parts, built, by_groups
from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns, expert_names
from quantkit.runtime.indexer import IndexerWeights
from quantkit.runtime.layers import Feed, LayerExperts, LayerWeights, Linear, Router
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.mtp import Entrance
from quantkit.runtime.residency import Residency
from quantkit.runtime.sources.admission import check_model
from quantkit.runtime.streams import Mixing, merged
from quantkit.runtime.watch import Projections
from quantkit.runtime.workers import Workers
from quantkit.tensors import bytes_by_layer

FEW_ROWS = 64  # embedded at once, not looked at for repetitions
EMBEDDED_ROWS = 8192  # embedding rows dequantized at once: 235 MB of R1's as float32

Query = tuple[Linear, torch.Tensor, Linear] | Linear


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
        self.mla = mla_of(file.tensors)
        self.head_name = "output.weight" if "output.weight" in file.tensors else "token_embd.weight"

    def tokenizer(self) -> Tokenizer:
        """From the file's metadata."""
        return tokenizer_of_gguf(self.file.metadata, family.PRE)

    def data(self, name: str) -> np.ndarray:
        """uint8 [*shape[:-1], row_bytes]; where memory is limited, experts are there only after
        `Residency.need` was called."""
        stack = self.residency.stacks.get(name) if self.residency else None
        return self.file.data(name) if stack is None else stack

    def ids(self, name: str) -> torch.Tensor:
        """A table of experts, int32 on the CPU. QuantkitError for ids that no expert has."""
        found = torch.from_numpy(self.file.data(name).view(np.int32).reshape(self.file.tensors[name].shape).copy())
        if not (int(found.min()) >= 0 and int(found.max()) < self.config.n_expert):
            raise QuantkitError(f"{self.name}: tensor {name} has ids beyond the {self.config.n_expert:,} experts")
        return found

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
        """tokens int64 [...] -> `out` [..., d]; only the rows that are asked for are dequantized. QuantkitError for an
        id that has none."""
        tensor, data = self.file.tensors["token_embd.weight"], self.file.data("token_embd.weight")
        check_ids(map(int, tokens.aminmax()) if tokens.numel() else (), self.config.n_vocab)
        rows = out.view(-1, self.config.d)
        if len(rows) <= FEW_ROWS and rows.dtype == torch.float32 and rows.device.type == "cpu":  # a step of decoding
            dequantize(tensor.qtype, data[tokens.flatten().numpy()], tensor.shape[-1], rows.numpy())
            return out
        for to, part in zip(rows.split(EMBEDDED_ROWS), tokens.flatten().cpu().split(EMBEDDED_ROWS), strict=True):
            unique, inverse = np.unique(part.numpy(), return_inverse=True)
            values = dequantize(tensor.qtype, data[unique], tensor.shape[-1])
            to.copy_(torch.from_numpy(values[inverse.reshape(-1)]))
        return out

    def expert_stacks(self, layer: int) -> list[tuple[str, np.ndarray]]:
        """qtype and bytes, uint8 [n_expert, n_out, row_bytes], of gate, up and down of a layer's routed experts."""
        return [(self.file.tensors[name].qtype, self.data(name)) for name in expert_names(layer)]

    def needs(self, layer: int) -> Callable[[Iterable[int]], None] | None:
        """To be called with the experts of the layer that are about to be computed; None: all are where they are."""
        return partial(self.residency.need, layer) if self.residency else None

    def at_once(self, rows: int, n_used: int) -> int:
        """Of so many rows with n_used experts each, how many may be computed at once."""
        return min(rows, self.residency.most // n_used) if self.residency else rows


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

    def grouped(self, name: str, n: int) -> Linear:
        """Multiplies by a matrix whose n equal groups of rows have inputs of their own: x [m, n, n_in] ->
        [m, n_out]."""

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

    def layer(self, layer: int, turns: Turns = ALONE) -> Layer:
        """A layer's weights, as far as its products hold them. turns: how ranks share experts that are streamed."""
        self.file.check_whole()
        return self._mla(layer, turns) if self.config.compression is None else self._compressed(layer, turns)

    def _mla(self, layer: int, turns: Turns) -> LayerWeights:
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
            indexer=self._indexer(p + "indexer.") if self.config.has_indexer(layer) else None,
            mtp=self._entrance(p + "nextn.") if layer >= self.config.n_layer else None,
        )

    def _compressed(self, layer: int, turns: Turns) -> CompressedLayer:
        p, products = f"blk.{layer}.", self.products
        parts = Parts(
            lambda role: products.linear(f"{p}{role}.weight"),
            lambda role, n: products.grouped(f"{p}{role}.weight", n),
            lambda role: products.vector(f"{p}{role}.weight"),
            products.dtype,
        )
        return built(self.config, layer, parts, self._router(p), products.experts(layer, turns))

    def feed_forward(self, layer: int, turns: Turns = ALONE) -> tuple[Feed | None, Router | None, LayerExperts | None]:
        """Dense layer or shared expert, router and routed experts of a layer, as far as it has them."""
        c, p = self.config, f"blk.{layer}."
        moe = c.is_moe(layer)
        feed = self._feed(p, "_shexp" if moe else "") if not moe or c.n_shared else None
        return (feed, self._router(p), self.products.experts(layer, turns)) if moe else (feed, None, None)

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm and output matrix."""
        self.file.check_whole()
        return self.output_norm(), self.products.linear(self.weights.head_name)

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""
        return self.products.vector("output_norm.weight")

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `stream.Source`."""
        if self.config.streams is None:
            return hidden
        parts = (self.products.vector(f"output_hc_{part}.weight") for part in ("fn", "base", "scale"))
        return merged(hidden, Mixing(*parts), self.config)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, dequantized: [stop - start, d] in the compute dtype."""
        name = self.weights.head_name
        return self.weights.values(name, self.file.data(name)[start:stop]).to(self.device, self.dtype)

    def layer_bytes(self) -> list[int]:
        """Of the file, by layer."""
        tensors = ((name, tensor.n_bytes) for name, tensor in self.weights.file.tensors.items())
        return bytes_by_layer(tensors, self.config.n_block)

    def _query(self, p: str) -> Query:
        linear = self.products.linear
        if self.config.q_lora is None:
            return linear(p + "attn_q.weight")
        norm = self.products.vector(p + "attn_q_a_norm.weight")
        return linear(p + "attn_q_a.weight"), norm, linear(p + "attn_q_b.weight")

    def _indexer(self, p: str) -> IndexerWeights:
        q_b, k = (self.products.linear(p + name) for name in ("attn_q_b.weight", "attn_k.weight"))
        proj, norm, bias = (self.products.vector(p + name) for name in ("proj.weight", "k_norm.weight", "k_norm.bias"))
        how = self.config.indexer
        assert how
        return IndexerWeights(q_b, k, proj, norm, bias, how.top_k, self.config.qk_rope, how.interleaved)

    def _entrance(self, p: str) -> Entrance:
        vector, linear = self.products.vector, self.products.linear
        norms = (vector(f"{p}{name}.weight") for name in ("enorm", "hnorm", "shared_head_norm"))
        enorm, hnorm, head_norm = norms
        return Entrance(enorm, hnorm, linear(p + "eh_proj.weight"), head_norm)

    def _kv_b(self, p: str) -> tuple[torch.Tensor, torch.Tensor]:
        matrix = self.products.matrix
        if self.weights.mla == "combined":
            return split_kv_b(matrix(p + "attn_kv_b.weight"), self.config)
        return matrix(p + "attn_k_b.weight"), matrix(p + "attn_v_b.weight")

    def _feed(self, prefix: str, suffix: str) -> Feed:
        linear = self.products.linear
        return Feed(*(linear(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down")))

    def _router(self, prefix: str) -> Router:
        bias, table, vector = prefix + "exp_probs_b.bias", prefix + "ffn_gate_tid2eid.weight", self.products.vector
        weight = vector(prefix + "ffn_gate_inp.weight")
        if table in self.file.tensors:
            return Router(weight, None, self.weights.ids(table).to(weight.device))
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

    def grouped(self, name: str, n: int) -> Linear:
        """As `Products`."""
        return by_groups(self.matrix(name), n)

    def experts(self, layer: int, turns: Turns = ALONE) -> LayerExperts:
        """As `Products`."""
        file, names = self.weights.file, expert_names(layer)

        def read(e: int) -> Projections:
            gate, up, down = (self._expert(name, file.matrix(name, e)) for name in names)
            return gate, up, down

        return StreamedExperts(read, self.weights.config.n_expert, turns, self.weights.config.limit)

    def _expert(self, name: str, data: np.ndarray) -> torch.Tensor:
        return self.weights.values(name, data).to(self.device, self.dtype)


def open_source(
    path: Path | str | GGUFFile, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> GGUFSource:
    """A file whose layers are dequantized, one at a time, to `dtype`: default float32 on the CPU, else bfloat16."""
    weights = open_gguf(path, device)
    dtype = dtype or (torch.float32 if weights.device.type == "cpu" else torch.bfloat16)
    return GGUFSource(weights, Dequantized(weights, weights.device, dtype))


def open_gguf(
    path: Path | str | GGUFFile,
    device: torch.device | str = "cpu",
    n_threads: int | None = None,
    ram: int | None = None,
) -> GGUFWeights:
    """A file, opened already or not, to be run on a device. ram: bytes that it may take in memory; None: as many as
    the system gives.

    Files of others are seen as ours (`models.other_layouts`), which is said. QuantkitError for whatever
    `admission.check_model` refuses, or if `ram` is too little.
    """
    seen = as_ours(path if isinstance(path, GGUFFile) else GGUFFile.open(path))
    file, config, device = seen.file, seen.config, torch.device(device)
    for note in seen.notes:
        say_once(f"{file.path.name}: {note}")
    specs = family.specs(config, mla_of(file.tensors))
    check_model(file.path.name, file.tensors, config, specs, file.metadata.get("tokenizer.ggml.tokens"))
    residency = None
    if ram is not None:
        names = {layer: expert_names(layer) for layer in range(config.n_layer) if config.is_moe(layer)}
        residency = Residency(file, names, config.n_used, ram, on_gpu=device.type != "cpu")
        if device.type == "cpu":  # with a GPU the cost depends on what it holds
            say(str(residency))
    return GGUFWeights(file, config, device, Workers(n_threads), residency)
