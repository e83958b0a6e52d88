"""The runtime's blocks over weights that a script can replace, for the encoder harness only.

Weights lie in a flat dict under GGUF names ("blk.1.ffn_gate_exps": float32 [experts, out, in]), so that a variant is
made by replacing entries. Everything is float32 and differentiable; chunks of tokens are independent.
"""

from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from quantkit.formats.checkpoint import Checkpoint
from quantkit.models import family
from quantkit.models.config import ModelConfig
from quantkit.runtime.experts.streamed import StreamedExperts
from quantkit.runtime.layers import Feed, LayerWeights, Linear, Router, attention, feed_forward, rms_norm, token_weight
from quantkit.runtime.rope import angles
from quantkit.runtime.rotation import Angles
from quantkit.runtime.watch import ExpertVisit, Watcher
from quantkit.tensors import ROUTED_ROLES

See = Callable[[str, object], None]
"""Called with a matrix and its inputs [n, n_in], or with "blk.N.exps" and the ExpertVisit of one expert."""

# Inputs that the runtime shows, by the matrix that the harness files them under. v_b is given the latent states that
# its heads share; up sees what gate sees.
SEEN = {"attn_kv_b": "attn_v_b"} | {
    role: role
    for role in (
        "attn_q_a",
        "attn_q_b",
        "attn_kv_a_mqa",
        "attn_output",
        "ffn_gate",
        "ffn_down",
        "ffn_gate_shexp",
        "ffn_down_shexp",
    )
}


def load(folder: Path) -> tuple[ModelConfig, dict[str, torch.Tensor]]:
    """Config and all weights, dequantized from FP8. k_b is [heads, rows, kv_lora], as kv_b_proj has it."""
    checkpoint = Checkpoint.open(folder)
    config, w = family.from_hf(checkpoint.config), {}
    for spec in family.specs(config):
        rows = [family.read(checkpoint, config, spec, *bounds) for bounds in family.slices(spec)]
        value = torch.cat(rows).view(spec.shape)
        w[spec.name.rpartition(".")[0]] = value.transpose(1, 2).contiguous() if spec.role == "attn_k_b" else value
    return config, w


def weights_of(config: ModelConfig, w: dict[str, torch.Tensor], i: int) -> LayerWeights:
    """Layer i, with what the dict holds of it now."""
    of, moe = {name.removeprefix(f"blk.{i}."): t for name, t in w.items()}, config.is_moe(i)

    def linear(name: str) -> Linear:
        return lambda x: x @ of[name].T

    return LayerWeights(
        attn_norm=of["attn_norm"],
        q=(linear("attn_q_a"), of["attn_q_a_norm"], linear("attn_q_b")),
        kv_a=linear("attn_kv_a_mqa"),
        kv_a_norm=of["attn_kv_a_norm"],
        k_b=of["attn_k_b"].transpose(1, 2),
        v_b=of["attn_v_b"],
        output=linear("attn_output"),
        ffn_norm=of["ffn_norm"],
        feed=Feed(*(linear(f"ffn_{part}{'_shexp' if moe else ''}") for part in ("gate", "up", "down"))),
        router=Router(of["ffn_gate_inp"], of["exp_probs_b"]) if moe else None,
        experts=StreamedExperts(lambda e: tuple(of[role][e] for role in ROUTED_ROLES), config.n_expert)
        if moe
        else None,
    )


class Telling(Watcher):
    """The runtime's watcher that tells `see` of the inputs in layer i."""

    def __init__(self, i: int, see: See):
        self.i, self.see = i, see

    def observe(self, role: str, x: torch.Tensor, weight: torch.Tensor) -> None:
        """Of the roles that are encoded."""
        if role in SEEN:
            self.see(f"blk.{self.i}.{SEEN[role]}", x)

    def observe_expert(self, visit: ExpertVisit) -> None:
        """Of each expert the whole visit."""
        self.see(f"blk.{self.i}.exps", visit)


def positions(n: int, config: ModelConfig, device: torch.device) -> Angles:
    """cos and sin of the first n positions."""
    return angles(config, torch.arange(n, device=device))


def layer(config, w, i: int, x: torch.Tensor, tables, see: See | None = None) -> torch.Tensor:
    """One block on [chunks, tokens, d]; tables: cos and sin."""
    b, watcher = weights_of(config, w, i), Telling(i, see) if see else None
    x = x + attention(x, b, config, tables, watcher=watcher)
    h = rms_norm(x, b.ffn_norm, config.rms_eps).flatten(0, 1)
    return x + feed_forward(h, b, config, None, watcher, token_weight(x) if see else None).view_as(x)


def swiglu(x, gate, up):
    return F.silu(x @ gate.T) * (x @ up.T)


def final(config, w, ids: torch.Tensor) -> torch.Tensor:
    """ids int64 [chunks, tokens] -> what the output matrix multiplies, [chunks, tokens, d]."""
    tables, x = positions(ids.shape[1], config, ids.device), w["token_embd"][ids]
    for i in range(config.n_layer):
        x = layer(config, w, i, x, tables)
    return rms_norm(x, w["output_norm"], config.rms_eps)


def logits(config, w, ids: torch.Tensor) -> torch.Tensor:
    """float32 [chunks, tokens/2 - 1, vocab], of the scored second half of each chunk."""
    return final(config, w, ids)[:, ids.shape[1] // 2 : -1] @ w["output"].T
