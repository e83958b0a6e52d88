"""How many packed weights a second processors multiply, by type: measured where there was a machine, else assumed."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit.planning.presets import IQ1_S_ZEN5

# Weights/s against those of IQ1_S (docs/results/runtime.md). One core of a Zen 5, rows from memory; the last line: by
# ggml, estimated. Xeons, which gather entries: 16 cores of an Emerald Rapids, rows from their L2. Without AVX-512: what
# was compiled for AVX2 on that Zen 5, and k-quants by ggml.
OF_IQ1_S = {
    **{"IQ1_S": 1.0, "IQ1_M": 0.94, "IQ2_XXS": 1.88, "IQ2_XS": 1.46, "IQ2_S": 1.01},
    **{"Q2_K": 2.41, "Q3_K": 1.62, "Q4_K": 1.53, "Q5_K": 1.32, "Q6_K": 1.24},
    **{"IQ3_XXS": 0.7, "IQ3_S": 0.7, "IQ4_XS": 1.2, "IQ4_NL": 1.2, "Q8_0": 1.5, "F16": 0.9, "BF16": 0.9, "F32": 0.5},
}
ON_XEON = OF_IQ1_S | {
    **{"IQ1_M": 1.02, "IQ2_XXS": 1.08, "IQ2_XS": 0.71, "IQ2_S": 0.9},
    **{"Q2_K": 1.76, "Q3_K": 1.13, "Q4_K": 1.37, "Q5_K": 1.02, "Q6_K": 1.4},
}
BY_AVX2 = OF_IQ1_S | {
    **{"IQ1_M": 0.84, "IQ2_XXS": 0.73, "IQ2_XS": 0.8, "IQ2_S": 0.9},
    **{"Q2_K": 1.77, "Q3_K": 1.02, "Q4_K": 1.43, "Q5_K": 1.04, "Q6_K": 1.14},
}
SHARES = {"registers": OF_IQ1_S, "gathers": ON_XEON, "avx2": BY_AVX2}  # by `presets.Cpu.lookups`
# An H200's weights/s by the kernels of runtime/kernels.py, one token: the largest matrices of R1 that docs/results/
# runtime.md ("Where a decoding step's time goes"; of Q2_K and Q3_K "Some tokens at once") has of each type, over the
# seconds they take. Others: the least of them.
GPU_RATES = {
    "IQ1_S": 8 * 2 * 2048 * 7168 / 50.3e-6,  # 8 experts' gate and up
    "IQ2_XXS": 8 * 7168 * 2048 / 39.3e-6,  # their down
    "Q2_K": 32768 * 7168 / 45e-6,
    "Q3_K": 57344 * 2048 / 31e-6,
    "Q4_K": 7168 * 16384 / 25.4e-6,  # attention's output
    "Q5_K": 2 * 2048 * 7168 / 11.0e-6,  # shared gate and up
    "Q6_K": 129280 * 7168 / 222.3e-6,  # logits
}
GPU_PACE = 132 * 1.98  # multiprocessors × GHz of an H200
ASSUMED_CORES, ASSUMED_CORE = 16, IQ1_S_ZEN5 / 2  # half of a fast core's IQ1_S weights/s
AMX = 8.0  # `Arithmetic.matrix` of CPUs that have it
TOGETHER = 0.85  # of the rates of cores alone, all of them at once


@dataclass(frozen=True)
class Arithmetic:
    """cpu: packed weights/s of all threads by type, nothing: assumed. matrix: as `presets.Cpu`. pace, products, bus: as
    `presets.Gpu`."""

    cpu: Mapping[str, float] = field(default_factory=dict)
    matrix: float = 4.0
    pace: float = GPU_PACE / 2
    products: float = 165e12
    bus: float = 25e9

    def on_cpu(self, qtype: str) -> float:
        """Weights/s of all threads: as measured, else by what another type gave."""
        if qtype in self.cpu:
            return self.cpu[qtype]
        rates = self.cpu or cores(ASSUMED_CORES, ASSUMED_CORE)
        known = next(iter(rates))
        return rates.get(qtype, rates[known] * _relative(qtype) / _relative(known))

    def on_gpu(self, qtype: str) -> float:
        """Weights/s of the GPU."""
        return GPU_RATES.get(qtype, min(GPU_RATES.values())) * self.pace / GPU_PACE


def cpu_line(arithmetic: Arithmetic) -> str:
    """The CPU's arithmetic in words."""
    return f"{arithmetic.on_cpu('IQ1_S') / 1e9:.0f} G weights/s of IQ1_S, {arithmetic.on_cpu('Q4_K') / 1e9:.0f} of Q4_K"


def cores(n: int, core: float, shares: Mapping[str, float] = OF_IQ1_S) -> dict[str, float]:
    """Weights/s by type of n cores, each of which gives so many of IQ1_S alone, and of others such shares of that."""
    return {qtype: TOGETHER * n * core * share for qtype, share in shares.items()}


def _relative(qtype: str) -> float:
    """To IQ1_S."""
    return OF_IQ1_S.get(qtype, 0.7)
