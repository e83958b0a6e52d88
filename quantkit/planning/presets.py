"""Machines by name, for who plans for one that is not at hand: what their makers publish, and how fast they multiply
packed weights, measured where noted and else assumed from that."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from quantkit.errors import QuantkitError

Part = TypeVar("Part")

SUSTAINED, SUSTAINED_GPU = 0.8, 0.85  # of a published bandwidth; 4,136 of an H200's 4,800 GB/s were measured
CORE_READS = 142e9 / 16  # bytes/s that each of 16 cores of a xeon-5 read at once (docs/results/runtime.md)
IQ1_S_ZEN5 = 33.2e9  # weights/s of one core (docs/results/runtime.md), by the products of runtime/native


@dataclass(frozen=True)
class Gpu:
    """vram: bytes. bandwidth: bytes/s as published. pace: multiprocessors × GHz. products: bfloat16 operations/s with
    float32 sums, dense, as published. bus: bytes/s over PCIe, one way."""

    vram: int
    bandwidth: float
    pace: float
    products: float
    bus: float


@dataclass(frozen=True)
class Cpu:
    """cores: physical ones of a usual model of that line. bandwidth: bytes/s with all channels, as published. core:
    IQ1_S weights/s of one core. matrix: a long prompt's weights/s against IQ1_S's: by AMX 8 (measured); by AVX-512 with
    bfloat16 4, else 2 (assumed). lookups: how entries of codebooks are looked up, see `arithmetic.SHARES`."""

    cores: int
    bandwidth: float
    core: float
    matrix: float
    lookups: Literal["registers", "gathers", "avx2"] = "registers"

    def reads(self, n: int) -> float:
        """Bytes/s of RAM that n cores reach: their share of what all of the host's do, as who has some of a host's
        cores gets; of a desktop's few channels CORE_READS each."""
        whole = SUSTAINED * self.bandwidth
        return min(whole, n * max(whole / self.cores, CORE_READS))


def _gpu(gib: int, gb_s: float, units: int, ghz: float, tflops: float, bus_gb_s: float) -> Gpu:
    return Gpu(gib << 30, gb_s * 1e9, units * ghz, tflops * 1e12, bus_gb_s * 1e9)


GPUS = {
    "3090": _gpu(24, 936, 82, 1.70, 71, 25),
    "4090": _gpu(24, 1008, 128, 2.52, 165, 25),
    "5090": _gpu(32, 1792, 170, 2.41, 209, 50),
    "a6000": _gpu(48, 768, 84, 1.80, 155, 25),
    "rtx-6000-ada": _gpu(48, 960, 142, 2.50, 182, 25),
    "rtx-pro-6000": _gpu(96, 1792, 188, 2.60, 252, 50),
    "l40s": _gpu(48, 864, 142, 2.52, 183, 25),
    "a100": _gpu(80, 2039, 108, 1.41, 312, 25),
    "h100": _gpu(80, 3350, 132, 1.98, 989, 50),
    "h200": _gpu(140, 4800, 132, 1.98, 989, 50),  # kernels measured here
    "b200": _gpu(180, 8000, 148, 1.96, 2250, 50),
}

CPUS = {
    "epyc-7003": Cpu(32, 204.8e9, 14e9, 2, "avx2"),
    "epyc-9004": Cpu(32, 460.8e9, 24e9, 4),
    "epyc-9005": Cpu(32, 576.0e9, IQ1_S_ZEN5, 4),
    "xeon-3": Cpu(32, 204.8e9, 15e9, 2),
    "xeon-4": Cpu(32, 307.2e9, 18e9, 8, "gathers"),
    "xeon-5": Cpu(32, 358.4e9, 19e9, 8, "gathers"),  # 16 cores together measured
    "xeon-6": Cpu(64, 614.4e9, 22e9, 8, "gathers"),
    "threadripper-7000": Cpu(32, 332.8e9, 26e9, 4),
    "ryzen-7000": Cpu(16, 83.2e9, 28e9, 4),
    "ryzen-9000": Cpu(16, 89.6e9, IQ1_S_ZEN5, 4),
    "core-14": Cpu(8, 89.6e9, 18e9, 2, "avx2"),  # its fast cores
}


def gpu(name: str) -> Gpu:
    """By its name, however it is written (`RTX 4090`). QuantkitError, with all names, if it is not known."""
    return _found("--gpu", name, GPUS, ("rtx-", "nvidia-", "geforce-"))


def cpu(name: str) -> Cpu:
    """As `gpu`."""
    return _found("--cpu", name, CPUS, ("amd-", "intel-"))


def like(name: str) -> Gpu | None:
    """What is known of a GPU by what its driver calls it, `NVIDIA GeForce RTX 4090`."""
    words = set(name.lower().replace("-", " ").split())
    fit = [known for known in GPUS if set(known.split("-")) <= words]
    return GPUS[max(fit, key=len)] if fit else None


def _found(option: str, name: str, known: Mapping[str, Part], before: tuple[str, ...]) -> Part:
    short = name.strip().lower().replace(" ", "-").replace("_", "-")
    while short not in known:
        rest = next((short.removeprefix(word) for word in before if short.startswith(word)), None)
        if rest is None:
            raise QuantkitError(f"{option} {name}: not known; choose {', '.join(known)}, or give --bandwidth")
        short = rest
    return known[short]
