"""The whole model as one ggml graph on the CPU: a step is one call, without Python between the layers.

The mathematics is that of `layers` (absorbed MLA over the compressed cache, noaux_tc routing); matrices stay quantized
in the mapped file. Decoding gives a sequence the same bits whatever runs beside it: each column of a product is
computed alone, and attention goes over a sequence's own cache with ggml's plain kernel.

Long pieces of prompts take another way into the same cache (see by_layers.py).
"""

import math
from functools import partial, reduce
from itertools import pairwise
from math import prod

import numpy as np
import torch

from quantkit.ggml.graph import Graph
from quantkit.ggml.library import TensorP, library
from quantkit.models.tokenizer import check_ids
from quantkit.progress import say
from quantkit.runtime.engines.by_layers import ByLayers
from quantkit.runtime.experts import native
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.generate import ROWS_TOLD, Each
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.pauses import pause
from quantkit.runtime.rope import frequencies
from quantkit.runtime.sources.gguf import GGUFWeights
from quantkit.sizes import both_units

KV_STEP = 256  # cache positions that a graph sees: the least power of two times this; masked ones cost next to nothing
DENSE_ROWS = 32  # rows of a product from which on dequantizing a matrix may cost less than it saves ...
DENSE_MACS = 1 << 30  # ... if a layer has so much to multiply that going through it in Python does not show
PIECE_ROWS = 64  # tokens per expert that the size of prompt pieces aims at
KEPT_GRAPHS = {True: 8, False: 2}  # decoding (small), prompt pieces (at R1's size 0.6 GB of activations each)
WORTH_SAYING = 1 << 27  # bytes of memory
PART_TENSORS = 10  # of the experts of some tokens
LAYER_TENSORS = 192  # tensors and nodes of a layer, views included, without those of attention runs and experts


class GraphEngine:
    """`generate.Engine` of a GGUF on the CPU; `open.open_engine` makes it. Cache: float32 [n_layer, n_slots, rows,
    kv_lora + qk_rope], untouched pages of which take no memory: at R1's size 140 kB a token."""

    def __init__(self, weights: GGUFWeights, n_slots: int, capacity: int, by_layers: ByLayers):
        """by_layers: the way of long pieces."""
        self.weights, self.config, self.n_slots, self.capacity = weights, weights.config, n_slots, capacity
        self.by_layers = by_layers
        say(f"computing with {library()}")
        c = self.config
        self.rows = -(-capacity // KV_STEP) * KV_STEP
        self.cache = torch.zeros(c.n_layer, n_slots, self.rows, c.kv_lora + c.qk_rope)
        self.length = [0] * n_slots
        plain = c.rope_base ** (-torch.arange(c.qk_rope // 2, dtype=torch.float64) / (c.qk_rope // 2))
        self.holder = Graph(weights.workers.n, len(weights.file.tensors) + 3 * c.n_layer + 1)
        self.rope_factors = self.holder.over((plain / frequencies(c).double()).float())
        kv_b = [f"blk.{layer}.attn_kv_b.weight" for layer in range(c.n_layer)] if weights.mla == "combined" else []
        self.tensors = {name: self._weight(name) for name in weights.file.tensors if name not in kv_b}
        if self.holder.copied >= WORTH_SAYING:
            say(f"{both_units(self.holder.copied)} of matrices are copied, rows interleaved for ggml's products")
        self.caches = [self.holder.over(layer.view(n_slots * self.rows, -1)) for layer in self.cache]
        for layer, name in enumerate(kv_b):  # used in two parts
            k_b, v_b = split_kv_b(weights.dense(name), c)
            self.tensors[f"blk.{layer}.attn_k_b.weight"] = self.holder.over(k_b)
            self.tensors[f"blk.{layer}.attn_v_b.weight"] = self.holder.over(v_b)
        stacks = {layer: weights.expert_stacks(layer) for layer in range(c.n_layer) if c.is_moe(layer)}
        self.native = {
            layer: native.NativeLayer(lib, own, c) for layer, own in stacks.items() if (lib := native.suits(own, c))
        }
        self.graphs: dict[tuple, TokenGraph] = {}
        self.piece = min(max(512, PIECE_ROWS * c.n_expert // c.n_used), 4096)
        shapes = [tensor.shape for tensor in weights.file.tensors.values() if tensor.name.startswith("blk.")]
        self.layer_weights = sum(prod(shape) for shape in shapes if len(shape) == 2) // c.n_layer

    def prepare(self) -> None:
        """Load the decoders that the first long piece would wait for, and with it whoever is answered meanwhile: a row
        of each type is dequantized."""
        for tensor in {tensor.qtype: tensor for tensor in self.weights.file.tensors.values()}.values():
            data, row = self.weights.file.data(tensor.name), (0,) * (len(tensor.shape) - 1)
            to = torch.empty(1, tensor.shape[-1], dtype=self.by_layers.tiled.dtype)
            self.weights.unpack(tensor.name, data[row], to)

    def _weight(self, name: str) -> TensorP:
        tensor = self.weights.file.tensors[name]
        n_matrices, n_out, n_in = (1, 1, *tensor.shape)[-3:]
        # Experts would need as much memory again, and rows of the embedding are read one by one.
        repack = n_matrices == 1 and name != "token_embd.weight" and self.weights.residency is None
        return self.holder.weights(tensor.qtype, self.weights.data(name), n_in, n_out, n_matrices, repack)

    def _step(self, slots: tuple[int, ...], n: int, n_kv: int, every: bool = False) -> "TokenGraph":
        key = (slots, n, n_kv, every)
        step = self.graphs.pop(key, None) or TokenGraph(self, slots, n, n_kv, every)
        self.graphs[key] = step
        alike = [other for other in self.graphs if (other[1] == 1) == (n == 1)]
        for oldest in alike[: -KEPT_GRAPHS[n == 1]]:
            del self.graphs[oldest]
        return step

    def _n_kv(self, length: int) -> int:
        return min(self.rows, KV_STEP << max(0, math.ceil(math.log2(length / KV_STEP))))

    def prefill(self, slot: int, tokens: list[int], begin: int, each: Each | None = None) -> torch.Tensor:
        """As `Engine`."""
        self.weights.file.check_whole()
        self.length[slot] = begin + len(tokens)
        if self._goes_by_layers(len(tokens)):
            return self.by_layers.prefill(torch.tensor([tokens]), self.cache[:, slot : slot + 1], begin, each)
        logits, size = torch.empty(0), ROWS_TOLD if each else len(tokens)
        for at in range(0, len(tokens), size):
            if at:
                pause(what="logits")
            part, end = tokens[at : at + size], begin + min(len(tokens), at + size)
            step = self._step((slot,), len(part), self._n_kv(end), each is not None)
            logits = step.run(np.array(part), np.array([begin + at]))
            if each:
                each(logits)
        return logits[-1]

    def _goes_by_layers(self, n: int) -> bool:
        """Whether a piece of n tokens is to be multiplied by dequantized matrices."""
        experts_pay = n * self.config.n_used >= DENSE_ROWS * self.config.n_expert
        return experts_pay or (n >= DENSE_ROWS and n * self.layer_weights >= DENSE_MACS)

    def decode(self, slots: list[int], tokens: list[int]) -> torch.Tensor:
        """As `Engine`."""
        self.weights.file.check_whole()
        order = sorted(range(len(slots)), key=slots.__getitem__)
        begin = np.array([self.length[slots[i]] for i in order])
        for slot in slots:
            self.length[slot] += 1
        step = self._step(tuple(slots[i] for i in order), 1, self._n_kv(int(begin.max()) + 1))
        logits = step.run(np.array([tokens[i] for i in order]), begin)
        return logits if order == sorted(order) else logits[torch.tensor(order).argsort()]


class TokenGraph:
    """The graph of n new tokens for each of several slots (ascending); either n or the number of slots is 1. every:
    logits of all tokens, not only of each slot's last.

    Shapes are in ggml's order, fastest first. s: slots, n: tokens of each, N = s n.
    """

    def __init__(self, engine: GraphEngine, slots: tuple[int, ...], n: int, n_kv: int, every: bool = False):
        self.engine, self.config, self.slots, self.n, self.n_kv = engine, engine.config, slots, n, n_kv
        c = self.config
        self.total = len(slots) * n
        residency = engine.weights.residency
        self.rows = residency.most // c.n_used if residency else self.total  # tokens whose experts are computed at once
        per_layer = LAYER_TENSORS + 4 * len(slots) + 2 * c.n_used + PART_TENSORS * -(-self.total // self.rows)
        self.graph = Graph(engine.weights.workers.n, per_layer * c.n_layer + 64)
        self.op = self.graph.op
        tokens, self.token_values = self._input((self.total,), torch.int32)
        self.positions, self.position_values = self._input((self.total,), torch.int32)
        self.places, self.place_values = self._input((self.total,), torch.int64)
        self.offsets = np.repeat(np.array(slots) * engine.rows, n)
        self.masks, self.mask = self._input((len(slots), 1, n, n_kv), torch.float16)
        last = self.total if every or n == 1 else 1
        h = self.op("get_rows", engine.tensors["token_embd.weight"], tokens)
        for layer in range(c.n_layer):
            h = self.op("add", h, self._attention(h, layer))
            if layer == c.n_layer - 1:  # only the last tokens go on
                h = self._view(h, (c.d, last), offset=(self.total - last) * 4 * c.d)
            x = self._norm(h, f"blk.{layer}.ffn_norm.weight")
            h = self.op("add", h, self._feed_forward(x, layer))
        x = self._reshape(self._norm(h, "output_norm.weight"), c.d, 1, last)  # see _product
        y = self.op("mul_mat", engine.tensors[engine.weights.head_name], x)
        self.logits = self.graph.result(y, (last, c.n_vocab))
        self.graph.finish(y, allocate=True, reference=n == 1)

    def _input(self, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[TensorP, np.ndarray]:
        tensor, storage = self.graph.input(shape, dtype)
        return tensor, storage.numpy()

    def run(self, tokens: np.ndarray, begin: np.ndarray) -> torch.Tensor:
        """tokens int [N]; begin int [s]: what each slot's cache holds -> float32 logits of the last tokens, or all."""
        check_ids(tokens.tolist(), self.config.n_vocab)
        places = (begin[:, None] + np.arange(self.n)).reshape(-1)
        self.token_values[:] = tokens
        self.position_values[:] = places
        np.add(places, self.offsets, out=self.place_values)
        for row, place in zip(self.mask.reshape(self.total, -1), places.tolist(), strict=True):
            row[: place + 1] = 0
            row[place + 1 :] = -np.inf
        self.graph.run()
        return self.logits

    def _view(self, x: TensorP, ne: tuple[int, ...], strides: tuple[int, ...] = (), offset: int = 0) -> TensorP:
        """A float32 view; strides in bytes of the second and later dimensions, by default packed."""
        ne = (*ne, 1, 1, 1)[:4]
        nb = list(strides)
        while len(nb) < 3:
            nb.append((nb[-1] if nb else 4) * ne[len(nb)])
        return self.op("view_4d", x, *ne, *nb, offset)

    def _reshape(self, x: TensorP, *ne: int) -> TensorP:
        return self.op("reshape_4d", x, *(*ne, 1, 1, 1)[:4])

    def _norm(self, x: TensorP, name: str) -> TensorP:
        return self.op("mul", self.op("rms_norm", x, self.config.rms_eps), self.engine.tensors[name])

    def _product(self, weight: TensorP, x: TensorP) -> TensorP:
        """x [n_in, N] -> [n_out, N]. In decoding every column is a batch of its own: ggml then takes the same kernel
        for one column as for many, which it does not for float and Q8_0 matrices of several columns."""
        if self.n > 1:
            return self.op("mul_mat", weight, x)
        n_in, n_columns = x.contents.ne[:2]
        y = self.op("mul_mat", weight, self._reshape(x, n_in, 1, n_columns))
        return self._reshape(y, weight.contents.ne[1], n_columns)

    def _attention(self, h: TensorP, layer: int) -> TensorP:
        c, w, p = self.config, self.engine.tensors, f"blk.{layer}.attn_"
        x = self._norm(h, p + "norm.weight")
        if c.q_lora is None:
            q = self._product(w[p + "q.weight"], x)
        else:
            low = self._norm(self._product(w[p + "q_a.weight"], x), p + "q_a_norm.weight")
            q = self._product(w[p + "q_b.weight"], low)
        self._remember(self._product(w[p + "kv_a_mqa.weight"], x), layer)
        query = self._absorbed_query(q, w[p + "k_b.weight"])
        mixed = self._attend(query, layer)  # [kv_lora, head, n, s]
        values = self.op("mul_mat", w[p + "v_b.weight"], self.op("permute", mixed, 0, 2, 1, 3))  # [v, n, head, s]
        if self.n > 1:
            values = self.op("cont", self.op("permute", values, 0, 2, 1, 3))
        return self._product(w[p + "output.weight"], self._reshape(values, c.v_head * c.n_head, self.total))

    def _rope(self, x: TensorP) -> TensorP:
        """x [qk_rope, heads, N]. The factors turn ggml's plain frequencies into our own (YaRN or not)."""
        c = self.config
        return self.op(
            "rope_ext",
            x,
            self.positions,
            self.engine.rope_factors,
            c.qk_rope,
            0,
            c.n_context,
            c.rope_base,
            1.0,
            0.0,
            1.0,
            0.0,
            0.0,
        )

    def _remember(self, kv: TensorP, layer: int) -> None:
        """Write latents and rotated keys [kv_lora + qk_rope, N] to the cache, before anything reads it."""
        c, row = self.config, 4 * (self.config.kv_lora + self.config.qk_rope)
        latent = self._norm(self._view(kv, (c.kv_lora, self.total), (row,)), f"blk.{layer}.attn_kv_a_norm.weight")
        key = self._rope(self._view(kv, (c.qk_rope, 1, self.total), (row, row), 4 * c.kv_lora))
        both = self.op("concat", latent, self._reshape(key, c.qk_rope, self.total), 0)
        self.graph.expand(self.op("set_rows", self.engine.caches[layer], both, self.places))

    def _absorbed_query(self, q: TensorP, k_b: TensorP) -> TensorP:
        """q [qk_head x head, N] -> [kv_lora + qk_rope, n, head, s]."""
        c, head = self.config, 4 * self.config.qk_head
        token = head * c.n_head
        nope = self._view(q, (c.qk_nope, self.n, c.n_head, len(self.slots)), (token, head, token * self.n))
        latent = self.op("mul_mat", k_b, nope)
        key = self._rope(self._view(q, (c.qk_rope, c.n_head, self.total), (head, token), 4 * c.qk_nope))
        head, token = 4 * c.qk_rope, 4 * c.qk_rope * c.n_head
        key = self._view(key, (c.qk_rope, self.n, c.n_head, len(self.slots)), (token, head, token * self.n))
        return self.op("concat", latent, key, 0)

    def _attend(self, query: TensorP, layer: int) -> TensorP:
        """Each slot's queries over its own cache: [kv_lora, head, n, s]. Neighbouring slots are one operation."""
        c, row = self.config, 4 * (self.config.kv_lora + self.config.qk_rope)
        slot, cache, parts = row * self.engine.rows, self.engine.caches[layer], []
        breaks = [i for i in range(1, len(self.slots)) if self.slots[i] != self.slots[i - 1] + 1]
        for begin, end in pairwise([0, *breaks, len(self.slots)]):
            strides, offset = (row, slot, slot), self.slots[begin] * slot
            keys = self._view(cache, (row // 4, self.n_kv, 1, end - begin), strides, offset)
            values = self._view(cache, (c.kv_lora, self.n_kv, 1, end - begin), strides, offset)
            own = self._view(query, (row // 4, self.n, c.n_head, end - begin), (), begin * row * self.n * c.n_head)
            width = 2 * self.n_kv
            mask = self._view(
                self.masks,
                (self.n_kv, self.n, 1, end - begin),
                (width, width * self.n, width * self.n),
                begin * width * self.n,
            )
            parts.append(self.op("flash_attn_ext", own, keys, values, mask, c.softmax_scale, 0.0, 0.0))
        mixed = parts[0]
        for part in parts[1:]:
            mixed = self.op("concat", mixed, part, 3)
        return mixed

    def _feed_forward(self, x: TensorP, layer: int) -> TensorP:
        p = f"blk.{layer}.ffn_"
        if not self.config.is_moe(layer):
            return self._feed(x, p, "")
        out = self._experts(x, layer)
        return self.op("add", out, self._feed(x, p, "_shexp")) if self.config.n_shared else out

    def _feed(self, x: TensorP, prefix: str, suffix: str) -> TensorP:
        gate, up, down = (self.engine.tensors[f"{prefix}{part}{suffix}.weight"] for part in ("gate", "up", "down"))
        return self._product(down, self.op("swiglu_split", self._product(gate, x), self._product(up, x)))

    def _experts(self, x: TensorP, layer: int) -> TensorP:
        c, w, p = self.config, self.engine.tensors, f"blk.{layer}."
        n = x.contents.ne[1]
        scores = self._product(w[p + "ffn_gate_inp.weight"], x)
        scores = self.op("sigmoid" if c.scoring == "sigmoid" else "soft_max", scores)
        chosen = self.op("argsort_top_k", self._choice(scores, p), c.n_used)
        weight = self.op("get_rows", self._reshape(scores, 1, c.n_expert, n), chosen)
        if c.norm_weights:
            flat = self._reshape(weight, c.n_used, n)
            weight = self._reshape(self.op("div", flat, self.op("sum_rows", flat)), 1, c.n_used, n)
        weight = self.op("scale", weight, c.weights_scale)
        starts = range(0, n, self.rows)
        if layer in self.engine.native:
            sums = [self._summed(x, chosen, weight, layer, at, min(self.rows, n - at)) for at in starts]
            return reduce(lambda a, b: self.op("concat", a, b, 1), sums)
        parts = [self._chosen(x, chosen, layer, at, min(self.rows, n - at)) for at in starts]
        y = self.op("mul", reduce(lambda a, b: self.op("concat", a, b, 2), parts), weight)  # [d, n_used, n]
        views = [self._view(y, (c.d, n), (4 * c.d * c.n_used,), 4 * c.d * i) for i in range(c.n_used)]
        out = views[0]
        for view in views[1:]:
            out = self.op("add", out, view)
        return self.op("cont", out) if c.n_used == 1 else out

    def _chosen(self, x: TensorP, chosen: TensorP, layer: int, begin: int, n: int) -> TensorP:
        """Outputs [d, n_used, n] of the experts of n tokens. If only some experts are in memory: of as many tokens as
        they are certain to serve, and done before the next ones are asked for."""
        c, (gate_exps, up_exps, down_exps) = self.config, (self.engine.tensors[name] for name in expert_names(layer))
        ids = self._needed(chosen, layer, begin, n)
        one = self._view(x, (c.d, 1, n), offset=begin * 4 * c.d)
        gate, up = (self.op("mul_mat_id", stack, one, ids) for stack in (gate_exps, up_exps))
        y = self.op("mul_mat_id", down_exps, self.op("swiglu_split", gate, up), ids)
        self.graph.expand(y)
        return y

    def _summed(self, x: TensorP, chosen: TensorP, weight: TensorP, layer: int, begin: int, n: int) -> TensorP:
        """As `_chosen`, by our own products: weighted and summed already, [d, n]."""
        c = self.config
        ids = self._needed(chosen, layer, begin, n)
        rows = self._view(x, (c.d, n), offset=begin * 4 * c.d)
        share = self._view(weight, (1, c.n_used, n), (4, 4 * c.n_used), begin * 4 * c.n_used)
        y = native.node(self.graph, self.engine.native[layer], rows, ids, share)
        self.graph.expand(y)
        return y

    def _needed(self, chosen: TensorP, layer: int, begin: int, n: int) -> TensorP:
        """Experts [n_used, n] of some tokens, in memory once this is computed."""
        row = chosen.contents.nb[1]
        ids = self._view(chosen, (self.config.n_used, n), (row,), begin * row)
        if residency := self.engine.weights.residency:
            ids = self.graph.watch(ids, partial(residency.need, layer))
        return ids

    def _choice(self, scores: TensorP, p: str) -> TensorP:
        """What experts are chosen by: scores [n_expert, N] with bias, those of groups left out at -inf."""
        c = self.config
        if (bias := p + "exp_probs_b.bias") in self.engine.tensors:
            scores = self.op("add", scores, self.engine.tensors[bias])
        if c.n_group == 1:
            return scores
        n, size, n_best = scores.contents.ne[1], c.n_expert // c.n_group, 2 if c.group_score == "top2" else 1
        grouped = self._reshape(scores, size, c.n_group, n)
        best = self.op("argsort_top_k", grouped, n_best)
        best = self.op("get_rows", self._reshape(scores, 1, size, c.n_group, n), best)
        per_group = self.op("sum_rows", self._reshape(best, n_best, c.n_group, n))
        kept = self.op("argsort_top_k", self._reshape(per_group, c.n_group, n), c.n_group_used)
        out = self.op("fill", grouped, -math.inf)
        out = self.op("set_rows", out, self.op("get_rows", grouped, kept), kept)
        return self._reshape(out, c.n_expert, n)
