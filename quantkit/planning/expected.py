"""How fast a machine should be, not only could be: arithmetic and hand-overs beside the reading of weights.

A matrix takes as long as its bytes or its weights do, whichever is longer: a core multiplies so many packed weights a
second, by type, and so does a GPU. A layer costs a GPU the launches of what is small, and a layer whose experts the
CPU computes the way there and back. What is measured with R1's geometry on one machine (docs/results/allocation.md) is
reproduced within 1.2 times, prompts and KTransformers' types within 1.5 (tests/planning/test_expected.py); other
machines follow by their own rates.
"""

from collections.abc import Iterator
from typing import NamedTuple

from quantkit.models.config import ModelConfig
from quantkit.planning.hardware import Machine, Placement, loaded, speed
from quantkit.planning.plan import Plan, PlannedTensor

LAYER, CPU_LAYER = 60e-6, 20e-6  # seconds a layer beside its products, on a GPU; on the CPU
HAND_OVER = 200e-6  # seconds to have experts of a layer computed by the CPU, beside their own time
PROMPT = 1024  # tokens that a prompt's speed is said for
DENSE_BYTES = 4  # a weight is written and read as bfloat16 in a prompt
DENSE_SHARE = 0.25  # of a GPU's products of bfloat16
STAGED = 1 / 6  # of the RAM's bandwidth reach the GPU: copied to pinned memory (read, and written twice), then read
MOVED = 300e-6  # seconds to have an expert moved so, beside its bytes
TILED, MOST_TILED = 0.42, 64  # of the rate of one token, for so many tokens of an expert: decoded once, not written


class Expected(NamedTuple):
    """Tokens a second: of decoding one sequence, of the prompt of PROMPT tokens."""

    decode: float
    prompt: float


def expected(plan: Plan, config: ModelConfig, machine: Machine, placed: Placement) -> Expected | None:
    """None if a bandwidth is not known."""
    read = speed(plan, config, machine, placed)
    if read.tokens_per_second is None:
        return None
    decode = sum(_decoding(plan, config, machine, placed)) + read.disk / (machine.disk_bandwidth or 1)
    return Expected(1 / decode, PROMPT / sum(_prompt(plan, config, machine, placed)))


def _decoding(plan: Plan, config: ModelConfig, machine: Machine, placed: Placement) -> Iterator[float]:
    """Seconds of a token, part by part."""
    share, how = config.n_used / config.n_expert, machine.arithmetic
    for tensor, on_gpu, used in _used(plan, config, machine, placed, share):
        rate = how.on_gpu(tensor.qtype) if on_gpu else how.on_cpu(tensor.qtype)
        bandwidth = (machine.gpu_bandwidth if on_gpu else machine.ram_bandwidth) or 1
        yield used * max(tensor.n_bytes / bandwidth, tensor.n_weights / rate)
    yield placed.kv_cache / ((machine.gpu_bandwidth if machine.vram else machine.ram_bandwidth) or 1)
    yield config.n_layer * (LAYER if machine.vram else CPU_LAYER)
    yield HAND_OVER * len(placed.cpu_layers) if machine.vram else 0


def _prompt(plan: Plan, config: ModelConfig, machine: Machine, placed: Placement) -> Iterator[float]:
    """Seconds of PROMPT tokens, part by part: with a GPU all matrices are multiplied there, experts that lie elsewhere
    after they were moved. Those of few tokens are decoded on the way, all else is dequantized first."""
    share, how = config.n_used / config.n_expert, machine.arithmetic
    yield placed.disk / (machine.disk_bandwidth or 1)
    if not machine.vram:
        weights = sum(tensor.n_weights * used for tensor, _, used in _used(plan, config, machine, placed, share))
        yield PROMPT * weights / (how.matrix * how.on_cpu("IQ1_S"))
        return
    bandwidth, tiled = machine.gpu_bandwidth or 1, PROMPT * share <= MOST_TILED
    for tensor, _, used in _used(plan, config, machine, placed, share):
        if tensor.is_routed and tiled:
            yield tensor.n_weights / (TILED * how.on_gpu(tensor.qtype))
            continue
        yield (tensor.n_bytes + DENSE_BYTES * tensor.n_weights) / bandwidth
        yield tensor.n_weights / how.on_gpu(tensor.qtype)
        yield 2 * PROMPT * tensor.n_weights * used / (DENSE_SHARE * how.products)
    yield placed.cpu_experts / min(how.bus, STAGED * (machine.ram_bandwidth or 1))
    yield MOVED * len(placed.cpu_layers) * config.n_expert


def _used(
    plan: Plan, config: ModelConfig, machine: Machine, placed: Placement, share: float
) -> Iterator[tuple[PlannedTensor, bool, float]]:
    """Matrices, whether the GPU multiplies by them, and which part of each a token needs."""
    for tensor in loaded(plan):
        if tensor.is_routed:
            yield tensor, tensor.layer in placed.gpu_layers, share
        elif tensor.role != "token_embd" or config.tied:
            yield tensor, bool(machine.vram), 1.0
