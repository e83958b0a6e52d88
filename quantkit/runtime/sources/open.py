"""Opening a GGUF: to be run by an engine, or as a source of layers."""

from pathlib import Path

import torch

from quantkit.errors import QuantkitError
from quantkit.formats.gguf_reader import GGUFFile
from quantkit.models.config import DeepseekConfig
from quantkit.models.deepseek2 import specs
from quantkit.progress import say
from quantkit.runtime.experts.streamed import expert_names
from quantkit.runtime.residency import Residency
from quantkit.runtime.sources.gguf import Dequantized, GGUFSource
from quantkit.runtime.sources.weights import GGUFWeights
from quantkit.runtime.workers import Workers


def open_gguf(
    path: Path | str, device: torch.device | str = "cpu", n_threads: int | None = None, ram: int | None = None
) -> GGUFWeights:
    """A file to be run on a device. ram: bytes that it may take in memory; None: as many as the system gives.

    QuantkitError if a tensor is missing or has another shape than the file's metadata say, or if `ram` is too little.
    """
    file = GGUFFile.open(path)
    config, device = DeepseekConfig.from_gguf(file.metadata), torch.device(device)
    check_tensors(file, config)
    residency = None
    if ram is not None:
        names = {layer: expert_names(layer) for layer in range(config.n_layer) if config.is_moe(layer)}
        residency = Residency(file, names, config.n_used, ram, on_gpu=device.type != "cpu")
        if device.type == "cpu":  # with a GPU the cost depends on what it holds
            say(str(residency))
    return GGUFWeights(file, config, device, Workers(n_threads), residency)


def open_source(path: Path | str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> GGUFSource:
    """A file whose layers are dequantized, one at a time, to `dtype`: default float32 on the CPU, else bfloat16."""
    weights = open_gguf(path, device)
    dtype = dtype or (torch.float32 if weights.device.type == "cpu" else torch.bfloat16)
    return GGUFSource(weights, Dequantized(weights, weights.device, dtype))


def check_tensors(file: GGUFFile, config: DeepseekConfig) -> None:
    """QuantkitError naming the first tensor of the model that the file lacks or has in another shape."""
    tied = "output.weight" not in file.tensors
    for spec in specs(config, "combined" if "blk.0.attn_kv_b.weight" in file.tensors else "split"):
        found = file.tensors.get(spec.name)
        if found is None and not (tied and spec.name == "output.weight"):
            raise QuantkitError(f"{file.path.name}: tensor {spec.name} is missing")
        if found is not None and tuple(found.shape) != spec.shape:
            shape = tuple(found.shape)
            raise QuantkitError(f"{file.path.name}: tensor {spec.name} has shape {shape}, not {spec.shape}")
