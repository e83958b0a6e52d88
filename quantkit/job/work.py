"""How long the parts of a job take, by arithmetic from rates that were measured on single machines
(docs/results/encoders.md, docs/results/calibration.md): right within a factor of two or three, and said as `about`."""

from dataclasses import dataclass
from datetime import timedelta

from quantkit.models.config import ModelConfig
from quantkit.runtime.rates import DISK_RATE, GPU_RATE, active_weights

CORE_RATE = 4e10  # operations a second of one core in products of float32
ON_CPU = {"fast": 9e6, "normal": 2.5e6, "best": 1e6}  # weights a second and core, quantkit's encoders
ON_GPU = {"fast": 1.5e9, "normal": 0.62e9, "best": 73e6}
"""Weights a second of one H100 or H200, the whole pass. best: gate and up alone have 75 million."""
GGML = 4e6  # weights a second and core
SMALL_WEIGHTS = 200_000_000  # what our encoders do on a CPU in minutes


@dataclass(frozen=True)
class Work:
    """What decides how long a job takes. tokens: of calibration, 0 if there is none; judged: of the evaluation."""

    config: ModelConfig
    n_weights: int
    tokens: int
    judged: int
    on_gpu: bool
    threads: int

    def seconds_to_encode(self, encoder: str, effort: str) -> float:
        """ggml encodes on the CPU always."""
        if encoder == "ggml":
            return self.n_weights / (GGML * self.threads)
        if self.on_gpu:
            return self.n_weights / ON_GPU[effort]
        factors = 0.0
        if effort != "fast":  # second moments of an expert's tokens, and their factor
            c = self.config
            each = sum(n**3 + 2 * n * n * self.tokens * c.n_used / max(1, c.n_expert) for n in (c.d, c.n_ff_exp))
            factors = c.n_moe * c.n_expert * each / (CORE_RATE * self.threads)
        return self.n_weights / (ON_CPU[effort] * self.threads) + factors

    def seconds_to_compute(self, n_tokens: int) -> float:
        """So many tokens through the model once."""
        rate = GPU_RATE if self.on_gpu else CORE_RATE * self.threads
        return 2 * n_tokens * active_weights(self.config) / rate

    def seconds_to_sum(self, weights: int) -> float:
        """Second moments of the tokens, of so many entries in all."""
        return 2 * self.tokens * weights / (GPU_RATE if self.on_gpu else CORE_RATE * self.threads)

    def seconds(self, encoder: str, effort: str, n_bytes: int) -> float:
        """The whole job; n_bytes: read of the checkpoint in one pass."""
        read = n_bytes / DISK_RATE
        first = max(read, self.seconds_to_compute(self.tokens)) + self.seconds_to_encode(encoder, effort)
        return first + (max(read, 2 * self.seconds_to_compute(self.judged)) if self.judged else 0)


def rounded(seconds: float) -> str:
    """`40 seconds`, `12 minutes`, `3.5 hours`, `4 days`."""
    if seconds < 1.5:
        return "1 second"
    if seconds < 90:
        return f"{round(seconds)} seconds"
    if seconds < 5400:
        return f"{seconds / 60:.0f} minutes"
    hours = timedelta(seconds=seconds) / timedelta(hours=1)
    return f"{hours:.1f} hours" if hours < 48 else f"{hours / 24:.0f} days"
