"""The engine for a file on a device."""

from quantkit.errors import QuantkitError
from quantkit.runtime.engines.by_layers import ByLayers
from quantkit.runtime.engines.gpu import GpuEngine
from quantkit.runtime.engines.gpu_memory import GpuLayers
from quantkit.runtime.engines.graph import GraphEngine
from quantkit.runtime.generate import Engine
from quantkit.runtime.sources.gguf import GGUFSource, GGUFWeights
from quantkit.runtime.sources.quantized import Quantized
from quantkit.runtime.sources.tiled import Tiled, product_dtype


def open_engine(weights: GGUFWeights, n_slots: int, capacity: int, gpu_layers: GpuLayers = "auto") -> Engine:
    """An engine for n_slots sequences of at most `capacity` tokens (bounded by what the model was made for): on the CPU
    one ggml graph; on a GPU CUDA graphs and, for experts that are not there, the CPU.

    QuantkitError if layers are wanted on a GPU that is not used, or do not fit there.
    """
    # A family that has no graph or no GPU engine is refused here, and nowhere else. The only one so far has both.
    capacity = min(capacity, weights.config.n_context)
    if weights.device.type == "cuda":
        return GpuEngine(weights, n_slots, capacity, gpu_layers)
    if gpu_layers not in ("auto", 0):
        raise QuantkitError(f"--gpu-layers {gpu_layers}: needs a GPU and --device cuda")
    tiled = GGUFSource(weights, Tiled(weights, product_dtype()))
    by_layers = ByLayers(tiled, GGUFSource(weights, Quantized(weights)))
    return GraphEngine(weights, n_slots, capacity, by_layers)
