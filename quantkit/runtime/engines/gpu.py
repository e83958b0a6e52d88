"""Decoding and prefill with attention, shared experts and dense layers on a GPU, from quantized bytes.

As many routed experts as fit stay in GPU memory, those chosen most. The others are computed on the CPU, one token per
sequence at a time, while the GPU computes its own and the shared expert; in prompts their bytes may be moved instead.

A decoding step is cut where it waits for the CPU; each piece is one CUDA graph. Where `Buffers.mapped`, the GPU itself
waits, and the next piece is launched before. Everything also runs on the CPU, without graphs: so the tests compare it
with the other engines.
"""

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

from quantkit import machine
from quantkit.codecs import registry
from quantkit.formats.gguf_header import GGUFTensor
from quantkit.progress import say_once
from quantkit.runtime.activations import Where, use_kernels
from quantkit.runtime.engines.compiled import compile_kernels
from quantkit.runtime.engines.embedding import Embedding
from quantkit.runtime.engines.gpu_buffers import SHORT, Buffers, rows_of
from quantkit.runtime.engines.gpu_layers import Frames, GpuLayer, OnCpu, attend, chosen, feed
from quantkit.runtime.engines.gpu_load import Loading, calibrated
from quantkit.runtime.engines.gpu_memory import (
    CHUNKS,
    PIECES,
    SPARE,
    Able,
    GpuLayers,
    chunk_bytes,
    kept_experts,
    largest_chunk,
    largest_piece,
    workspace,
)
from quantkit.runtime.engines.heat import Heat
from quantkit.runtime.engines.hot import HotExperts
from quantkit.runtime.engines.pieces import Pieces, attention, feed_forward
from quantkit.runtime.engines.prompts import Prompts
from quantkit.runtime.engines.stacks import Stack, Stacks, expert_bytes
from quantkit.runtime.engines.staging import Ring, upload_experts
from quantkit.runtime.engines.step import Added, ByKernels, Chosen, between_of
from quantkit.runtime.engines.warm_up import warm_up, whole_piece
from quantkit.runtime.experts.cpu import EXPERT_ROWS, cpu_experts
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.generate import ROWS_TOLD, Each, Piece
from quantkit.runtime.layers import rms_norm
from quantkit.runtime.packed import Packed
from quantkit.runtime.pauses import launched, pause, pausing
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.sizes import gb

log = logging.getLogger(__name__)

KV_STEP = 256  # cache positions that a step sees: the least power of two times this
KEPT_STEPS = 24  # captured (rows, cache positions)


class Wait(NamedTuple):
    """Where a step waits for the CPU. `send` a layer: x and routes are ready; `receive` it: its experts' output is
    needed next; `end`."""

    what: Literal["send", "receive", "end"]
    layer: int


Step = list[tuple[torch.cuda.CUDAGraph, list[Wait]]]
"""Graphs of a step, and what the CPU does after each."""


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
        loading = Loading(weights, self.dtype)
        self.output_norm = loading.vector("output_norm.weight")
        self.head = loading.matrix(weights.head_name)
        self.embedding = Embedding(weights)
        self.layers = loading.layers()
        for i, layer in enumerate(self.layers):
            if layer.router is not None:
                self._add_experts(layer, i)
        width = c.kv_lora + c.qk_rope
        self.cache = torch.zeros(c.n_layer, n_slots, self.rows, width, dtype=self.dtype, device=self.device)
        self.buffers = Buffers(c, max(n_slots, SHORT), self.rows, self.embedding.row_bytes, self.device)
        self.between = between_of(c, self.device)
        self.ring = self._ring()
        self.prompts = Prompts(self.layers, weights, self.ring, self._on_cpu)
        self.hot = HotExperts(Heat(np.zeros((c.n_layer, c.n_expert)), c.n_used), self.device)
        self.piece = largest_piece(c, machine.free_vram(self.device)) if self.on_gpu else PIECES[0]
        self._keep_experts(gpu_layers)
        self.prompts.chunk = largest_chunk(c, self._room())
        # Torch copies a sequence's whole cache for each row of a step: too much for a prompt's.
        sparing = not self.on_gpu or isinstance(self.between, ByKernels)
        self.by_steps = sparing and all(layer.resident or not layer.router for layer in self.layers)
        self.captures = use_kernels(self.device.type)  # what torch does instead waits for the GPU in between
        self.steps: dict[tuple[int, int], Step] = {}
        self.met = set[tuple[int, int]]()  # kinds of steps that there have been, to their end
        if self.on_gpu:
            self.graph_stream = torch.cuda.Stream()
            with self.hot.still():
                if self.captures:
                    compile_kernels(self)
                warm_up(self)

    # Loading

    def _add_experts(self, layer: GpuLayer, i: int) -> None:
        """For the time being on the CPU."""
        layer.on_cpu = self._on_cpu(i, self.weights.workers.n)
        tensors = [self.weights.file.tensors[name] for name in expert_names(i)]
        if unknown := {tensor.qtype for tensor in tensors if not registry.in_groups(tensor.qtype)}:
            log.warning("layer %d: no GPU kernel for %s: its experts stay on the CPU", i, ", ".join(unknown))
        else:
            layer.stacks = [self._stack(tensor) for tensor in tensors]

    def _on_cpu(self, i: int, n_threads: int) -> OnCpu:
        c, weights = self.config, self.weights
        rows = weights.at_once(EXPERT_ROWS, c.n_used)
        return cpu_experts(weights.expert_stacks(i), c, n_threads, rows, weights.needs(i))

    def _stack(self, tensor: GGUFTensor) -> Stack:
        residency = self.weights.residency
        read = partial(residency.copy, tensor.name) if residency else None
        return Stack(tensor.qtype, self.weights.data(tensor.name), tensor.shape[-1], read)

    def upload(self, stacks: Stacks, experts: list[int]) -> tuple[Packed, Packed, Packed]:
        """gate, up and down of these experts."""
        gate, up, down = (
            Packed(
                stack.qtype, upload_experts(stack, self.device, self.weights.workers, experts), stack.n_in, self.dtype
            )
            for stack in stacks
        )
        return gate, up, down

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
        """Upload the experts that are to be in GPU memory, and say where they all are."""
        c, weights = self.config, self.weights
        able = [i for i, layer in enumerate(self.layers) if layer.stacks]
        sizes = np.array([expert_bytes(self.layers[i].stacks or []) for i in able], np.int64)
        room, costs = self._room() if self.on_gpu else None, self.prompts.costs
        visits = c.n_used * sizes * (costs.visit + costs.row if costs else 0.0)
        shares, fits = None, room is not None and c.n_expert * sizes.sum() <= room
        if isinstance(gpu_layers, float) or (gpu_layers == "auto" and room is not None and not fits):
            shares = calibrated(weights.file.path, c)
        if room is not None and gpu_layers == "auto" and not fits:
            room -= chunk_bytes(c, CHUNKS[-1])  # or prompts would have to do with the smallest
        few = Able(sizes, c.n_expert, room, visits)
        here = kept_experts(gpu_layers, few, None if shares is None else shares[able])
        for i, own in zip(able, here, strict=True):
            layer, experts = self.layers[i], np.flatnonzero(own).tolist()
            if not experts:
                continue
            matrices = self.upload(layer.stacks or [], experts)
            if own.all():
                layer.resident, layer.on_cpu = matrices, None
            else:
                layer.hot = Frames(layer.stacks or [], matrices, self.hot.tables[i], experts)
                self.hot.add(i, layer.hot)
        if shares is not None:
            self.hot.heat, self.prompts.shares = Heat(shares, c.n_used), shares
        self._say(here, sizes)

    def _say(self, here: np.ndarray, sizes: np.ndarray) -> None:
        whole, some, n_moe = int(here.all(1).sum()), here[~here.all(1) & here.any(1)], self.config.n_moe
        log.info(
            "experts of %d of %d layers in GPU memory%s (%s), %d on the CPU; prompts in pieces of %d",
            whole,
            n_moe,
            f", and {some.mean():.0%} of those of {len(some)} others" if len(some) else "",
            gb(int((here.sum(1) * sizes).sum())),
            n_moe - whole - len(some),
            self.piece,
        )
        if self.on_gpu and whole < n_moe and not self.buffers.mapped:
            log.warning("experts on the CPU are reached by copies, slower: no Triton, or CUDA_LAUNCH_BLOCKING is set")
        if residency := self.weights.residency:
            residency.leave_out(i for i, layer in enumerate(self.layers) if layer.resident is not None)
            log.info("%s", residency)
        self.prompts.say()

    # Prompts

    def begin_here(self) -> None:
        """As `generate.Together`: cuDNN plans attention for each thread."""
        if self.on_gpu:
            whole_piece(self, 0)

    @torch.inference_mode()
    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """As `Engine`."""
        if len(tokens) == 1:
            self.length[slot] = begin
            logits = self.decode([slot], tokens)
            if each:
                each(logits)
            return logits[0]
        return self.prefill_together([Piece(slot, tokens, begin, each)])[0]

    @torch.inference_mode()
    def prefill_together(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """As `generate.Together`: what is said in `pieces`."""
        self.weights.file.check_whole()
        for piece in pieces:
            self.length[piece.slot] = piece.begin + len(piece.tokens)
        if self.by_steps and sum(len(piece.tokens) for piece in pieces) <= SHORT:
            return self._as_step(pieces)
        c, together = self.config, Pieces(pieces, self.config, self.buffers.turned)
        h = self.embedding(together.tokens)
        with self.hot.still(), self.prompts.experts(len(h)) as experts, together.kernels():
            for i, layer in enumerate(self.layers):
                h += attention(h, layer, c, self.cache[i], together)
                pause(self.device, "attention")
                h += feed_forward(h, layer, self.between, c, experts(i), self.dtype)
                pause(self.device, "feed-forward")
        for piece, own in together.of_each(h):
            if piece.each:
                for rows in own.split(ROWS_TOLD):
                    piece.each(self._logits(rows))
                    pause(self.device, "logits")
        return self._logits(h[together.last])

    def _as_step(self, pieces: Sequence[Piece]) -> torch.Tensor:
        """Short prompts as one step: a token in the cache is seen by those after it, in the same step too."""
        tokens, sizes = [token for piece in pieces for token in piece.tokens], [len(piece.tokens) for piece in pieces]
        slots = [piece.slot for piece in pieces for _ in piece.tokens]
        positions = [piece.begin + i for piece in pieces for i in range(len(piece.tokens))]
        logits = self._step(slots, positions, tokens)
        for piece, rows in zip(pieces, logits.split(sizes), strict=True):
            if piece.each:
                piece.each(rows)
        return torch.stack([rows[-1] for rows in logits.split(sizes)])

    def _logits(self, h: torch.Tensor) -> torch.Tensor:
        """Of some rows of the residual stream [n, d], on the CPU."""
        return self.head(rms_norm(h, self.output_norm, self.config.rms_eps)).float().cpu()

    # Decoding

    @torch.inference_mode()
    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`."""
        self.weights.file.check_whole()
        positions = [self.length[slot] for slot in slots]
        for slot in slots:
            self.length[slot] += 1
        logits = self._step(slots, positions, tokens)
        self.hot.between_steps(len(slots))
        return logits

    def _step(self, slots: list[int], positions: list[int], tokens: list[int]) -> torch.Tensor:
        """Logits of tokens that follow what the cache has before them, in `logits_host`."""
        n = len(tokens)
        buffers, m = self.buffers, rows_of(n)
        self.embedding.put(tokens, buffers.tokens_there[:n])
        cells = [slot * self.rows + position for slot, position in zip(slots, positions, strict=True)]
        buffers.begin(n, m, (cells, positions, slots))
        seen = KV_STEP
        while seen <= max(positions):
            seen *= 2
        key = (m, min(seen, self.rows))
        with pausing(None):  # a step of others would begin in the middle of this one
            try:
                self._run(key)
                return buffers.logits()
            except BaseException:  # or the GPU would wait for ever, and then take what the next step sends for this one
                buffers.let_go()
                raise

    def _run(self, key: tuple[int, int]) -> None:
        """A step of this kind, to where only its logits are waited for."""
        if step := self._kept(key):
            self._replay(step)
        else:
            launched()  # this may take long, and is rare
            for wait in self._pieces(*key):
                self._hand_over(wait)
            self.met.add(key)

    def _replay(self, step: Step) -> None:
        """Where the GPU itself waits for the CPU, each graph is launched while the one before is at work."""
        ahead = int(self.buffers.mapped)
        for graph, _ in step[:ahead]:
            graph.replay()
        for i, (_, waits) in enumerate(step):
            for graph, _ in step[i + ahead : i + ahead + 1]:
                graph.replay()
            if not i:
                launched()
            for wait in waits:
                self._hand_over(wait)

    def _kept(self, key: tuple[int, int]) -> Step | None:
        """A step as graphs, captured when its kind comes for the second time, if there is memory for it: the first one
        has compiled its kernels, and tokens need not wait for both at once."""
        if key in self.steps:
            self.steps[key] = self.steps.pop(key)  # the last that was used
        elif self.captures and key in self.met:
            while len(self.steps) >= KEPT_STEPS:
                del self.steps[next(iter(self.steps))]
            try:
                self._capture(key)
            except torch.OutOfMemoryError:
                say_once("not enough GPU memory to keep decoding steps as graphs: some are launched anew, slower")
                self.steps.clear()
                torch.cuda.empty_cache()
        return self.steps.get(key)

    def _capture(self, key: tuple[int, int]) -> None:
        """The pieces of this step as CUDA graphs. Where the GPU itself waits for the CPU, a piece includes what the GPU
        does meanwhile, and the next begins with waiting."""
        torch.cuda.synchronize()
        if not self.steps:  # memory that no graph has any more cannot be given to another one
            self.graph_memory = torch.cuda.graph_pool_handle()
        step = []
        with torch.cuda.stream(self.graph_stream):
            pieces, going = self._pieces(*key), True
            while going:
                graph = torch.cuda.CUDAGraph()
                graph.capture_begin(pool=self.graph_memory, capture_error_mode="thread_local")
                try:
                    waits = [next(pieces)]
                    if self.buffers.mapped and waits[0].what == "send":
                        waits.append(next(pieces))
                finally:  # or, after an error, no later step could be captured, nor the GPU waited for
                    graph.capture_end()
                step.append((graph, waits))
                going = waits[-1].what != "end"
        torch.cuda.synchronize()
        self.steps[key] = step

    def _hand_over(self, wait: Wait) -> None:
        """What the CPU does after a piece of a step."""
        if wait.what == "send":
            self.buffers.send()
        elif wait.what == "receive":
            experts = self.layers[wait.layer].on_cpu
            assert experts is not None
            self.hot.note(wait.layer, self.buffers.answer(wait.layer, experts))

    def _pieces(self, n: int, n_kv: int, some: Sequence[int] | None = None) -> Iterator[Wait]:
        """A step of n rows, as far as n_kv positions of the cache. Stops where the CPU has something to do. some: these
        layers only."""
        buffers, between, where = self.buffers, self.between, self._where(n)
        h, nothing = self.embedding.decoded(buffers.fetch(n)), (None, None)
        added: Added = nothing
        shares: Chosen | None = None
        for i in range(len(self.layers)) if some is None else some:
            layer = self.layers[i]
            h, x = between.norm(h, layer.attn_norm, added, shares)
            h, x = between.norm(h, layer.ffn_norm, (attend(x, layer, between, self.cache[i], where, n_kv), None))
            shares = None
            if layer.router is not None:
                table = layer.hot.table if layer.hot else None
                ids, weight, frames = between.route(x.x, layer.router, table)
                if layer.resident is None:
                    buffers.put(i, x.x, weight, ids)
                    yield Wait("send", i)
                else:
                    shares = chosen(x, layer.resident, between, ids), weight
                if layer.hot is not None and frames is not None:  # while the CPU computes the others
                    shares = chosen(x, layer.hot.matrices, between, frames), weight
            output = None if layer.feed is None else feed(x, layer.feed, between)
            if layer.router is not None and layer.resident is None:
                yield Wait("receive", i)
                added = output, buffers.take(i, n)
            else:
                added = output, None
        _, x = between.norm(h, self.output_norm, added, shares)
        buffers.finish(self.head(x))
        yield Wait("end", -1)

    def _where(self, n: int) -> Where:
        cells, positions, slots = self.buffers.at[: 3 * n].view(3, n)
        return Where(cells, slots, positions, self.buffers.turned)
