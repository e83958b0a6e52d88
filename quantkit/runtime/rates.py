"""How fast a pass over the layers goes, for what is said before it begins."""

from quantkit.models import family
from quantkit.models.config import ModelConfig

DISK_RATE = 2.5e9  # bytes a second
GPU_RATE, CPU_RATE = 1.1e14, 1e12  # operations a second of a forward pass (H100: docs/results/calibration.md)


def active_weights(config: ModelConfig) -> float:
    """Weights that a token is multiplied with."""
    parts = ((spec, spec.n_rows * spec.n_in) for spec in family.specs(config) if spec.role != "token_embd")
    return sum(n * config.n_used / config.n_expert if spec.is_routed else n for spec, n in parts)
