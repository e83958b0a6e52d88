"""Decoding and prefill with attention, shared experts and dense layers on a GPU, from quantized bytes.

Routed experts of as many layers as fit stay in GPU memory. Those of the others are computed on the CPU, one token per
sequence at a time, while the GPU computes the shared expert; long prompts instead move their bytes over the bus.

A decoding step is cut where it waits for the CPU; each piece is one CUDA graph. Everything also runs on the CPU,
without graphs: so the tests compare it with the other engines.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

from quantkit import machine as probe
from quantkit.codecs import registry
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.staging import CHUNK, Ring, Stack, Stacks, upload, upload_experts
from quantkit.runtime.experts.cpu import open_experts
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import (
    SCORE_ELEMENTS,
    Experts,
    Feed,
    KVCache,
    LayerExperts,
    LayerWeights,
    Router,
    attention,
    feed_forward,
    rms_norm,
    route,
    unwatched,
)
from quantkit.runtime.packed import Matrix, Packed, Plain, use_kernels
from quantkit.runtime.rope import angles, frequencies
from quantkit.runtime.sources import GGUFSource, split_kv_b

log = logging.getLogger(__name__)

KV_STEP = 256  # cache positions that a step sees: the least power of two times this
STREAM_TOKENS = 128  # prompts from here on move expert bytes to the GPU; below, the CPU is done sooner
PIECES = (4096, 2048, 1024, 512, 256)  # tokens of a prompt computed at once: the first for which there is memory
KEPT_STEPS = 12  # captured (sequences, cache positions)
SPARE = 768 << 20  # bytes of GPU memory left for the driver, cuBLAS and what cannot be foreseen

GpuLayers = int | Literal["auto"]


@dataclass
class Layer:
    """One layer's weights. In GPU memory, but for `on_cpu`; a MoE layer has either that or `resident`."""

    weights: LayerWeights  # k_b and v_b are filled in when a prompt needs them dequantized
    k_b: Matrix
    v_b: Matrix
    resident: list[Packed] | None = None
    on_cpu: Experts | None = None
    stacks: Stacks | None = None  # experts that can be streamed


class GpuEngine:
    """`Engine` (see engine.py). Cache: [n_layer, n_slots · rows, kv_lora + qk_rope], bfloat16 on a GPU."""

    def __init__(
        self,
        source: GGUFSource,
        n_slots: int,
        capacity: int,
        gpu_layers: GpuLayers = "auto",
        make_experts: Callable[[GGUFSource, int], Experts] = open_experts,
    ):
        self.source, self.config, self.n_slots, self.capacity = source, source.config, n_slots, capacity
        self.device, self.on_gpu = source.device, source.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        c = self.config
        self.rows = -(-capacity // KV_STEP) * KV_STEP
        self.length = [0] * n_slots
        self.output_norm = self._vector("output_norm.weight")
        self.head = self._matrix("output.weight" if "output.weight" in source.file.tensors else "token_embd.weight")
        self.layers = []
        for i in range(c.n_layer):
            self.layers.append(self._layer(i, make_experts))
            if source.residency:  # what was read of the file is on the GPU now
                source.file.let_go()
        width = c.kv_lora + c.qk_rope
        self.cache = torch.zeros(c.n_layer, n_slots * self.rows, width, dtype=self.dtype, device=self.device)
        self._buffers()
        streamed = [layer.stacks for layer in self.layers if layer.stacks]
        self.ring = None
        if streamed:
            largest = max(streamed, key=lambda stacks: sum(stack.data.nbytes for stack in stacks))
            self.ring = Ring(largest, self.device, self.dtype, source.pool, source.n_threads)
        self.piece = self._piece()
        self._keep_experts(gpu_layers)
        self.steps: dict[tuple[int, int], list] = {}
        if self.on_gpu:
            self.graph_memory, self.graph_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    # Loading

    def _vector(self, name: str) -> torch.Tensor:
        return self.source.dense(name).to(self.device)

    def _upload(self, name: str) -> torch.Tensor:
        return upload(self.source.file.data(name), self.device, self.source.pool, self.source.n_threads)

    def _matrix(self, name: str) -> Matrix:
        """One matrix, or one for each head, as quantized bytes if they can be multiplied so."""
        tensor = self.source.file.tensors[name]
        if registry.in_groups(tensor.qtype):
            data = self._upload(name)
            return Packed(tensor.qtype, data if data.dim() == 3 else data[None], tensor.shape[-1], self.dtype)
        if tensor.qtype not in ("F32", "F16", "BF16"):
            log.warning("%s: no GPU kernel for %s; kept as %s", name, tensor.qtype, self.dtype)
        weights = self.source.dense(name).to(self.device, self.dtype)
        return Plain(weights if weights.dim() == 3 else weights[None])

    def _heads(self, p: str) -> tuple[Matrix, Matrix]:
        if p + "attn_kv_b.weight" not in self.source.file.tensors:
            return self._matrix(p + "attn_k_b.weight"), self._matrix(p + "attn_v_b.weight")
        k_b, v_b = split_kv_b(self.source.dense(p + "attn_kv_b.weight").to(self.device, self.dtype), self.config)
        return Plain(k_b), Plain(v_b)

    def _layer(self, i: int, make_experts: Callable[[GGUFSource, int], Experts]) -> Layer:
        c, p, matrix = self.config, f"blk.{i}.", self._matrix
        if c.q_lora is None:
            q = matrix(p + "attn_q.weight")
        else:
            q = (matrix(p + "attn_q_a.weight"), self._vector(p + "attn_q_a_norm.weight"), matrix(p + "attn_q_b.weight"))
        moe = c.is_moe(i)
        feed = router = None
        if not moe or c.n_shared:
            suffix = "_shexp" if moe else ""
            feed = Feed(*(matrix(f"{p}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down")))
        if moe:
            bias = p + "exp_probs_b.bias"
            has_bias = bias in self.source.file.tensors
            router = Router(self._vector(p + "ffn_gate_inp.weight"), self._vector(bias) if has_bias else None)
        k_b, v_b = self._heads(p)
        nothing = torch.empty(0, dtype=self.dtype, device=self.device)
        weights = LayerWeights(
            attn_norm=self._vector(p + "attn_norm.weight"),
            q=q,
            kv_a=matrix(p + "attn_kv_a_mqa.weight"),
            kv_a_norm=self._vector(p + "attn_kv_a_norm.weight"),
            k_b=nothing,
            v_b=nothing,
            output=matrix(p + "attn_output.weight"),
            ffn_norm=self._vector(p + "ffn_norm.weight"),
            feed=feed,
            router=router,
        )
        layer = Layer(weights, k_b, v_b)
        if moe:
            layer.on_cpu = make_experts(self.source, i)
            tensors = [self.source.file.tensors[name] for name in expert_names(i)]
            if unknown := {tensor.qtype for tensor in tensors if not registry.in_groups(tensor.qtype)}:
                log.warning("layer %d: no GPU kernel for %s: its experts stay on the CPU", i, ", ".join(unknown))
            else:
                layer.stacks = [self._stack(tensor) for tensor in tensors]
        return layer

    def _stack(self, tensor: GGUFTensor) -> Stack:
        residency = self.source.residency
        read = partial(residency.copy, tensor.name) if residency else None
        return Stack(tensor.qtype, self.source.data(tensor.name), tensor.shape[-1], read)

    def _buffers(self) -> None:
        """What CUDA graphs read and write, and its pinned twins on the CPU."""
        c, n = self.config, self.n_slots

        def pair(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
            host = torch.zeros(shape, dtype=dtype, pin_memory=self.on_gpu)
            return torch.zeros(shape, dtype=dtype, device=self.device), host

        self.h, self.h_host = pair(n, c.d)
        self.at, self.at_host = pair(3 * n, dtype=torch.int64)  # place in the cache, position, slot of each
        self.sent, self.sent_host = pair(n * (c.d + 2 * c.n_used))  # x, weights, experts
        self.got, self.got_host = pair(n, c.d)
        self.logits, self.logits_host = pair(n, c.n_vocab)
        self.columns = torch.arange(self.rows, device=self.device)
        self.turns = frequencies(c).to(self.device)
        self.arrived = torch.cuda.Event() if self.on_gpu else None

    def _free(self) -> int:
        return probe.free_vram(self.device)

    def _piece(self) -> int:
        """Tokens of a prompt at once."""
        if not self.on_gpu:
            return PIECES[0]
        need = partial(workspace, self.config)
        return next((n for n in PIECES if need(n) + SPARE <= self._free()), PIECES[-1])

    def _keep_experts(self, gpu_layers: GpuLayers) -> None:
        """Upload the experts of the first layers that can be; `auto`: as many as fit beside the workspace."""
        able = [layer for layer in self.layers if layer.stacks]
        size = [sum(stack.data.nbytes for stack in layer.stacks or ()) for layer in able]
        wanted = len(able) if gpu_layers == "auto" else min(gpu_layers, len(able))
        if gpu_layers != "auto" and gpu_layers > len(able):
            log.warning("--gpu-layers %d: only %d layers have experts that the GPU can hold", gpu_layers, len(able))
        room = self._free() - SPARE - workspace(self.config, self.piece) if self.on_gpu else 0
        fits = next((n for n in range(len(able), 0, -1) if sum(size[:n]) <= room), 0)
        if gpu_layers == "auto":
            wanted = min(wanted, fits)
        elif self.on_gpu and wanted > fits:
            raise QuantkitError(
                f"--gpu-layers {wanted}: {sum(size[:wanted]) / 1e9:.1f} GB of experts, but "
                f"{max(0, room) / 1e9:.1f} GB of GPU memory are free: at most {fits}"
            )
        for layer in able[:wanted]:
            assert layer.stacks
            layer.resident = [
                Packed(
                    stack.qtype,
                    upload_experts(stack, self.device, self.source.pool, self.source.n_threads),
                    stack.n_in,
                    self.dtype,
                )
                for stack in layer.stacks
            ]
            layer.on_cpu = None
        n_moe = self.config.n_moe
        log.info(
            "experts of %d of %d layers in GPU memory (%.1f GB), %d on the CPU; prompts in pieces of %d",
            wanted,
            n_moe,
            sum(size[:wanted]) / 1e9,
            n_moe - wanted,
            self.piece,
        )
        if residency := self.source.residency:
            residency.leave_out(i for i, layer in enumerate(self.layers) if layer.resident is not None)
            log.info("%s", residency)

    # Prompts

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], begin: int) -> torch.Tensor:
        if len(tokens) == 1:
            self.length[slot] = begin
            return self.decode([slot], tokens)[0]
        c = self.config
        self.length[slot] = begin + len(tokens)
        h = self.source.embed(torch.tensor([tokens]), torch.empty(1, len(tokens), c.d)).to(self.device)
        turns = angles(c, torch.arange(begin, begin + len(tokens), device=self.device))
        streaming = self.ring is not None and len(tokens) >= STREAM_TOKENS
        waiting = [layer.stacks for layer in self.layers if layer.stacks and layer.resident is None]
        chunks = self.ring.chunks(waiting) if streaming and self.ring else iter(())
        own = self.cache[:, slot * self.rows : (slot + 1) * self.rows]
        try:
            for i, layer in enumerate(self.layers):
                weights = replace(
                    layer.weights,
                    k_b=layer.k_b.dense(),
                    v_b=layer.v_b.dense(),
                    experts=self._prompt_experts(layer, chunks, streaming),
                )
                latent, key = own[i][None].split([c.kv_lora, c.qk_rope], dim=-1)
                h = h + attention(h, weights, c, turns, KVCache(latent, key, begin))
                x = rms_norm(h, weights.ffn_norm, c.rms_eps).view(-1, c.d).to(self.dtype)
                h = h + feed_forward(x, weights, c).view_as(h)
        finally:
            if streaming:
                chunks.close()
        return self.head(rms_norm(h[0, -1:], self.output_norm, c.rms_eps))[0].float().cpu()

    def _prompt_experts(self, layer: Layer, chunks: Iterator, streaming: bool) -> LayerExperts | None:
        if layer.weights.router is None:
            return None
        if layer.resident is not None:
            return unwatched(partial(self._by_chunk, self._resident_chunks(layer.resident)))
        if streaming and layer.stacks:
            return unwatched(partial(self._by_chunk, chunks))
        assert layer.on_cpu is not None
        return unwatched(partial(self._on_cpu, layer.on_cpu))

    def _on_cpu(self, experts: Experts, x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return experts(x.float().cpu(), expert.cpu(), weight.cpu()).to(self.device, copy=True)

    def _resident_chunks(self, matrices: list[Packed]) -> Iterator[tuple[int, list[Packed]]]:
        for begin in range(0, self.config.n_expert, CHUNK):
            yield begin, [Packed(m.qtype, m.data[begin : begin + CHUNK], m.n_in, m.dtype) for m in matrices]

    def _by_chunk(
        self, chunks: Iterator[tuple[int, list[Packed]]], x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor
    ) -> torch.Tensor:
        """`layers.Experts` of one layer whose chunks come next: dequantized and multiplied CHUNK experts at a time."""
        n_expert = self.config.n_expert
        out = torch.zeros(x.shape, device=x.device)
        order = torch.argsort(expert.flatten(), stable=True)
        tokens, share = order // expert.shape[1], weight.flatten()[order][:, None]
        ends = torch.bincount(expert.flatten(), minlength=n_expert).cumsum(0)
        bounds = [0, *ends.tolist()]
        for begin, (gate, up, down) in chunks:
            end = min(begin + CHUNK, n_expert)
            first, last = bounds[begin], bounds[end]
            if last > first:
                stops = (ends[begin:end] - first).int()
                rows = x[tokens[first:last]]
                hidden = F.silu(grouped(rows, gate.dense(), stops)) * grouped(rows, up.dense(), stops)
                part = grouped(hidden, down.dense(), stops).float() * share[first:last]
                for a, b in zip(bounds[begin:end], bounds[begin + 1 : end + 1], strict=True):
                    if b > a:  # an expert at a time: sums are then reproducible
                        out.index_add_(0, tokens[a:b], part[a - first : b - first])
            if end == n_expert:
                return out
        raise AssertionError("chunks ended before the layer did")

    # Decoding

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        n = len(slots)
        positions = [self.length[slot] for slot in slots]
        for slot in slots:
            self.length[slot] += 1
        self.source.embed(torch.tensor(tokens), self.h_host[:n])
        places = [slot * self.rows + position for slot, position in zip(slots, positions, strict=True)]
        self.at_host[: 3 * n] = torch.tensor(places + positions + slots)
        self.h.copy_(self.h_host, non_blocking=True)
        self.at.copy_(self.at_host, non_blocking=True)
        seen = KV_STEP
        while seen <= max(positions):
            seen *= 2
        key = (n, min(seen, self.rows))
        if self.on_gpu and key in self.steps:
            self.steps[key] = step = self.steps.pop(key)
            for graph, wait, layer in step:
                graph.replay()
                self._hand_over(wait, layer, n)
        else:
            for wait, layer in self._pieces(*key):
                self._hand_over(wait, layer, n)
            if self.on_gpu:
                self._capture(key)
        self.logits_host[:n].copy_(self.logits[:n])
        return self.logits_host[:n]

    def _capture(self, key: tuple[int, int]) -> None:
        """The pieces of this step as CUDA graphs, for the next one of its kind."""
        while len(self.steps) >= KEPT_STEPS:
            del self.steps[next(iter(self.steps))]
        torch.cuda.synchronize()
        step = []
        with torch.cuda.stream(self.graph_stream):
            pieces, going = self._pieces(*key), True
            while going:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self.graph_memory, capture_error_mode="thread_local")
                wait, layer = next(pieces)
                graph.capture_end()
                step.append((graph, wait, layer))
                going = wait != "end"
        torch.cuda.synchronize()
        self.steps[key] = step

    def _hand_over(self, wait: str, layer: int, n: int) -> None:
        """What the CPU does after a piece of a step."""
        if wait == "send":
            size = n * (self.config.d + 2 * self.config.n_used)
            self.sent_host[:size].copy_(self.sent[:size], non_blocking=True)
            if self.arrived:
                self.arrived.record()
        elif wait == "receive":
            if self.arrived:
                self.arrived.synchronize()
            experts = self.layers[layer].on_cpu
            assert experts is not None
            x, weight, ids = self._sent_parts(self.sent_host, n)
            self.got_host[:n] = experts(x, ids, weight)
            self.got[:n].copy_(self.got_host[:n], non_blocking=True)

    def _sent_parts(self, flat: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of what goes to the CPU: x float32 [n, d], weights float32 and experts int32 [n, n_used]."""
        c = self.config
        x, weight, ids = flat[: n * (c.d + 2 * c.n_used)].split([n * c.d, n * c.n_used, n * c.n_used])
        return x.view(n, -1), weight.view(n, -1), ids.view(torch.int32).view(n, -1)

    def _pieces(self, n: int, n_kv: int) -> Iterator[tuple[str, int]]:
        """One token of n sequences. Stops where the CPU has something to do: `send` layer (x and routes are ready),
        `receive` layer (its experts' output is needed next), `end`."""
        c = self.config
        h = self.h[:n]
        places, positions, slots = self.at[: 3 * n].view(3, n)
        hidden = torch.zeros(n, n_kv, device=self.device)
        hidden = hidden.masked_fill_(self.columns[:n_kv] > positions[:, None], float("-inf"))[:, None]
        turns = positions[:, None].float() * self.turns
        turned = torch.polar(torch.ones_like(turns), turns)[:, None]
        for i, layer in enumerate(self.layers):
            weights = layer.weights
            h = h + self._attend(h, layer, self.cache[i], places, slots, hidden, turned)
            x = F.rms_norm(h, (c.d,), weights.ffn_norm, c.rms_eps)
            if weights.router is None:
                assert weights.feed
                h = h + weights.feed(x)
                continue
            ids, weight = self._route(x, weights.router)
            if layer.resident is None:
                for to, value in zip(self._sent_parts(self.sent, n), (x, weight, ids), strict=True):
                    to.copy_(value)
                yield "send", i
            else:
                h = h + self._chosen(layer.resident, x, ids, weight)
            if weights.feed:
                h = h + weights.feed(x)
            if layer.resident is None:
                yield "receive", i
                h = h + self.got[:n]
        self.logits[:n] = self.head(F.rms_norm(h, (c.d,), self.output_norm, c.rms_eps))
        yield "end", -1

    def _attend(
        self,
        h: torch.Tensor,
        layer: Layer,
        cache: torch.Tensor,
        places: torch.Tensor,
        slots: torch.Tensor,
        hidden: torch.Tensor,
        turned: torch.Tensor,
    ) -> torch.Tensor:
        """As layers.attention for one new token of each sequence: h float32 [n, d] -> [n, d].

        hidden [n, 1, n_kv]: 0 or -inf, added to scores. turned complex64 [n, 1, qk_rope / 2].
        """
        c, weights, n = self.config, layer.weights, len(h)
        x = F.rms_norm(h, (c.d,), weights.attn_norm, c.rms_eps)
        if isinstance(weights.q, tuple):
            q_a, norm, q_b = weights.q
            q = q_b(F.rms_norm(q_a(x), norm.shape, norm, c.rms_eps))
        else:
            q = weights.q(x)
        q = q.view(n, c.n_head, c.qk_head)
        latent, key = weights.kv_a(x).split([c.kv_lora, c.qk_rope], dim=-1)
        latent = F.rms_norm(latent, (c.kv_lora,), weights.kv_a_norm, c.rms_eps)
        pairs = torch.cat((q[..., c.qk_nope :], key[:, None]), dim=1).view(n, c.n_head + 1, -1, 2)
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * turned).flatten(2)
        cache.index_copy_(0, places, torch.cat((latent, rotated[:, -1]), dim=-1).to(cache.dtype))
        query = torch.cat((layer.k_b.each(q[..., : c.qk_nope].contiguous()), rotated[:, :-1]), dim=-1)
        n_kv = hidden.shape[-1]
        keys = cache.view(self.n_slots, self.rows, -1)[:, :n_kv].index_select(0, slots).float()
        scores = torch.baddbmm(hidden, query, keys.transpose(1, 2), alpha=c.softmax_scale)
        mixed = scores.softmax(-1) @ keys[..., : c.kv_lora]
        return weights.output(layer.v_b.each(mixed).reshape(n, -1))

    def _route(self, x: torch.Tensor, router: Router) -> tuple[torch.Tensor, torch.Tensor]:
        if use_kernels(x.device.type):
            from quantkit.runtime import kernels

            return kernels.route(x @ router.weight.T, router.bias, self.config)
        expert, weight = route(x, router, self.config)
        return expert.int(), weight

    def _chosen(self, matrices: list[Packed], x: torch.Tensor, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        gate, up, down = matrices
        flat = ids.flatten()
        hidden = F.silu(gate.chosen(x, flat)) * up.chosen(x, flat)
        return (down.chosen(hidden, flat).view(*ids.shape, -1) * weight[..., None]).sum(1)


def grouped(x: torch.Tensor, weights: torch.Tensor, stops: torch.Tensor) -> torch.Tensor:
    """Rows x [m, n_in], in runs that end at stops int32 [k], times their matrix of weights [k, n_out, n_in]."""
    if x.is_cuda:
        return torch._grouped_mm(x, weights.transpose(-2, -1), offs=stops)
    return torch.cat([part @ w.T for part, w in zip(x.tensor_split(stops[:-1].long().cpu()), weights, strict=True)])


def workspace(c: ModelConfig, n: int) -> int:
    """Upper estimate of the bytes that a piece of n tokens needs besides weights and cache."""
    tokens = n * (
        16 * c.d + 2 * c.n_head * (4 * c.qk_head + 4 * c.v_head) + 6 * max(c.n_ff, c.n_ff_exp * c.n_used // 4)
    )
    matrices = 2 * max(c.d * c.n_head * c.v_head, c.d * c.n_ff, 3 * CHUNK * c.d * c.n_ff_exp)
    return tokens + matrices + 8 * SCORE_ELEMENTS


def fixed_bytes(tensors: dict[str, GGUFTensor], c: ModelConfig, n_tokens: int) -> dict[str, int]:
    """GPU memory that does not depend on --gpu-layers: the weights but for routed experts and the embedding (which stay
    in the mapped file), and the cache of n_tokens in all."""
    elsewhere = {name for layer in range(c.n_layer) for name in expert_names(layer)}
    if "output.weight" in tensors:
        elsewhere.add("token_embd.weight")
    weights = sum(tensor.n_bytes for name, tensor in tensors.items() if name not in elsewhere)
    return {"weights": weights, "cache": 2 * n_tokens * c.n_layer * (c.kv_lora + c.qk_rope)}
