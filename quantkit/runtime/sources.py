"""Where layers come from: the original checkpoint or a GGUF file. Both give weights that `layers` can compute."""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from quantkit.codecs.unpack import unpack
from quantkit.errors import QuantkitError
from quantkit.formats.checkpoint import Checkpoint
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.ggml.codec import dequantize
from quantkit.ggml.graph import Experts as GgmlExperts
from quantkit.ggml.graph import Linear as GgmlLinear
from quantkit.models import family
from quantkit.models import tokenizer as tokenizers
from quantkit.models.config import ModelConfig, mla_of
from quantkit.progress import say
from quantkit.runtime.ahead import Item, Result, read_ahead
from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns, expert_names
from quantkit.runtime.layers import Experts, Feed, LayerExperts, LayerWeights, Linear, Router, unwatched
from quantkit.runtime.residency import Residency
from quantkit.runtime.watch import Projections

VOCAB_ROWS = 8192  # embedding rows read at once: 235 MB of R1's as float32
GGML_BATCH = 512  # rows per ggml product: bounds its buffers
DECODED_ROWS = 32  # rows from which on dequantizing an expert costs less than it saves
CODEBOOK_ROWS = 6  # the same if its types are slow to multiply, and the CPU multiplies bfloat16
EXPERTS_AT_ONCE = 64  # whose inputs and results are held: 120 MB in R1 at even routing
TILE_WEIGHTS = 1 << 22  # dequantized at once by a thread: more need more memory, fewer more time between the products
THREAD_WEIGHTS = 1 << 18  # from which on another thread for a matrix is worth waking


class CheckpointSource:
    """The original weights, dequantized to `dtype` on `device` as they are needed."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.name = Path(checkpoint.path).name
        self.config = family.from_hf(checkpoint.config)
        checkpoint.validate(family.source_shapes(self.config))

    def tokenizer(self) -> Tokenizer:
        return tokenizers.load(Path(self.checkpoint.path))

    def _matrix(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, device=self.device, dtype=self.dtype)

    def _vector(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, device=self.device, dtype=torch.float32)

    def _linear(self, name: str) -> Linear:
        weight = self._matrix(name + ".weight")
        return lambda x: x @ weight.T

    def fingerprint(self) -> str:
        return self.checkpoint.fingerprint()

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32); reads the embedding a slab at a time."""
        out = torch.empty((*tokens.shape, self.config.d), device=self.device) if out is None else out
        flat, rows = tokens.flatten().to(out.device), out.view(-1, self.config.d)
        for start in range(0, self.config.n_vocab, VOCAB_ROWS):
            stop = min(start + VOCAB_ROWS, self.config.n_vocab)
            here = ((flat >= start) & (flat < stop)).nonzero().squeeze(1)
            if len(here):
                slab = self.checkpoint.read("model.embed_tokens.weight", start, stop, device=self.device)
                for part in here.split(VOCAB_ROWS):
                    rows[part] = slab[(flat[part] - start).to(slab.device)].to(rows.device, rows.dtype)
        return out

    def layer(self, layer: int, turns: Turns = ALONE) -> LayerWeights:
        """Its weights, routed experts to be streamed. turns: how ranks share these."""
        c, p = self.config, f"model.layers.{layer}."
        attn = p + "self_attn."
        if c.q_lora is None:
            q = self._linear(attn + "q_proj")
        else:
            norm = self._vector(attn + "q_a_layernorm.weight")
            q = (self._linear(attn + "q_a_proj"), norm, self._linear(attn + "q_b_proj"))
        kv_b = self._matrix(attn + "kv_b_proj.weight")
        k_b, v_b = split_kv_b(kv_b, c)
        moe = c.is_moe(layer)
        feed = self._feed(p + ("mlp.shared_experts." if moe else "mlp.")) if not moe or c.n_shared else None
        router = experts = None
        if moe:
            bias = self._vector(p + "mlp.gate.e_score_correction_bias") if c.has_bias else None
            router = Router(self._vector(p + "mlp.gate.weight"), bias)
            experts = StreamedExperts(lambda e: self.expert(layer, e), c.n_expert, turns)
        return LayerWeights(
            attn_norm=self._vector(p + "input_layernorm.weight"),
            q=q,
            kv_a=self._linear(attn + "kv_a_proj_with_mqa"),
            kv_a_norm=self._vector(attn + "kv_a_layernorm.weight"),
            k_b=k_b,
            v_b=v_b,
            output=self._linear(attn + "o_proj"),
            ffn_norm=self._vector(p + "post_attention_layernorm.weight"),
            feed=feed,
            router=router,
            experts=experts,
        )

    def _feed(self, prefix: str) -> Feed:
        return Feed(*(self._linear(prefix + part) for part in ("gate_proj", "up_proj", "down_proj")))

    def expert(self, layer: int, expert: int) -> Projections:
        prefix = f"model.layers.{layer}.mlp.experts.{expert}."
        gate, up, down = (self._matrix(f"{prefix}{part}.weight") for part in ("gate_proj", "up_proj", "down_proj"))
        return gate, up, down

    def head(self) -> tuple[torch.Tensor, Linear]:
        weight = self.head_rows(0, self.config.n_vocab)
        return self.output_norm(), lambda x: x @ weight.T

    def output_norm(self) -> torch.Tensor:
        return self._vector("model.norm.weight")

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, d] in the compute dtype."""
        name = ("model.embed_tokens" if self.config.tied else "lm_head") + ".weight"
        return self.checkpoint.read(name, start, stop, device=self.device, dtype=self.dtype)


def split_kv_b(kv_b: torch.Tensor, c: ModelConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """[n_head (qk_nope + v_head), kv_lora] -> k_b [n_head, kv_lora, qk_nope], v_b [n_head, v_head, kv_lora]."""
    k, v = kv_b.view(c.n_head, c.qk_nope + c.v_head, c.kv_lora).split([c.qk_nope, c.v_head], dim=1)
    return k.transpose(1, 2).contiguous(), v.contiguous()


class GGUFSource:
    """A GGUF file, memory-mapped.

    hybrid: routed experts are multiplied on the CPU from their quantized bytes by ggml, and so is every other matrix
    if `device` is the CPU; on a GPU the others are dequantized to `dtype`. This is how a person runs the file.
    Not hybrid: every matrix is dequantized when its layer's turn comes (an expert at a time) and multiplied on
    `device`: right for many tokens at once, when each layer is visited once.

    ram: bytes that the file may take in memory (hybrid); None: as many as the system gives.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        n_threads: int | None = None,
        hybrid: bool = True,
        ram: int | None = None,
    ):
        self.file = GGUFFile.open(path)
        self.name = Path(path).name
        self.device = torch.device(device)
        on_cpu = self.device.type == "cpu"
        self.hybrid, self.quantized_products = hybrid, hybrid and on_cpu
        self.dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        self.scratch: Scratch | None = None
        self.n_threads = n_threads or torch.get_num_threads()
        self.config = family.from_gguf(self.file.metadata)
        self.pool = ThreadPoolExecutor(self.n_threads)
        self.make_experts: type = GgmlExperts  # or kt_experts.KtExperts
        self._check_tensors()
        self.residency = None if ram is None else Residency(self.file, self.config, ram, on_gpu=not on_cpu)
        if self.residency and on_cpu:  # with a GPU the cost depends on what it holds
            say(str(self.residency))

    def dequantizing(self, dtype: torch.dtype) -> "GGUFSource":
        """The same file, not hybrid."""
        twin = copy.copy(self)
        twin.hybrid = twin.quantized_products = False
        twin.dtype = dtype
        return twin

    def for_prompts(self, dtype: torch.dtype) -> "GGUFSource":
        """The same file for long pieces of prompts on the CPU: a matrix is dequantized anew for each product, in
        tiles, and so is an expert with enough rows; others are multiplied by ggml."""
        twin = self.dequantizing(dtype)
        twin.scratch = Scratch(dtype)
        return twin

    def _check_tensors(self) -> None:
        tied = "output.weight" not in self.file.tensors
        for spec in family.specs(self.config, mla_of(self.file.tensors)):
            found = self.file.tensors.get(spec.name)
            if found is None and not (tied and spec.name == "output.weight"):
                raise QuantkitError(f"{self.name}: tensor {spec.name} is missing")
            if found is not None and tuple(found.shape) != spec.shape:
                raise QuantkitError(f"{self.name}: tensor {spec.name} has shape {tuple(found.shape)}, not {spec.shape}")

    def tokenizer(self) -> Tokenizer:
        return tokenizers.from_gguf(self.file.metadata, family.PRE)

    def data(self, name: str) -> np.ndarray:
        """uint8 [*shape[:-1], row_bytes]; where memory is limited, experts are there only after `needs` was called."""
        stack = self.residency.stacks.get(name) if self.residency else None
        return self.file.data(name) if stack is None else stack

    def dense(self, name: str) -> torch.Tensor:
        """A whole tensor, dequantized to float32 on the CPU in its own shape."""
        return self._values(name, self.file.data(name)).view(*self.file.tensors[name].shape)

    def _values(self, name: str, data: np.ndarray) -> torch.Tensor:
        """Packed rows of a tensor -> float32 [rows, n_in] on the CPU, by all threads."""
        tensor = self.file.tensors[name]
        values = torch.from_numpy(np.empty((data.size // tensor.row_bytes, tensor.shape[-1]), np.float32))
        return self.unpack(name, data, values)

    def unpack(self, name: str, data: np.ndarray, out: torch.Tensor, workers: int | None = None) -> torch.Tensor:
        """Packed rows of a tensor into `out` [n, n_in] (float32 or bfloat16, on the CPU), by all threads or so many."""
        return unpack(self.file.tensors[name].qtype, data, out, self.pool, workers or self.n_threads)

    def tiled_product(
        self, x: torch.Tensor, name: str, data: np.ndarray, scratch: "Scratch", worker: int | None = None
    ) -> torch.Tensor:
        """x [n, n_in] times packed rows [n_out, row_bytes] of a tensor -> [n, n_out], both in the dtype of the scratch:
        so many rows at a time are dequantized, multiplied and forgotten. worker: the caller is that thread of several;
        None: by all threads."""
        n_out, n_in = len(data), x.shape[-1]
        workers = 1 if worker is not None else max(1, min(self.n_threads, n_out * n_in // THREAD_WEIGHTS))
        n_tiles = workers * -(-n_out * n_in // (TILE_WEIGHTS * workers))
        bounds = [i * n_out // n_tiles for i in range(n_tiles + 1)]
        out = x.new_empty(n_out, len(x))  # weights come first in the product: there they need no packing

        def product(thread: int, span: tuple[int, int]) -> None:
            rows = data[slice(*span)]
            tile = self.unpack(name, rows, scratch.take(thread, len(rows), n_in), 1)
            torch.mm(tile, x.T, out=out[slice(*span)])

        if worker is None:
            self.share_out(product, list(pairwise(bounds)), workers)
        else:
            for span in pairwise(bounds):
                product(worker, span)
        return out.T

    def share_out(self, work: Callable[[int, Item], Result], items: Sequence[Item], workers: int) -> list[Result]:
        """work(worker, item) of all items, by so many threads (at most n_threads), each taking the next item."""
        results: list[Result | None] = [None] * len(items)
        left, workers = iter(range(len(items))), min(workers, len(items))

        @torch.inference_mode()
        def run(worker: int) -> None:
            if worker:  # a thread of the pool has a number of its own, by default all cores
                torch.set_num_threads(1)
            for i in left:
                results[i] = work(worker, items[i])

        with one_thread_each(workers):
            others = [self.pool.submit(run, i) for i in range(1, workers)]
            try:
                run(0)
            finally:  # nobody works on after an error: scratch and results will be used again
                list(left)
                wait(others)
        for other in others:
            other.result()
        return results

    def _small(self, name: str) -> torch.Tensor:
        return self.dense(name).to(self.device)

    def _matrix(self, name: str) -> torch.Tensor:
        if self.device.type == "cpu" and self.dtype in (torch.float32, torch.bfloat16):
            out = torch.empty(self.file.tensors[name].shape, dtype=self.dtype)
            return self.unpack(name, self.file.data(name), out)
        return self.dense(name).to(self.device, self.dtype)

    def linear(self, name: str) -> Linear:
        tensor = self.file.tensors[name]
        n_out, n_in = tensor.shape
        if (scratch := self.scratch) is not None:
            return lambda x: self.tiled_product(x, name, self.file.data(name), scratch)
        if not self.quantized_products:
            weight = self._matrix(name)
            return lambda x: x @ weight.T
        return Batched(GgmlLinear(tensor.qtype, self.file.data(name), n_in, n_out, self.n_threads))

    def fingerprint(self) -> str:
        return self.file.fingerprint()

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32)."""
        tensor, data = self.file.tensors["token_embd.weight"], self.file.data("token_embd.weight")
        out = torch.empty((*tokens.shape, self.config.d), device=self.device) if out is None else out
        rows = out.view(-1, self.config.d)
        for to, part in zip(rows.split(VOCAB_ROWS), tokens.flatten().cpu().split(VOCAB_ROWS), strict=True):
            unique, inverse = np.unique(part.numpy(), return_inverse=True)
            values = dequantize(tensor.qtype, data[unique], tensor.shape[-1])
            to.copy_(torch.from_numpy(values[inverse.reshape(-1)]))
        return out

    def layer(self, layer: int, turns: Turns = ALONE) -> LayerWeights:
        """Its weights, routed experts to be streamed. turns: how ranks share these."""
        c, p = self.config, f"blk.{layer}."
        if c.q_lora is None:
            q = self.linear(p + "attn_q.weight")
        else:
            norm = self._small(p + "attn_q_a_norm.weight")
            q = (self.linear(p + "attn_q_a.weight"), norm, self.linear(p + "attn_q_b.weight"))
        if p + "attn_kv_b.weight" in self.file.tensors:
            k_b, v_b = split_kv_b(self._matrix(p + "attn_kv_b.weight"), c)
        else:
            k_b, v_b = self._matrix(p + "attn_k_b.weight"), self._matrix(p + "attn_v_b.weight")
        return LayerWeights(
            attn_norm=self._small(p + "attn_norm.weight"),
            q=q,
            kv_a=self.linear(p + "attn_kv_a_mqa.weight"),
            kv_a_norm=self._small(p + "attn_kv_a_norm.weight"),
            k_b=k_b,
            v_b=v_b,
            output=self.linear(p + "attn_output.weight"),
            ffn_norm=self._small(p + "ffn_norm.weight"),
            **self.feed_forward(layer, turns),
        )

    def feed_forward(self, layer: int, turns: Turns = ALONE) -> dict[str, Any]:
        """feed, router and experts of `LayerWeights`."""
        c, p = self.config, f"blk.{layer}."
        moe = c.is_moe(layer)
        feed = self._feed(p, "_shexp" if moe else "") if not moe or c.n_shared else None
        router, experts = (self._router(p), self._experts(layer, turns)) if moe else (None, None)
        return {"feed": feed, "router": router, "experts": experts}

    def _feed(self, prefix: str, suffix: str) -> Feed:
        return Feed(*(self.linear(f"{prefix}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down")))

    def _router(self, prefix: str) -> Router:
        bias = prefix + "exp_probs_b.bias"
        weight = self._small(prefix + "ffn_gate_inp.weight")
        return Router(weight, self._small(bias) if bias in self.file.tensors else None)

    def _experts(self, layer: int, turns: Turns) -> LayerExperts:
        if self.scratch is not None:
            return unwatched(PromptExperts(self, layer, self.scratch))
        if not self.hybrid:
            return StreamedExperts(lambda e: self._expert(expert_names(layer), e), self.config.n_expert, turns)
        cpu = self.cpu_experts(layer)
        return unwatched(CpuExperts(cpu, self.device, self.needs(layer), self.at_once(self.config.n_used)))

    def expert_stacks(self, layer: int) -> list[tuple[str, np.ndarray]]:
        """qtype and bytes of gate, up and down of a layer's routed experts."""
        return [(self.file.tensors[name].qtype, self.data(name)) for name in expert_names(layer)]

    def cpu_experts(self, layer: int) -> Experts:
        """A layer's routed experts by the chosen engine, from tensors on the CPU."""
        c = self.config
        return self.make_experts(self.expert_stacks(layer), c.d, c.n_ff_exp, c.n_expert, c.n_used, self.n_threads)

    def needs(self, layer: int) -> Callable[[Iterable[int]], None]:
        """Call it with the experts of the layer that are about to be computed."""
        return partial(self.residency.need, layer) if self.residency else lambda _: None

    def at_once(self, n_used: int) -> int:
        """Rows with n_used experts each that may be computed at once."""
        return min(GGML_BATCH, self.residency.most // n_used) if self.residency else GGML_BATCH

    def _expert(self, names: list[str], expert: int) -> Projections:
        def matrix(name: str) -> torch.Tensor:
            return self._values(name, self.file.matrix(name, expert)).to(self.device, self.dtype)

        gate, up, down = map(matrix, names)
        return gate, up, down

    @property
    def _head_name(self) -> str:
        return "output.weight" if "output.weight" in self.file.tensors else "token_embd.weight"

    def head(self) -> tuple[torch.Tensor, Linear]:
        return self.output_norm(), self.linear(self._head_name)

    def output_norm(self) -> torch.Tensor:
        return self._small("output_norm.weight")

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, dequantized: [stop - start, d] in the compute dtype."""
        return self._values(self._head_name, self.file.data(self._head_name)[start:stop]).to(self.device, self.dtype)


@contextmanager
def one_thread_each(workers: int) -> Iterator[None]:
    """Several threads multiply: let torch not divide each of their products once more."""
    before = torch.get_num_threads()
    if workers > 1:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if workers > 1:
            torch.set_num_threads(before)


class Scratch:
    """Memory for one tile of a dequantized matrix for each thread, used again and again."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.memory = dtype, dict[int, torch.Tensor]()

    def take(self, worker: int, *shape: int) -> torch.Tensor:
        """Contiguous, not initialized; what the thread took before is overwritten."""
        if (size := prod(shape)) > len(self.memory.get(worker, ())):
            self.memory[worker] = torch.empty(size, dtype=self.dtype)
        return self.memory[worker][:size].view(shape)


class PromptExperts:
    """Routed experts of a long piece: those with many rows are dequantized once, the others multiplied by ggml."""

    def __init__(self, source: GGUFSource, layer: int, scratch: Scratch):
        self.source, self.names, self.scratch, self.need = source, expert_names(layer), scratch, source.needs(layer)
        self.stacks = source.expert_stacks(layer)
        short = scratch.dtype == torch.bfloat16 and all(qtype.startswith("IQ") for qtype, _ in self.stacks)
        self.many = CODEBOOK_ROWS if short else DECODED_ROWS
        most = source.residency.most if source.residency else 2 * EXPERTS_AT_ONCE
        self.at_once = min(EXPERTS_AT_ONCE, most // 2)  # the next ones need room too

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [n, d], expert int64 [n, n_used], weight float32 [n, n_used] -> float32 [n, d]."""
        c, out, chosen, share = self.source.config, torch.zeros(x.shape), expert.flatten(), weight.flatten()
        slot = torch.argsort(chosen, stable=True)  # tokens in order within an expert: sums are reproducible
        counts = torch.bincount(chosen, minlength=c.n_expert)
        bounds = [0, *counts.cumsum(0).tolist()]
        many = (counts >= self.many).nonzero().flatten().tolist()
        for group in self._in_turn(many):
            mine = [slot[bounds[e] : bounds[e + 1]] for e in group]
            rows = [slots // expert.shape[1] for slots in mine]
            visits = [(e, x[tokens]) for e, tokens in zip(group, rows, strict=True)]
            if len(visits) < self.source.n_threads:  # a matrix is then shared by all
                results = [self._dequantized(None, visit) for visit in visits]
            else:
                results = self.source.share_out(self._dequantized, visits, self.source.n_threads)
            for tokens, slots, y in zip(rows, mine, results, strict=True):
                out.index_add_(0, tokens, y.float() * share[slots, None])
        few = slot[(counts < self.many)[chosen[slot]]]
        if len(few) == len(slot):
            return self._quantized(x, expert, weight)
        if len(few):
            tokens = few // expert.shape[1]
            out.index_add_(0, tokens, self._quantized(x[tokens], chosen[few, None], share[few, None]))
        return out

    def _in_turn(self, experts: list[int]) -> Iterator[list[int]]:
        """Groups of them, in memory as long as they are looked at; the next group is read meanwhile."""
        groups = [experts[i : i + self.at_once] for i in range(0, len(experts), self.at_once)]
        for group, _ in zip(groups, read_ahead(self.need, groups), strict=True):
            yield group

    def _quantized(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """By ggml, with as many experts a row as `expert` has."""
        c, n_used = self.source.config, expert.shape[1]
        products = GgmlExperts(self.stacks, c.d, c.n_ff_exp, c.n_expert, n_used, self.source.n_threads)
        parts = []
        for part in zip(*(v.split(self.source.at_once(n_used)) for v in (x.float(), expert, weight)), strict=True):
            self.need(part[1].flatten().tolist())
            parts.append(products(part[0], part[1].int(), part[2]))
        return torch.cat(parts)

    def _dequantized(self, worker: int | None, visit: tuple[int, torch.Tensor]) -> torch.Tensor:
        e, x = visit

        def product(name: str, x: torch.Tensor) -> torch.Tensor:
            return self.source.tiled_product(x, name, self.source.data(name)[e], self.scratch, worker)

        gate, up, down = self.names
        return product(down, F.silu(product(gate, x)) * product(up, x))


class Batched:
    """A ggml product over at most GGML_BATCH rows at a time."""

    def __init__(self, linear: GgmlLinear):
        self.linear = linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) <= GGML_BATCH:
            return self.linear(x)
        return torch.cat([self.linear(part) for part in x.split(GGML_BATCH)])


class CpuExperts:
    """Experts on the CPU for inputs that may live on a GPU."""

    def __init__(self, experts: Experts, device: torch.device, need: Callable[[Iterable[int]], None], rows: int):
        self.experts, self.device, self.need, self.rows = experts, device, need, rows

    def __call__(self, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        inputs = (x.float().cpu(), expert.int().cpu(), weight.cpu())
        parts = []
        for part in zip(*(value.split(self.rows) for value in inputs), strict=True):
            self.need(part[1].flatten().tolist())
            parts.append(self.experts(*part))
        return torch.cat(parts).to(self.device)
