"""Decoding and prefill with attention, shared experts and dense layers on a GPU, from quantized bytes.

Routed experts of as many layers as fit stay in GPU memory. Those of the others are computed on the CPU, one token per
sequence at a time, while the GPU computes the shared expert; long prompts instead move their bytes over the bus.

A decoding step is cut where it waits for the CPU; each piece is one CUDA graph. Everything also runs on the CPU,
without graphs: so the tests compare it with the other engines.
"""

import logging
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from typing import Literal, NamedTuple

import torch

from quantkit import machine
from quantkit.codecs import registry
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.runtime.activations import Where
from quantkit.runtime.engines.gpu_buffers import Buffers
from quantkit.runtime.engines.gpu_layers import (
    ChunkedExperts,
    Chunks,
    CpuExperts,
    GpuLayer,
    Query,
    attend,
    chosen,
    feed,
    resident_chunks,
)
from quantkit.runtime.engines.gpu_memory import (
    PIECES,
    SPARE,
    GpuLayers,
    largest_chunk,
    largest_piece,
    resident_layers,
    workspace,
)
from quantkit.runtime.engines.staging import Part, Ring, Stack, upload, upload_experts
from quantkit.runtime.engines.step import Added, Chosen, between_of
from quantkit.runtime.experts.cpu import EXPERT_ROWS, cpu_experts
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.generate import ROWS_TOLD, Each
from quantkit.runtime.layers import (
    KVCache,
    LayerExperts,
    Router,
    attention,
    feed_forward,
    rms_norm,
    unwatched,
)
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.packed import Matrix, Packed, Plain
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import angles
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.sizes import gb

log = logging.getLogger(__name__)

KV_STEP = 256  # cache positions that a step sees: the least power of two times this
STREAM_TOKENS = 128  # prompts from here on move expert bytes to the GPU; below, the CPU is done sooner
WARM_TOKENS = 1024  # of the prompt that an engine begins with
KEPT_STEPS = 12  # captured (sequences, cache positions)

PackedChunks = Generator[tuple[int, list[Packed]], None, None]


class Pause(NamedTuple):
    """Where a step waits for the CPU. `send` a layer: x and routes are ready; `receive` it: its experts' output is
    needed next; `end`."""

    what: Literal["send", "receive", "end"]
    layer: int


class GpuEngine:
    """`generate.Engine`. Cache: [n_layer, n_slots, rows, kv_lora + qk_rope], bfloat16 on a GPU."""

    def __init__(self, weights: GGUFWeights, n_slots: int, capacity: int, gpu_layers: GpuLayers = "auto"):
        """QuantkitError if the experts of so many layers do not fit."""
        self.weights, self.config, self.n_slots, self.capacity = weights, weights.config, n_slots, capacity
        self.device, self.on_gpu = weights.device, weights.device.type == "cuda"
        self.dtype = torch.bfloat16 if self.on_gpu else torch.float32
        c = self.config
        self.rows = -(-capacity // KV_STEP) * KV_STEP
        self.length = [0] * n_slots
        self.output_norm = self._vector("output_norm.weight")
        self.head = self._matrix(weights.head_name)
        self.layers: list[GpuLayer] = []
        for i in range(c.n_layer):
            self.layers.append(self._layer(i))
            if weights.residency:  # what was read of the file is on the GPU now
                weights.file.let_go()
        width = c.kv_lora + c.qk_rope
        self.cache = torch.zeros(c.n_layer, n_slots, self.rows, width, dtype=self.dtype, device=self.device)
        self.buffers = Buffers(c, n_slots, self.device)
        self.between = between_of(c, self.device)
        self.ring = self._ring()
        self.piece = largest_piece(c, machine.free_vram(self.device)) if self.on_gpu else PIECES[0]
        self._keep_experts(gpu_layers)
        self.chunk = largest_chunk(c, self._room())
        self.steps: dict[tuple[int, int], list[tuple[torch.cuda.CUDAGraph, Pause]]] = {}
        if self.on_gpu:
            self.graph_memory, self.graph_stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            self._warm_up()

    # Loading

    def _warm_up(self) -> None:
        """What the first prompt and token would wait for: kernels compiled, experts read from the disk, memory pinned
        and touched. Where memory is limited, or less than the file, nothing is read that no token asked for; experts
        that only the CPU computes would take longer than they save."""
        begun = time.perf_counter()
        movable = all(layer.stacks or layer.router is None for layer in self.layers)
        fits = self.weights.residency is None and self.weights.file.n_bytes < machine.ram()
        if fits and movable:
            log.info("warming up: all experts are read once, kernels are compiled")
            n = min(WARM_TOKENS, self.piece, self.capacity)  # of all kinds: most experts are chosen, as by real text
            self.prefill(0, [i * self.config.n_vocab // n for i in range(n)], 0)
        for n in (1, 1, 2, 4):  # sequences: the numbers for which kernels differ; the first step is captured
            if n <= self.n_slots:
                self.length[:n] = [0] * n
                self.decode(list(range(n)), [0] * n)
        self.length = [0] * self.n_slots
        log.info("warmed up in %.1f s", time.perf_counter() - begun)

    def _vector(self, name: str) -> torch.Tensor:
        return self.weights.dense(name).to(self.device)

    def _matrix(self, name: str) -> Matrix:
        """One matrix, or one for each head, as quantized bytes if they can be multiplied so."""
        tensor = self.weights.file.tensors[name]
        if registry.in_groups(tensor.qtype):
            data = upload(self.weights.file.data(name), self.device, self.weights.workers)
            return Packed(tensor.qtype, data if data.dim() == 3 else data[None], tensor.shape[-1], self.dtype)
        if tensor.qtype not in ("F32", "F16", "BF16"):
            log.warning("%s: no GPU kernel for %s; kept as %s", name, tensor.qtype, self.dtype)
        dense = self.weights.dense(name).to(self.device, self.dtype)
        return Plain(dense if dense.dim() == 3 else dense[None])

    def _heads(self, p: str) -> tuple[Matrix, Matrix]:
        if self.weights.mla == "split":
            return self._matrix(p + "attn_k_b.weight"), self._matrix(p + "attn_v_b.weight")
        k_b, v_b = split_kv_b(self.weights.dense(p + "attn_kv_b.weight").to(self.device, self.dtype), self.config)
        return Plain(k_b), Plain(v_b)

    def _query(self, p: str) -> Query:
        if self.config.q_lora is None:
            return self._matrix(p + "attn_q.weight")
        norm = self._vector(p + "attn_q_a_norm.weight")
        return self._matrix(p + "attn_q_a.weight"), norm, self._matrix(p + "attn_q_b.weight")

    def _layer(self, i: int) -> GpuLayer:
        c, p, matrix, vector = self.config, f"blk.{i}.", self._matrix, self._vector
        moe = c.is_moe(i)
        feed = router = None
        if not moe or c.n_shared:
            suffix = "_shexp" if moe else ""
            gate, up, down = (matrix(f"{p}ffn_{part}{suffix}.weight") for part in ("gate", "up", "down"))
            feed = (gate, up, down)
        if moe:
            bias = p + "exp_probs_b.bias"
            has_bias = bias in self.weights.file.tensors
            router = Router(vector(p + "ffn_gate_inp.weight"), vector(bias) if has_bias else None)
        k_b, v_b = self._heads(p)
        layer = GpuLayer(
            attn_norm=vector(p + "attn_norm.weight"),
            q=self._query(p),
            kv_a=matrix(p + "attn_kv_a_mqa.weight"),
            kv_a_norm=vector(p + "attn_kv_a_norm.weight"),
            k_b=k_b,
            v_b=v_b,
            output=matrix(p + "attn_output.weight"),
            ffn_norm=vector(p + "ffn_norm.weight"),
            feed=feed,
            router=router,
        )
        if moe:
            self._add_experts(layer, i)
        return layer

    def _add_experts(self, layer: GpuLayer, i: int) -> None:
        """For the time being on the CPU."""
        c, weights = self.config, self.weights
        rows = weights.at_once(EXPERT_ROWS, c.n_used)
        layer.on_cpu = cpu_experts(weights.expert_stacks(i), c, weights.workers.n, rows, weights.needs(i))
        tensors = [weights.file.tensors[name] for name in expert_names(i)]
        if unknown := {tensor.qtype for tensor in tensors if not registry.in_groups(tensor.qtype)}:
            log.warning("layer %d: no GPU kernel for %s: its experts stay on the CPU", i, ", ".join(unknown))
        else:
            layer.stacks = [self._stack(tensor) for tensor in tensors]

    def _stack(self, tensor: GGUFTensor) -> Stack:
        residency = self.weights.residency
        read = partial(residency.copy, tensor.name) if residency else None
        return Stack(tensor.qtype, self.weights.data(tensor.name), tensor.shape[-1], read)

    def _ring(self) -> Ring | None:
        streamed = [layer.stacks for layer in self.layers if layer.stacks]
        if not streamed:
            return None
        largest = max(streamed, key=lambda stacks: sum(stack.data.nbytes for stack in stacks))
        return Ring(largest, self.device, self.weights.workers)

    def _room(self) -> int:
        """Bytes of GPU memory that are left beside what a prompt needs; 0 without a GPU."""
        return machine.free_vram(self.device) - SPARE - workspace(self.config, self.piece) if self.on_gpu else 0

    def _keep_experts(self, gpu_layers: GpuLayers) -> None:
        """Upload the experts of the first layers that can be, and say where they all are."""
        able = [(layer, layer.stacks) for layer in self.layers if layer.stacks]
        sizes = [sum(stack.data.nbytes for stack in stacks) for _, stacks in able]
        room = self._room() if self.on_gpu else None
        n, n_moe, workers = resident_layers(gpu_layers, sizes, room), self.config.n_moe, self.weights.workers
        for layer, stacks in able[:n]:
            gate, up, down = (
                Packed(stack.qtype, upload_experts(stack, self.device, workers), stack.n_in, self.dtype)
                for stack in stacks
            )
            layer.resident = (gate, up, down)
            layer.on_cpu = None
        log.info(
            "experts of %d of %d layers in GPU memory (%s), %d on the CPU; prompts in pieces of %d",
            n,
            n_moe,
            gb(sum(sizes[:n])),
            n_moe - n,
            self.piece,
        )
        if residency := self.weights.residency:
            residency.leave_out(i for i, layer in enumerate(self.layers) if layer.resident is not None)
            log.info("%s", residency)

    # Prompts

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """As `Engine`."""
        if len(tokens) == 1:
            self.length[slot] = begin
            logits = self.decode([slot], tokens)
            if each:
                each(logits)
            return logits[0]
        self.weights.file.check_whole()
        c = self.config
        self.length[slot] = begin + len(tokens)
        h = self.weights.embed(torch.tensor([tokens]), torch.empty(1, len(tokens), c.d)).to(self.device)
        turns = angles(c, torch.arange(begin, begin + len(tokens), device=self.device))
        chunks = self._streamed_chunks(len(tokens))
        own = self.cache[:, slot]
        try:
            for i, layer in enumerate(self.layers):
                experts = self._prompt_experts(layer, chunks)
                weights = layer.weights(experts)
                latent, key = own[i][None].split([c.kv_lora, c.qk_rope], dim=-1)
                h = h + attention(h, weights, c, turns, KVCache(latent, key, begin))
                pause(self.device)
                x = rms_norm(h, weights.ffn_norm, c.rms_eps).view(-1, c.d).to(self.dtype)
                h = h + feed_forward(x, weights, c).view_as(h)
                pause(self.device)
        finally:
            if chunks:
                chunks.close()
        if each:
            for rows in h[0].split(ROWS_TOLD):
                each(self.head(rms_norm(rows, self.output_norm, c.rms_eps)).float().cpu())
                pause(self.device)
        return self.head(rms_norm(h[0, -1:], self.output_norm, c.rms_eps))[0].float().cpu()

    def _streamed_chunks(self, n_tokens: int) -> PackedChunks | None:
        """The experts that are not in GPU memory, on their way there; None if a prompt is too short for that."""
        if self.ring is None or n_tokens < STREAM_TOKENS:
            return None
        waiting = [layer.stacks for layer in self.layers if layer.stacks and layer.resident is None]
        return self._packed(self.ring.chunks(waiting))

    def _packed(self, moved: Generator[tuple[int, list[Part]], None, None]) -> PackedChunks:
        with closing(moved):
            for begin, parts in moved:
                yield begin, [Packed(*part, self.dtype) for part in parts]

    def _prompt_experts(self, layer: GpuLayer, streamed: Chunks | None) -> LayerExperts | None:
        n_expert = self.config.n_expert
        if layer.router is None:
            return None
        if layer.resident is not None:
            return unwatched(ChunkedExperts(resident_chunks(layer.resident, self.chunk), n_expert))
        if streamed is not None and layer.stacks:
            return unwatched(ChunkedExperts(streamed, n_expert))
        assert layer.on_cpu is not None
        return unwatched(CpuExperts(layer.on_cpu))

    # Decoding

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`."""
        self.weights.file.check_whole()
        n = len(slots)
        positions = [self.length[slot] for slot in slots]
        for slot in slots:
            self.length[slot] += 1
        buffers = self.buffers
        self.weights.embed(torch.tensor(tokens), buffers.h_host[:n])
        cells = [slot * self.rows + position for slot, position in zip(slots, positions, strict=True)]
        buffers.at_host[: 3 * n] = torch.tensor(cells + positions + slots)
        buffers.h.copy_(buffers.h_host, non_blocking=True)
        buffers.at.copy_(buffers.at_host, non_blocking=True)
        seen = KV_STEP
        while seen <= max(positions):
            seen *= 2
        key = (n, min(seen, self.rows))
        if self.on_gpu and key in self.steps:
            self.steps[key] = step = self.steps.pop(key)
            for graph, pause in step:
                graph.replay()
                self._hand_over(pause, n)
        else:
            for pause in self._pieces(*key):
                self._hand_over(pause, n)
            if self.on_gpu:
                self._capture(key)
        buffers.logits_host[:n].copy_(buffers.logits[:n])
        return buffers.logits_host[:n]

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
                pause = next(pieces)
                graph.capture_end()
                step.append((graph, pause))
                going = pause.what != "end"
        torch.cuda.synchronize()
        self.steps[key] = step

    def _hand_over(self, pause: Pause, n: int) -> None:
        """What the CPU does after a piece of a step."""
        experts = self.layers[pause.layer].on_cpu
        if pause.what == "send":
            self.buffers.send(n)
            assert experts is not None
            experts.wake()
        elif pause.what == "receive":
            assert experts is not None
            x, weight, ids = self.buffers.received(n)
            self.buffers.answer(experts(x, ids, weight))

    def _pieces(self, n: int, n_kv: int) -> Iterator[Pause]:
        """One token of n sequences, as far as n_kv positions of the cache. Stops where the CPU has something to do."""
        buffers, between, where = self.buffers, self.between, self._where(n)
        h, nothing = buffers.h[:n], (None, None)
        added: Added = nothing
        shares: Chosen | None = None
        for i, layer in enumerate(self.layers):
            h, x = between.norm(h, layer.attn_norm, added, shares)
            h, x = between.norm(h, layer.ffn_norm, (attend(x, layer, between, self.cache[i], where, n_kv), None))
            shares = None
            if layer.router is not None:
                ids, weight = between.route(x.x, layer.router)
                if layer.resident is None:
                    for to, value in zip(buffers.to_send(buffers.sent, n), (x.x, weight, ids), strict=True):
                        to.copy_(value)
                    yield Pause("send", i)
                else:
                    shares = chosen(x, layer.resident, between, ids), weight
            output = None if layer.feed is None else feed(x, layer.feed, between)
            if layer.router is not None and layer.resident is None:
                yield Pause("receive", i)
                added = output, buffers.got[:n]
            else:
                added = output, None
        _, x = between.norm(h, self.output_norm, added, shares)
        buffers.logits[:n] = self.head(x)
        yield Pause("end", -1)

    def _where(self, n: int) -> Where:
        cells, positions, slots = self.buffers.at[: 3 * n].view(3, n)
        turns = positions[:, None].float() * self.buffers.turns
        return Where(cells, slots, positions, torch.stack((turns.cos(), turns.sin()), dim=-1).flatten(1))
