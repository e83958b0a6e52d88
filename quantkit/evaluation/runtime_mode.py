"""A file as a person runs it, against the same file streamed layer by layer and against the original."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from quantkit.calibration.corpus import Chunks
from quantkit.evaluation.divergence import (
    Divergence,
    HeadLogits,
    HeldLogits,
    Logits,
    Score,
    diverge,
    first_scored,
    scored_targets,
)
from quantkit.progress import track
from quantkit.runtime.generate import Engine, Opener, read

MODE_KLD, MODE_SHARE, MODE_PPL = 0.002, 0.1, 0.02  # agreement of modes: nats, share of the file's KLD, log ratio of PPL


def runtime_mode(
    runtime: Opener, heads: tuple[HeadLogits, HeadLogits], chunks: Chunks, score: Score, n_tokens: int
) -> dict[str, Any]:
    """The file as a person runs it: what is not scored as a prompt, then token by token through the KV cache, routed
    experts multiplied from their quantized bytes. heads: of the original's and the streamed file's scored states.

    `original`, `streamed`: divergence of this mode from the original, and of the streamed mode on the same tokens;
    `agreement`: of this mode from the streamed one. What remains there is the rounding of activations to 8 bits.
    """
    t = chunks.tokens.shape[1]
    engine = runtime(t)
    prompt, n_chunk = first_scored(t, score), min(len(chunks.tokens), max(1, n_tokens // t))
    parts: dict[str, list[Divergence]] = {"original": [], "streamed": [], "agreement": []}
    with track("runtime", n_chunk * (t - 1), "tokens") as advance:
        for i in range(n_chunk):
            logits = HeldLogits(stepped(engine, chunks.tokens[i].tolist(), prompt, advance))
            rows = slice(i * logits.n, (i + 1) * logits.n)
            theirs, ours = (head.part(rows) for head in heads)
            targets = scored_targets(chunks.targets[i : i + 1], score)
            pairs: dict[str, tuple[Logits, Logits]] = {
                "original": (theirs, logits),
                "streamed": (theirs, ours),
                "agreement": (ours, logits),
            }
            for key, (p, q) in pairs.items():
                parts[key].append(diverge(p, q, targets, engine.config.n_vocab))
    figures = {key: join(values).summary(t - 1 - prompt) for key, values in parts.items()}
    return {"agree": modes_agree(figures)} | figures


def stepped(engine: Engine, tokens: list[int], prompt: int, advance: Callable[[float], object]) -> torch.Tensor:
    """float32 [t - 1 - prompt, n_vocab] of one chunk: prompt tokens together, the others one by one."""
    read(engine, tokens[:prompt])
    advance(prompt)
    rows = []
    for i in range(prompt, len(tokens) - 1):
        row = engine.decode([0], [tokens[i]])[0] if i else engine.prefill(0, [tokens[0]], 0)
        rows.append(row.cpu().clone())
        advance(1)
    return torch.stack(rows)


def join(parts: Sequence[Divergence]) -> Divergence:
    """Of all their tokens, in order."""
    return Divergence(*(torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Divergence)))


def modes_agree(figures: Mapping[str, Mapping[str, Any]]) -> bool:
    """Within what 8-bit activations explain: a small share of the file's own divergence from the original."""
    streamed, between = figures["streamed"]["kld_mean"], figures["agreement"]["kld_mean"]
    ratio = figures["original"]["ppl"] / figures["streamed"]["ppl"]
    return between <= max(MODE_KLD, MODE_SHARE * streamed) and abs(math.log(ratio)) <= MODE_PPL
