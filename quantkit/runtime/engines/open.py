"""The engine for a file on a device."""

from functools import partial

from quantkit.errors import QuantkitError
from quantkit.progress import say
from quantkit.runtime.engines.by_layers import ByLayers
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_memory import GpuLayers
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.engines.streams import StreamsEngine
from quantkit.runtime.engines.torch import TorchEngine
from quantkit.runtime.generate import Engine, Opener
from quantkit.runtime.sources.gguf import GGUFSource, GGUFWeights
from quantkit.runtime.sources.quantized import Quantized
from quantkit.runtime.sources.tiled import Tiled, product_dtype


def open_engine(weights: GGUFWeights, n_slots: int, capacity: int, gpu_layers: GpuLayers = "auto") -> Engine:
    """An engine for n_slots sequences of at most `capacity` tokens (bounded by what the model was made for): on the CPU
    one ggml graph; on a GPU CUDA graphs and, for experts that are not there, the CPU.

    Contexts in which an indexer chooses what is attended to are torch's, and DeepSeek-V4: the graph and the GPU attend
    to everything.

    QuantkitError if layers are wanted on a GPU that is not used, or do not fit there, or if it cannot compute contexts
    of that length.
    """
    # What a family has no graph or no GPU engine for is refused in this file, and nowhere else.
    if capacity > (most := weights.config.n_context):
        say(f"a context of {capacity:,} tokens: {weights.name} was made for {most:,}, which it gets")
        capacity = most
    indexer = weights.config.indexer
    sparse = indexer is not None and capacity > indexer.top_k
    _check_device(weights)
    if indexer is not None and sparse and weights.device.type == "cuda":
        raise QuantkitError(
            f"a context of {capacity:,} tokens needs sparse attention beyond {indexer.top_k:,}, which is computed "
            f"on the CPU only: give --context {indexer.top_k} or --device cpu"
        )
    if weights.device.type == "cuda":
        return GpuEngine(weights, n_slots, capacity, gpu_layers)
    if gpu_layers not in ("auto", 0):
        asked = f"{gpu_layers:.0%}" if isinstance(gpu_layers, float) else gpu_layers
        raise QuantkitError(f"--gpu-layers {asked}: needs a GPU and --device cuda")
    if weights.config.compression is not None:
        say(f"{weights.config.architecture} is computed layer by layer in torch, slower than by llama.cpp")
        return StreamsEngine(GGUFSource(weights, Quantized(weights)), n_slots, capacity)
    if indexer is not None and sparse:
        say(
            f"contexts beyond {indexer.top_k:,} tokens need sparse attention: computed layer by layer in torch, slower "
            f"than the graph that --context {indexer.top_k} takes"
        )
        return TorchEngine(GGUFSource(weights, Quantized(weights)), n_slots, capacity)
    types = (tensor.qtype for tensor in weights.file.tensors.values())
    tiled = GGUFSource(weights, Tiled(weights, product_dtype(types)))
    by_layers = ByLayers(tiled, GGUFSource(weights, Quantized(weights)))
    return GraphEngine(weights, n_slots, capacity, by_layers)


def opener(weights: GGUFWeights) -> Opener:
    """`open_engine` of one sequence, for the end of a long job; what it would refuse at any length is refused now."""
    _check_device(weights)
    return partial(open_engine, weights, 1)


def _check_device(weights: GGUFWeights) -> None:
    if weights.config.compression is not None and weights.device.type == "cuda":
        raise QuantkitError(
            f"{weights.name}: {weights.config.architecture} is computed on the CPU only here: give --device cpu "
            "(llama.cpp runs the file on a GPU)"
        )
