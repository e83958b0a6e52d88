"""Layers of the original checkpoint."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from quantkit.formats.checkpoint import Checkpoint
from quantkit.models import family
from quantkit.models.tokenizer import check_ids
from quantkit.models.tokenizer_metadata import read_tokenizer
from quantkit.runtime.compressed import CompressedLayer, Layer, Parts, built, by_groups
from quantkit.runtime.experts.streamed import ALONE, StreamedExperts, Turns
from quantkit.runtime.indexer import IndexerWeights
from quantkit.runtime.layers import Feed, LayerWeights, Linear, Router
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.mtp import Entrance
from quantkit.runtime.streams import Mixing, merged
from quantkit.runtime.watch import Projections
from quantkit.tensors import ROUTED_ROLES, bytes_by_layer

VOCAB_ROWS = 8192  # embedding rows read at once: 235 MB of R1's as float32


class CheckpointSource:
    """`stream.Source` of the original weights, dequantized to `dtype` on `device` as they are needed."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        """QuantkitError if a tensor is missing or has another shape than the configuration says."""
        self.checkpoint, self.device, self.dtype = checkpoint, torch.device(device), dtype
        self.name = checkpoint.name
        self.config = family.from_hf(checkpoint.config)
        checkpoint.validate(family.source_shapes(self.config))

    def tokenizer(self) -> Tokenizer:
        """The checkpoint's own."""
        return read_tokenizer(Path(self.checkpoint.path), family.PRE)

    def fingerprint(self) -> str:
        """Changes if the checkpoint does."""
        return self.checkpoint.fingerprint()

    def embed(self, tokens: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """tokens int64 [...] -> [..., d] in `out` (default: new, float32); reads the embedding a slab at a time.
        QuantkitError for an id that has no row."""
        check_ids(map(int, tokens.aminmax()) if tokens.numel() else (), self.config.n_vocab)
        out = torch.empty((*tokens.shape, self.config.d), device=self.device) if out is None else out
        flat, rows = tokens.flatten().to(out.device), out.view(-1, self.config.d)
        for start in range(0, self.config.n_vocab, VOCAB_ROWS):
            stop = min(start + VOCAB_ROWS, self.config.n_vocab)
            here = ((flat >= start) & (flat < stop)).nonzero().squeeze(1)
            if len(here):
                slab = self.checkpoint.read(self._outside("token_embd"), start, stop, device=self.device)
                for part in here.split(VOCAB_ROWS):
                    rows[part] = slab[(flat[part] - start).to(slab.device)].to(rows.device, rows.dtype)
        return out

    def layer(self, layer: int, turns: Turns = ALONE) -> Layer:
        """All of a layer but its routed experts, which are read when it is computed. turns: how ranks share these."""
        return self._mla(layer, turns) if self.config.compression is None else self._compressed(layer, turns)

    def _mla(self, layer: int, turns: Turns) -> LayerWeights:
        c, p = self.config, f"model.layers.{layer}."
        attn = p + "self_attn."
        k_b, v_b = split_kv_b(self._matrix(attn + "kv_b_proj.weight"), c)
        moe = c.is_moe(layer)
        feed = self._feed(p + ("mlp.shared_experts." if moe else "mlp.")) if not moe or c.n_shared else None
        router = experts = None
        if moe:
            bias = self._vector(p + "mlp.gate.e_score_correction_bias") if c.has_bias else None
            router = Router(self._vector(p + "mlp.gate.weight"), bias)
            experts = StreamedExperts(lambda e: self.expert(layer, e), c.n_expert, turns)
        return LayerWeights(
            attn_norm=self._vector(p + "input_layernorm.weight"),
            q=self._query(attn),
            kv_a=self._linear(attn + "kv_a_proj_with_mqa"),
            kv_a_norm=self._vector(attn + "kv_a_layernorm.weight"),
            k_b=k_b,
            v_b=v_b,
            output=self._linear(attn + "o_proj"),
            ffn_norm=self._vector(p + "post_attention_layernorm.weight"),
            feed=feed,
            router=router,
            experts=experts,
            indexer=self._indexer(attn + "indexer.") if c.has_indexer(layer) else None,
            mtp=self._entrance(p) if layer >= c.n_layer else None,
        )

    def _compressed(self, layer: int, turns: Turns) -> CompressedLayer:
        c, names = self.config, family.sources(self.config)[layer]

        def linear(role: str) -> Linear:
            weight = self._matrix(names[role][0])
            return lambda x: x @ weight.T

        def grouped(role: str, n: int) -> Linear:
            return by_groups(self._matrix(names[role][0]), n)

        def vector(role: str) -> torch.Tensor:
            return self._vector(names[role][0])

        table = "ffn_gate_tid2eid"
        if table in names:
            ids = self.checkpoint.read_ids(names[table][0], 0, c.n_vocab, c.n_expert)
            router = Router(vector("ffn_gate_inp"), None, ids.to(self.device))
        else:
            router = Router(vector("ffn_gate_inp"), vector("exp_probs_b"))
        experts = StreamedExperts(lambda e: self.expert(layer, e), c.n_expert, turns, c.limit)
        return built(c, layer, Parts(linear, grouped, vector, self.dtype), router, experts)

    def expert(self, layer: int, expert: int) -> Projections:
        """The three matrices of a routed expert."""
        names = family.sources(self.config)[layer]
        gate, up, down = (self._matrix(names[role][expert]) for role in ROUTED_ROLES)
        return gate, up, down

    def head(self) -> tuple[torch.Tensor, Linear]:
        """Output norm and output matrix."""
        weight = self.head_rows(0, self.config.n_vocab)
        return self.output_norm(), lambda x: x @ weight.T

    def output_norm(self) -> torch.Tensor:
        """float32 [d]."""
        return self._vector(self._outside("output_norm"))

    def merge(self, hidden: torch.Tensor) -> torch.Tensor:
        """As `stream.Source`."""
        if self.config.streams is None:
            return hidden
        parts = (self._vector(self._outside(f"output_hc_{part}")) for part in ("fn", "base", "scale"))
        return merged(hidden, Mixing(*parts), self.config)

    def head_rows(self, start: int, stop: int) -> torch.Tensor:
        """Rows of the output matrix, [stop - start, d] in the compute dtype."""
        name = self._outside("token_embd" if self.config.tied else "output")
        return self.checkpoint.read(name, start, stop, device=self.device, dtype=self.dtype)

    def layer_bytes(self) -> list[int]:
        """Of the checkpoint, by layer."""
        tensors = ((name, entry.n_bytes) for name, entry in self.checkpoint.stored.items())
        return bytes_by_layer(tensors, self.config.n_block)

    def _outside(self, role: str) -> str:
        """The name of a tensor outside of the layers."""
        return family.sources(self.config)[None][role][0]

    def _matrix(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, device=self.device, dtype=self.dtype)

    def _vector(self, name: str) -> torch.Tensor:
        return self.checkpoint.read(name, device=self.device, dtype=torch.float32)

    def _linear(self, name: str) -> Linear:
        weight = self._matrix(name + ".weight")
        return lambda x: x @ weight.T

    def _query(self, attn: str) -> tuple[Linear, torch.Tensor, Linear] | Linear:
        if self.config.q_lora is None:
            return self._linear(attn + "q_proj")
        norm = self._vector(attn + "q_a_layernorm.weight")
        return self._linear(attn + "q_a_proj"), norm, self._linear(attn + "q_b_proj")

    def _indexer(self, prefix: str) -> IndexerWeights:
        proj, norm, bias = (
            self._vector(prefix + name) for name in ("weights_proj.weight", "k_norm.weight", "k_norm.bias")
        )
        how = self.config.indexer
        assert how
        q_b, k = self._linear(prefix + "wq_b"), self._linear(prefix + "wk")
        return IndexerWeights(q_b, k, proj, norm, bias, how.top_k, self.config.qk_rope, how.interleaved)

    def _entrance(self, prefix: str) -> Entrance:
        enorm, hnorm, norm = (self._vector(f"{prefix}{name}.weight") for name in ("enorm", "hnorm", "shared_head.norm"))
        return Entrance(enorm, hnorm, self._linear(prefix + "eh_proj"), norm)

    def _feed(self, prefix: str) -> Feed:
        return Feed(*(self._linear(prefix + part) for part in ("gate_proj", "up_proj", "down_proj")))
