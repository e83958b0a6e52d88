"""KTransformers' own kernels compute every MoE layer of the files that are made for it.

    pip install --no-deps kt-kernel==0.7.2
    pytest -m large tests/evaluation/oracles/test_kt.py -s

KT_KERNEL_CPU_VARIANT chooses a variant of the wheel (amx, avx512_bf16, ..., avx2); by default the best that runs.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from quantkit.evaluation.oracles import kt
from quantkit.runtime.layers import Experts, LayerExperts, unwatched
from quantkit.runtime.sources.gguf import GGUFSource, open_source
from quantkit.runtime.stream import stream

pytestmark = [
    pytest.mark.large,
    pytest.mark.skipif(not kt.available(), reason=f"needs pip install --no-deps {kt.WHEEL}"),
]

MAX_ERROR = 0.03


@dataclass
class Visit:
    """What the routed experts of a layer were given, and what they gave, with dequantized weights."""

    x: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    out: torch.Tensor


@torch.inference_mode()
def visits(source: GGUFSource, tokens: torch.Tensor) -> dict[int, Visit]:
    """Real inputs of every MoE layer, rounded to BF16 as kt-kernel takes them, and what the experts answer."""
    found: dict[int, Visit] = {}

    def recording(layer: int, inner: LayerExperts) -> Experts:
        def recorded(x: torch.Tensor, expert: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            x = x.bfloat16().float()
            out = inner(x, expert, weight)
            found[layer] = Visit(x, expert, weight, out.clone())  # the shared expert is added to `out` itself
            return out

        return recorded

    for step in stream(source, tokens):
        if step.weights.experts is not None:
            step.weights = replace(step.weights, experts=unwatched(recording(step.layer, step.weights.experts)))
        step.compute()
    return found


@pytest.mark.parametrize("recipe", ["1.58bit", "1.73bit", "2.22bit", "2.51bit"])
def test_moe_layers(recipe: str, quantized: Callable[..., Path], chunks):
    path = quantized(recipe, "ktransformers")
    source = open_source(path)
    variant = None
    for layer, visit in visits(source, chunks(1, 256)).items():
        inputs = (path, layer, source.config, visit.x, visit.expert, visit.weight)
        variant = variant or kt.runnable(*inputs)
        found = kt.experts(*inputs, variant)
        error = float((found - visit.out).norm() / visit.out.norm())
        worst = float(((found - visit.out).norm(dim=1) / visit.out.norm(dim=1)).max())
        types = "/".join(
            source.file.tensors[f"blk.{layer}.ffn_{part}_exps.weight"].qtype for part in ("gate", "up", "down")
        )
        print(f"{recipe} layer {layer} {types} {variant}: relative error {error:.4f}, worst token {worst:.4f}")
        assert error < MAX_ERROR, (recipe, layer, types, variant, error)
