"""A file's layers on a GPU: all but routed experts, which stay on the CPU for the time being; and what calibration left
beside the file about those."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from quantkit.codecs import registry
from quantkit.errors import QuantkitError
from quantkit.formats.gguf_folder import IMATRIX
from quantkit.formats.imatrix import expert_counts
from quantkit.models.config import ModelConfig
from quantkit.runtime.engines.gpu_layers import GpuLayer
from quantkit.runtime.engines.staging import upload
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.layers import Router
from quantkit.runtime.mla import split_kv_b
from quantkit.runtime.packed import Matrix, Packed, Plain
from quantkit.runtime.sources.gguf import GGUFWeights

if TYPE_CHECKING:
    from quantkit.runtime.engines.gpu_layers import Query

log = logging.getLogger(__name__)


class Loading:
    """dtype: of what is dequantized."""

    def __init__(self, weights: GGUFWeights, dtype: torch.dtype):
        self.weights, self.config, self.device, self.dtype = weights, weights.config, weights.device, dtype

    def layers(self) -> list[GpuLayer]:
        """All of them."""
        layers = []
        for i in range(self.config.n_layer):
            layers.append(self._layer(i))
            if self.weights.residency:  # what was read of the file is on the GPU now
                self.weights.file.let_go()
        return layers

    def vector(self, name: str) -> torch.Tensor:
        """A small tensor, float32."""
        return self.weights.dense(name).to(self.device)

    def matrix(self, name: str) -> Matrix:
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
            return self.matrix(p + "attn_k_b.weight"), self.matrix(p + "attn_v_b.weight")
        k_b, v_b = split_kv_b(self.weights.dense(p + "attn_kv_b.weight").to(self.device, self.dtype), self.config)
        return Plain(k_b), Plain(v_b)

    def _query(self, p: str) -> "Query":
        if self.config.q_lora is None:
            return self.matrix(p + "attn_q.weight")
        norm = self.vector(p + "attn_q_a_norm.weight")
        return self.matrix(p + "attn_q_a.weight"), norm, self.matrix(p + "attn_q_b.weight")

    def _layer(self, i: int) -> GpuLayer:
        c, p, matrix, vector = self.config, f"blk.{i}.", self.matrix, self.vector
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
        return GpuLayer(
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


def calibrated(path: Path, c: ModelConfig) -> np.ndarray | None:
    """Of the choices that tokens made in calibration, each expert's share, float64 [n_layer, n_expert]: from the
    imatrix beside the file. None, and a line that says so, without one of this model."""
    beside, shares = path.parent / IMATRIX, np.zeros((c.n_layer, c.n_expert))
    try:
        if not beside.exists():
            raise QuantkitError(f"no {IMATRIX} beside {path.name}")
        counts = expert_counts(beside)
        for layer in range(c.n_layer):
            if c.is_moe(layer):
                found = counts.get(expert_names(layer)[0], np.zeros(0))
                if len(found) != c.n_expert or not found.any():
                    raise QuantkitError(
                        f"{beside}: no counts of {c.n_expert} experts in layer {layer}: another model's"
                    )
                shares[layer] = found / found.sum()
    except QuantkitError as error:
        log.warning(
            "%s: the first experts of each layer are in GPU memory until it is seen which are chosen most", error
        )
        return None
    return shares
