"""Speeds of R1 and V3 that others have published, to lay beside what is expected here; quantkit measured none."""

from dataclasses import dataclass
from textwrap import wrap

from quantkit.models.config import ModelConfig

GEOMETRY = (61, 7168, 256)  # layers, hidden size, routed experts of R1 and V3
WIDTH = 80


@dataclass(frozen=True)
class Speed:
    """decode, prompt: tokens a second of one sequence, as published; None: not said."""

    program: str
    file: str
    machine: str
    decode: str
    prompt: str | None
    source: str


TUTORIAL = "KTransformers' DeepSeek-R1/V3 tutorial, February 2025"
GUIDE = "Unsloth's guide to DeepSeek-V3-0324, 2025"
SPEEDS = (
    Speed("KTransformers 0.2.1", "Q4_K_M", "2 × Xeon 6454S (64 cores), 4090", "13.5", "88", TUTORIAL),
    Speed("KTransformers 0.2", "Q4_K_M", "1 × Xeon 6454S (32 cores), 4090D", "8.7", "54", TUTORIAL),
    Speed("llama.cpp", "Q4_K_M", "2 × Xeon 6454S (64 cores), 4090D", "4.5", "10.3", TUTORIAL),
    Speed("llama.cpp", "1.78 bit", "2 × H100 80 GB, all on them", "14", None, GUIDE),
    Speed("llama.cpp", "1.78 bit", "one 24 GB GPU like a 4090", "1 to 3", None, GUIDE),
)
"""Prompts of 1,000 tokens (0.2.1) and 500."""


def speeds(c: ModelConfig) -> tuple[Speed, ...]:
    """Those of models of this size; none of others."""
    return SPEEDS if (c.n_layer, c.d, c.n_expert) == GEOMETRY and c.compression is None else ()


def lines(c: ModelConfig) -> list[str]:
    """For people, no wider than WIDTH."""
    found = speeds(c)
    if not found:
        return []
    out = ["", "Published by others, of R1 or V3, tok/s (decode, prompt):"]
    sources = list(dict.fromkeys(speed.source for speed in found))
    for speed in found:
        mark, head = sources.index(speed.source) + 1, f"{speed.program}, {speed.file}"
        out.append(f"{speed.decode:>6} {speed.prompt or '–':>5}  {head:<28} {speed.machine} [{mark}]")
    notes = "; ".join(f"[{i}] {source}" for i, source in enumerate(sources, 1))
    return [part for line in out for part in wrap(line, WIDTH, subsequent_indent=" " * 14) or [""]] + wrap(notes, WIDTH)
